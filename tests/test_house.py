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


def test_imports_run_down():
    """extras/ stands on the rest; train.py and evaluate.py hand over to it inside a function."""
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    seen = 0
    for path in glob.glob("*.py", root_dir=ROOT) + glob.glob("*/*.py", root_dir=ROOT):
        own = path.split(os.sep)[0].removesuffix(".py")
        if own not in floors:
            continue
        tree = ast.parse(open(os.path.join(ROOT, path), encoding="utf-8").read())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for other in {name.split(".")[0] for name in names} & floors.keys() - {own}:
                handed_over = own in ("train", "evaluate") and other == "extras" and node not in tree.body
                assert floors[other] < floors[own] or handed_over, f"{path} imports {other}"
                seen += 1
    assert seen > 30


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
