"""Where bases come from: a .gguf file is converted once, bit for bit and safely; the dtype fits the machine."""

import errno
import json
import os
import resource

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from torch.testing._internal.distributed.fake_pg import FakeStore

from generator import InputError
from model import load_base
from conftest import make_base, make_tokenizer
from processes import finish, start
from support import bases

TEXT = "hello hello,\n  é 漢字 <|im_start|>user"


def write_gguf(path, seed=0):
    """A llama of 2 blocks and width 64, Q4_1 like the default base, with a byte-level tokenizer. Returns {tensor:
    dequantised array}."""
    random, weights = np.random.default_rng(seed), {}
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he",
                  "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
                       "head_count": 4, "head_count_kv": 2,
                       "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4, "rope_dimension_count": 16,
                       "vocab_size": len(vocabulary), "tokenizer_model": "gpt2",
                       "tokenizer_pre": "smollm", "token_list": vocabulary, "token_merges": ["h e", "l l"],
                       "token_types": [3] * 3 + [1] * (len(vocabulary) - 3),
                       "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 2}.items():
        getattr(writer, f"add_{key}")(value)
    block = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
             "ffn_up": (96, 64),
             "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {"token_embd": (len(vocabulary), 64), "output_norm": (64,),
              **{f"blk.{l}.{name}": shape for l in range(2) for name, shape in block.items()}}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) / 10
        if len(shape) == 1:
            weights[name] = values + 1
            writer.add_tensor(f"{name}.weight", weights[name])
        else:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            weights[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def tiny(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return str(tmp_path / "tiny.gguf")


def directly(path):
    """State dict and token ids as transformers reads them out of the .gguf file."""
    options = {"gguf_file": os.path.basename(path)}
    model = bases.model_at("tiny", os.path.dirname(path), torch.device("cpu"), torch.float32, **options)
    return model.state_dict(), bases.tokenizer_at("tiny", os.path.dirname(path), **options)(TEXT)["input_ids"]


def same(path, reference):
    model, tokenizer = load_base(path, torch.float32, "cpu")
    state = model.state_dict()
    same = state.keys() == reference[0].keys() and all(torch.equal(state[k], reference[0][k]) for k in state)
    return same and tokenizer(TEXT)["input_ids"] == reference[1]


def converted(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def test_converted_once_and_bit_for_bit(cache, tmp_path, capsys):
    path = str(tmp_path / "tiny.gguf")
    weights = write_gguf(path)
    model, tokenizer = load_base(path, torch.float32, "cpu")
    state = model.state_dict()
    for name, ours in {"token_embd": "embed_tokens", "output_norm": "norm", "blk.1.ffn_down": "layers.1.mlp.down_proj",
                       "blk.0.attn_v": "layers.0.self_attn.v_proj"}.items():
        assert state[f"model.{ours}.weight"].numpy().tobytes() == weights[name].tobytes()
    reference = directly(path)
    assert same(path, reference) and tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert model.name_or_path == path and tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token is not None
    half = load_base(path, torch.bfloat16, "cpu")[0].state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in reference[0].items())
    assert load_base(path)[1](TEXT)["input_ids"] == reference[1]
    directory, = converted(cache)
    assert "tiny" in directory.name and transformers.__version__ in directory.name
    assert capsys.readouterr().err.count("is converted for quick starts, once") == 1


def test_a_process_of_a_group_leaves_no_half_conversion(cache, tiny, capsys):
    """transformers saves a model on rank 0 alone; another rank must not leave a directory without weights behind."""
    reference = directly(tiny)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert same(tiny, reference) and not converted(cache) and "rank 0 alone" in capsys.readouterr().err
    finally:
        torch.distributed.destroy_process_group()
    assert same(tiny, reference) and len(converted(cache)) == 1


def test_a_second_start_does_not_read_the_gguf(cache, tiny, monkeypatch):
    reference = directly(tiny)
    load_base(tiny, torch.float32, "cpu")
    loader = bases.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: (
        pytest.fail("read again") if "gguf_file" in options else loader(*args, **options)))
    assert same(tiny, reference)


def test_keyed_by_content_and_version(cache, tiny, monkeypatch):
    load_base(tiny, torch.float32, "cpu")
    write_gguf(tiny, seed=1)                                                    # another base under the same name
    assert same(tiny, directly(tiny)) and len(converted(cache)) == 2
    monkeypatch.setattr(bases.transformers, "__version__", "0.0.0")   # importing may replace the module in sys.modules
    assert same(tiny, directly(tiny)) and len(converted(cache)) == 3


def test_killed_while_writing(cache, tiny):
    """A half-written directory is rebuilt."""
    reference = directly(tiny)
    load_base(tiny, torch.float32, "cpu")
    directory, = converted(cache)
    directory.rename(f"{directory}.part")
    (cache / f"{directory.name}.part" / "model.safetensors").unlink()
    assert same(tiny, reference) and directory.is_dir() and not os.path.exists(f"{directory}.part")


@pytest.mark.parametrize("why", ["no directory", "file limit", "full at the end"])
def test_a_cache_that_cannot_be_written_is_no_error(cache, tiny, tmp_path, monkeypatch, capsys, why):
    reference = directly(tiny)
    if why == "no directory":  # as on a read-only disk, and root cannot write there either
        (tmp_path / "cache").write_text("")
    if why == "full at the end":
        monkeypatch.setattr(bases.os, "rename",
                            lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if why == "file limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))         # the weights are larger
    try:
        assert same(tiny, reference)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "tiny.gguf is read anew at every start" in capsys.readouterr().err
    assert why == "no directory" or not converted(cache)


def test_processes_at_once(cache, tiny, tmp_path):
    """One converts, both load the same base."""
    reference = directly(tiny)
    script = ("import sys, json, torch; from model import load_base;"
              "base, tokenizer = load_base(sys.argv[1], torch.float32, 'cpu');"
              "weights = sum(p.double().sum().item() for p in base.parameters());"
              "print(json.dumps([weights, tokenizer(sys.argv[2])['input_ids']]))")
    files = [tmp_path / f"printed-{n}" for n in range(2)]
    ended = finish(*[start(["-c", script, tiny, TEXT], file, cache=bases.CACHE)
                     for file in files])
    printed = [file.read_text() for file in files]
    assert ended == [0, 0], printed
    base, _ = load_base(tiny, torch.float32, "cpu")
    want = [sum(p.double().sum().item() for p in base.parameters()), reference[1]]
    assert [json.loads(text.splitlines()[-1]) for text in printed] == [want] * 2
    assert sum("is converted for quick starts" in text for text in printed) == 1
    assert not any("read anew" in text for text in printed)


def test_damaged_gguf(cache, tiny):
    os.truncate(tiny, 3000)
    with pytest.raises(InputError, match="tiny.gguf.* cannot be loaded"):
        load_base(tiny, device="cpu")
    os.truncate(tiny, 0)
    with pytest.raises(InputError, match="tiny.gguf.* cannot be loaded"):
        load_base(tiny, device="cpu")


@pytest.mark.parametrize("native", [True, False])
def test_dtype_fits_the_machine(base_directory, monkeypatch, capsys, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpu = torch.device("cpu")
    assert bases.default_dtype(torch.device("cuda")) == torch.bfloat16
    assert bases.default_dtype(cpu) == (torch.bfloat16 if native else torch.float32)
    assert load_base(base_directory, device="cpu")[0].dtype == bases.default_dtype(cpu)
    assert load_base(base_directory, torch.float32, "cpu")[0].dtype == torch.float32
    assert "emulates" not in capsys.readouterr().err
    assert load_base(base_directory, torch.bfloat16, "cpu")[0].dtype == torch.bfloat16
    assert capsys.readouterr().err.count("this CPU only emulates bfloat16") == (not native)
    # a build without it has no such question to ask
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert bases.default_dtype(cpu) == torch.float32


def test_straight_to_a_gpu(monkeypatch):
    """On CUDA transformers itself places each weight; on a CPU there is nothing to place."""
    asked = []
    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: asked.append(options))
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        bases.model_at("base", "base", device, torch.bfloat16)
    assert asked[0]["device_map"] == torch.device("cuda", 1) and "device_map" not in asked[1]
    assert all(options["use_safetensors"] for options in asked)


def edit(path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("case", ["pad outside", "no pad", "no tokenizer config", "a list of eos", "eos outside",
                                  "token outside"])
def test_tokenizer_beside_its_model(tmp_path, case):
    """A pad token always, within the embedding of 260 rows, and the model's end token; a token of text beyond the
    embedding is refused in one sentence."""
    tokenizer = make_tokenizer()
    if case == "pad outside":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if case == "token outside":
        tokenizer.add_tokens([" river"])
    if case == "no pad":
        tokenizer.pad_token = None
    make_base().save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    if case in ("no tokenizer config", "a list of eos"):
        (tmp_path / "tokenizer_config.json").unlink()
    if case == "a list of eos":
        edit(tmp_path / "config.json", eos_token_id=[258, 256])
    if case == "eos outside":
        edit(tmp_path / "config.json", eos_token_id=32000)
    if case == "token outside":
        with pytest.raises(InputError, match="' river' has number 260, beyond the 260 rows"):
            load_base(str(tmp_path), torch.float32, "cpu")
        return
    base, tokenizer = load_base(str(tmp_path), torch.float32, "cpu")
    assert tokenizer.eos_token_id == 258
    assert tokenizer.pad_token_id == base.generation_config.pad_token_id == (259 if case == "eos outside" else 258)
