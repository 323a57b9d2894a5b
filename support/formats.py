"""Files of generators and adapters: this project's checkpoints, those of the authors' code, PEFT LoRAs. AdaptedLM's
from_pretrained, save_pretrained and export_peft need it; so do the commands, to know a checkpoint's base."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from generator import GeneratorConfig, config_from_dict
from support.bases import DEFAULT_BASE, DEFAULT_BASE_HUB_ID
from support.files import InputError, bad_input, hub_reachable, make_directory, read_json, read_safetensors

PEFT_CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

# A context of {tokens} tokens, as a LoRA of rank {r}

Written by a Generative Adapter ([arXiv 2411.05877](https://arxiv.org/abs/2411.05877)) in forward passes over the
context alone. The base answers from it with no context in the prompt; so can anyone read it out of this file.
"""


def locate_checkpoint(name):
    """Directory of a checkpoint: a local one as it is, a hub id (owner/name) downloaded, json and safetensors only."""
    name, patterns = os.fspath(name), ["adapter_config.json", "generator_config.json", "*.safetensors"]
    if os.path.isdir(name):
        return name
    with bad_input(f"checkpoint {name}: no such directory, not a hub id (owner/name) or not to be had from the hub"):
        validate_repo_id(name)                               # a path is refused before the hub is asked
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not hub_reachable())


def read_config(directory):
    """(whether a checkpoint is in the authors' format, its config)."""
    path = os.path.join(directory, "adapter_config.json")
    theirs = os.path.isfile(path)
    return theirs, read_json(path if theirs else os.path.join(directory, "generator_config.json"))


def checkpoint_base(directory):
    """Name of the base a checkpoint was trained for, as load_base takes it; None where it is not recorded."""
    theirs, c = read_config(directory)
    name = c.get("base_model_name_or_path" if theirs else "base")
    return name if isinstance(name, str) else None


def write_generator(directory, base_name, config, tensors):
    """generator.safetensors and generator_config.json in that directory."""
    make_directory(directory)
    save_file({name: p.detach().cpu().contiguous() for name, p in tensors.items()},
              os.path.join(directory, "generator.safetensors"))
    values = {"base": base_name} | {name: value for name, value in asdict(config).items() if value is not None}
    Path(directory, "generator_config.json").write_text(json.dumps(values, indent=1))


def read_generator(directory):
    """(GeneratorConfig, {name: tensor} as AdapterGenerator.tensors names them) of a checkpoint in either format."""
    theirs, c = read_config(directory)
    if theirs:
        config, tensors = read_fastlora(directory, c)
        print(f"checkpoint {directory} is in the authors' format: base {checkpoint_base(directory)}, d_r {config.d_r}, "
              f"rank {config.rank}, norm {config.norm}, scale {config.scale} (their alpha / r), damping 0, "
              f"targets {', '.join(config.targets)}")
    else:
        config = config_from_dict(c)
        tensors, _ = read_safetensors(os.path.join(directory, "generator.safetensors"))
    for name, tensor in tensors.items():                               # before the config's sizes are allocated
        if not tensor.is_floating_point() or name.endswith(".A2") and tensor.shape[:1] != (config.d_r,):
            raise InputError(f"{directory}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which does not go "
                             f"with d_r {config.d_r} in its config")
    return config, tensors


def read_fastlora(directory, c):
    """(GeneratorConfig, tensors) from a checkpoint of the authors' code (peft_type FASTLORA) and its config c.
    Theirs is transposed: A1 -> our B2, A2 -> B1^T, A3 -> A2, B -> A1. Their S is our S^T; norm commutes with that."""
    path = os.path.join(directory, "adapter_config.json")
    with bad_input(f"{path}: missing or malformed field", KeyError, TypeError, ZeroDivisionError):
        for key, known in (("peft_type", ["FASTLORA"]), ("fastlora_merge", ["pre-norm-sum"]),      # the paper's S_t
                           ("fastlora_inter_size", [None, c.get("fastlora_r")])):                  # and its one d_r
            if c[key] not in known:
                raise InputError(f"{path}: {key} is {c[key]!r}, where only {' or '.join(map(str, known))} can be read")
        d_r, norm = c["fastlora_r"], {"forbenius": "frobenius"}.get(c["fastlora_norm"], c["fastlora_norm"])
        rank, scale = min(c["fastlora_max_rank"], d_r), c["fastlora_alpha"] / d_r
    theirs, _ = read_safetensors(os.path.join(directory, "adapter_model.safetensors"))
    ours, tensors = {"A1": "B2", "A2": "B1", "A3": "A2", "B": "A1", "hidden_state_norm": "g"}, {}
    pattern = r"base_model\.model\.(.+)\.base_layer\.(.+)\.fastlora_(A1|A2|A3|B|hidden_state_norm)\.weight"
    for key, tensor in theirs.items():
        match = re.fullmatch(pattern, key)
        if not match:
            raise InputError(f"{directory}: tensor {key} is not one of a FASTLORA checkpoint")
        block, linear, part = match.groups()
        tensors[f"{block}.{linear}.{ours[part]}"] = tensor.T if part == "A2" else tensor
    targets = sorted({name.split(".")[-2] for name in tensors})
    return GeneratorConfig(d_r, rank, scale, norm, 0.0, targets), tensors


def write_peft(directory, base_name, config, pairs, tokens):
    """A PEFT LoRA directory with its model card, from {module name: (lora_A (r, d_in), lora_B (d_out, r))} with s in
    lora_B, of a context of that many tokens. PEFT multiplies by lora_alpha / r: lora_alpha = s r where that is whole
    (vLLM types it so), else s stays in lora_B and lora_alpha = r."""
    r, base_name = config.adapter_rank, DEFAULT_BASE_HUB_ID if base_name == DEFAULT_BASE else base_name
    alpha = config.scale * r
    factor, alpha = (config.scale, int(alpha)) if alpha == int(alpha) > 0 else (1.0, r)
    tensors = {}
    for name, (lora_A, lora_B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (lora_B.detach() / factor).cpu().contiguous()
    make_directory(directory)
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), metadata={"format": "pt"})
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": r,
            "lora_alpha": alpha, "target_modules": config.targets, "lora_dropout": 0.0,
            "layers_to_transform": config.blocks and [*range(config.blocks[0], config.blocks[1] + 1)], "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True}
    Path(directory, "adapter_config.json").write_text(json.dumps(peft, indent=1))
    Path(directory, "README.md").write_text(PEFT_CARD.format(base=json.dumps(base_name), tokens=tokens, r=r))
