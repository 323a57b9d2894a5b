"""Files of generators and adapters: this project's checkpoints, those of the authors' code, PEFT LoRAs."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from support.bases import DEFAULT_BASE, DEFAULT_BASE_HUB_ID
from support.files import (InputError, bad_input, hub_snapshot, make_directory, read_json, read_safetensors,
                           save_tensors)

PEFT_CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

# A context of {tokens} tokens, as a LoRA of rank {r}

Written by a Generative Adapter ([arXiv 2411.05877](https://arxiv.org/abs/2411.05877)) in forward passes over the
context alone. The base answers from it with no context in the prompt; so can anyone read it out of this file.
"""
FASTLORA_NAMES = {"A1": "B2", "A2": "B1", "A3": "A2", "B": "A1", "hidden_state_norm": "g"}         # theirs: ours


def locate_checkpoint(name):
    """Directory to which a checkpoint of the hub (owner/name) is downloaded, json and safetensors only."""
    return hub_snapshot(os.fspath(name), ["adapter_config.json", "generator_config.json", "*.safetensors"])


def checkpoint_base(name):
    """Name of the base a checkpoint was trained for, as load_base takes it; None where it is not recorded."""
    directory = name if os.path.isdir(name) else locate_checkpoint(name)
    theirs = os.path.join(directory, "adapter_config.json")
    if os.path.isfile(theirs):
        return read_json(theirs).get("base_model_name_or_path")
    return read_json(os.path.join(directory, "generator_config.json")).get("base")


def write_generator(directory, base_name, config, tensors):
    """generator.safetensors and generator_config.json in that directory. config: a GeneratorConfig."""
    os.makedirs(directory, exist_ok=True)
    save_tensors(tensors, os.path.join(directory, "generator.safetensors"))
    values = {"base": base_name, **asdict(config)}
    Path(directory, "generator_config.json").write_text(json.dumps(values, indent=1))


def read_generator(name):
    """(values of a GeneratorConfig, {name: tensor} as AdapterGenerator.tensors names them, name of the base) of a
    checkpoint in either format, a directory or a hub id."""
    directory = name if os.path.isdir(name) else locate_checkpoint(name)
    theirs = os.path.join(directory, "adapter_config.json")
    if os.path.isfile(theirs):
        values = read_fastlora_config(theirs)
        tensors, values["targets"] = read_fastlora(directory)
        print(f"checkpoint {name} is in the authors' format, so that scale is their alpha / r: {values}")
    else:
        values = read_json(os.path.join(directory, "generator_config.json"))
        tensors, _ = read_safetensors(os.path.join(directory, "generator.safetensors"))
    for name, tensor in tensors.items():                               # before the config's sizes are allocated
        wrong = name.endswith(".A2") and tensor.shape[:1] != (values.get("d_r"),)
        if wrong or not tensor.is_floating_point():
            raise InputError(f"{directory}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which does not go "
                             f"with d_r {values.get('d_r')} in its config")
    return values, tensors, values.get("base")


def read_fastlora_config(path):
    """Values of a GeneratorConfig, but for its targets, from the config of the authors' code (peft_type FASTLORA)."""
    config = read_json(path)
    with bad_input(f"{path}: missing or malformed field", KeyError, TypeError, ZeroDivisionError):
        known = {"peft_type": ["FASTLORA"],
                 "fastlora_merge": ["pre-norm-sum"],                   # the paper's S_t
                 "fastlora_inter_size": [None, config["fastlora_r"]]}  # and its one d_r
        for key, values in known.items():
            if config[key] not in values:
                raise InputError(f"{path}: {key} is {config[key]!r}, where only {values[-1]} can be read")
        norm = config["fastlora_norm"]
        return {"base": config.get("base_model_name_or_path"),
                "d_r": config["fastlora_r"],
                "rank": min(config["fastlora_max_rank"], config["fastlora_r"]),
                "scale": config["fastlora_alpha"] / config["fastlora_r"],
                "norm": "frobenius" if norm == "forbenius" else norm,
                "damping": 0.0}


def read_fastlora(directory):
    """(tensors, targets) of a checkpoint of the authors' code. Theirs is transposed: A1 -> our B2, A2 -> B1^T, A3 ->
    A2, B -> A1. Their S is our S^T; norm commutes with that."""
    theirs, _ = read_safetensors(os.path.join(directory, "adapter_model.safetensors"))
    pattern = r"base_model\.model\.(.+)\.base_layer\.(.+)\.fastlora_(A1|A2|A3|B|hidden_state_norm)\.weight"
    tensors = {}
    targets = set()
    for key, tensor in theirs.items():
        match = re.fullmatch(pattern, key)
        if not match:
            raise InputError(f"{directory}: tensor {key} is not one of a FASTLORA checkpoint")
        block, linear, part = match.groups()
        if part == "A2":
            tensor = tensor.T
        tensors[f"{block}.{linear}.{FASTLORA_NAMES[part]}"] = tensor
        targets.add(linear.split(".")[-1])
    return tensors, sorted(targets)


def write_peft(directory, base_name, config, lora, tokens):
    """A PEFT LoRA directory with its model card, from {module name: (lora_A (1, r, d_in), lora_B (1, d_out, r))} with s
    in lora_B, of a context of that many tokens. config: a GeneratorConfig. PEFT multiplies by lora_alpha / r:
    lora_alpha = s r where that is whole (vLLM types it so), else s stays in lora_B and lora_alpha = r. InputError where
    the directory holds files already."""
    if os.path.isdir(directory) and os.listdir(directory):
        raise InputError(f"{directory} holds files already: name another directory for the adapter")
    r = len(next(iter(lora.values()))[0][0])             # the config's rank, but d_r for frobenius
    alpha = r
    factor = 1.0
    if config.scale * r == int(config.scale * r) > 0:
        alpha = int(config.scale * r)
        factor = config.scale
    if base_name == DEFAULT_BASE:
        base_name = DEFAULT_BASE_HUB_ID
    tensors = {}
    for name, (lora_A, lora_B) in lora.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A[0]
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B[0] / factor
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": r,
            "lora_alpha": alpha, "target_modules": config.targets}
    make_directory(directory)
    save_tensors(tensors, os.path.join(directory, "adapter_model.safetensors"), {"format": "pt"})
    Path(directory, "adapter_config.json").write_text(json.dumps(peft, indent=1))
    Path(directory, "README.md").write_text(PEFT_CARD.format(base=json.dumps(base_name), tokens=tokens, r=r))
