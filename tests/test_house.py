"""The order of the house: imports run down only, lines of at most 120 columns; the README's method is the code's."""

import ast
import glob
import os
import re

import torch

from conftest import ROOT
from generator import GeneratorConfig, LayerGenerator, rms_norm

# a module imports only from what stands below it
FLOORS = [{"support"}, {"generator"}, {"model", "data"}, {"tasks"}, {"train", "evaluate"}, {"extras"}]


def modules():
    """{module: path}: "model", "support.files" and so on."""
    paths = glob.glob("*.py", root_dir=ROOT)
    for folder in ("support", "tasks", "extras"):
        paths += glob.glob(f"{folder}/*.py", root_dir=ROOT)
    return {path[:-3].replace(os.sep, "."): os.path.join(ROOT, path) for path in sorted(paths)}


def imports(path, known):
    """[(project module, whether inside a function)] of a file."""
    tree = ast.parse(open(path, encoding="utf-8").read())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) in inside) for name in names if name in known]
    return found


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if module.split(".")[0] in names)


def test_imports_run_down():
    """extras/ stands on the rest; train.py and evaluate.py hand over to it inside a function."""
    known, needs = modules(), {}
    for module, path in known.items():
        needs[module] = set()
        for name, inside in imports(path, known):
            same = name.split(".")[0] == module.split(".")[0]
            handed_over = inside and module in ("train", "evaluate") and name.startswith("extras.")
            assert same or handed_over or floor(name) < floor(module), f"{module} imports {name}"
            if same:
                needs[module].add(name)
    assert len(known) > 15
    done = set()                        # within a folder: a module enters once all that it imports have entered
    while len(done) < len(needs):
        free = [module for module in needs if module not in done and needs[module] <= done]
        assert free, f"imports in a circle: {sorted(needs.keys() - done)}"
        done.update(free)


def test_columns():
    for folder in (".", "support", "tasks", "extras", "tests"):
        for path in glob.glob(os.path.join(ROOT, folder, "*.py")):
            for number, line in enumerate(open(path, encoding="utf-8"), 1):
                assert len(line.rstrip("\n")) <= 120, (path, number)


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
