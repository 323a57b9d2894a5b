"""The order of the house: line counts and lengths, imports that run one way; the README's method is the code's."""

import ast
import glob
import os
import re

import torch

from conftest import ROOT
from generator import GeneratorConfig, LayerGenerator, rms_norm

LINES = {"generator": 360, "model": 350, "data": 400, "train": 400, "evaluate": 430}


def modules():
    """{module: path}: "model", "support.files" and so on."""
    paths = [f"{name}.py" for name in LINES] + sorted(glob.glob("support/*.py", root_dir=ROOT))
    return {path[:-3].replace(os.sep, "."): os.path.join(ROOT, path) for path in paths}


def imports():
    """{module: {project module: names it takes from there}}, imports inside functions included."""
    known, found = modules(), {}
    for module, path in known.items():
        found[module] = {}
        for node in ast.walk(ast.parse(open(path, encoding="utf-8").read())):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                found[module].setdefault(node.module, set()).update(alias.name for alias in node.names)
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in set(names) & known.keys():
                found[module].setdefault(name, set())
    return found


def test_sizes():
    for name, most in LINES.items():
        assert len(open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8").readlines()) <= most, name
    for path in (p for folder in (".", "support", "tests") for p in glob.glob(os.path.join(ROOT, folder, "*.py"))):
        for number, line in enumerate(open(path, encoding="utf-8"), 1):
            assert len(line.rstrip("\n")) <= 120, (path, number)
    assert os.path.getsize(os.path.join(ROOT, "README.md")) <= 12_288


def test_imports_run_one_way():
    found = imports()
    assert len(found) > len(LINES) and found["model"]["generator"] and found["train"]["model"]  # the check sees some
    order = []                          # a module enters once all that it imports have entered: no circle
    while len(order) < len(found):
        free = [name for name in found if name not in order and found[name].keys() <= set(order)]
        assert free, f"imports in a circle: {sorted(found.keys() - set(order))}"
        order += free
    for module, needs in found.items():
        assert not needs.keys() & {"train", "evaluate"}, module
    assert not found["support.files"]
    assert not found["generator"].keys() & {"model", "data"} and not found["model"].keys() & {"data"}
    assert not found["data"].keys() & {"generator", "model"}
    assert len(found["train"]["data"]) <= 5


def test_the_method_of_the_readme():
    """Its lines, run as they stand there, against LayerGenerator: two chunks, float64, damping 0, the full SVD."""
    readme = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    code = re.search(r"```python\n(def read.*?)```", readme, re.S)
    torch.manual_seed(0)
    config = GeneratorConfig(d_r=12, rank=5, scale=0.5, norm="svd-exact", damping=0.0)
    layer = LayerGenerator(config, 20, 16, 14).double()
    torch.nn.init.normal_(layer.A1), torch.nn.init.normal_(layer.g)
    names = {"torch": torch, "r": 5, "s": 0.5, "W": torch.randn(14, 16).double(), **dict(layer.named_parameters())}
    exec(code[1], names)
    chunks, x, S, want = torch.randn(2, 30, 20).double(), torch.randn(7, 16).double(), 0, 0
    for H in chunks:
        S, want = names["read"](S, H), want + layer.update(rms_norm(H)).double()
    torch.testing.assert_close(S, want, atol=1e-4, rtol=1e-4)           # update sums over tokens in fp32
    lora_A, lora_B = layer.adapter(S)
    torch.testing.assert_close(names["linear"](x, S), x @ names["W"].T + x @ lora_A.T @ lora_B.T)
