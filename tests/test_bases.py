"""Where bases come from: a .gguf file is converted once, bit for bit and safely; the dtype fits the machine."""

import os

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import make_base, make_tokenizer
from generator import InputError
from model import load_base
from support import bases

TEXT = "hello hello,\n  é 漢字 <|im_start|>user"
BLOCK = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
         "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}


def write_gguf(path, seed=0):
    """A llama of 2 blocks and width 64 with a byte-level tokenizer, its matrices Q4_1 like the default base's."""
    random, Q4_1 = np.random.default_rng(seed), gguf.GGMLQuantizationType.Q4_1
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he",
                  "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
                       "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
                       "rope_dimension_count": 16, "vocab_size": len(vocabulary), "tokenizer_model": "gpt2",
                       "tokenizer_pre": "smollm", "token_list": vocabulary, "token_merges": ["h e", "l l"],
                       "token_types": [3] * 3 + [1] * (len(vocabulary) - 3), "bos_token_id": 1, "eos_token_id": 2,
                       "unk_token_id": 0, "pad_token_id": 2}.items():
        getattr(writer, f"add_{key}")(value)
    shapes = {"token_embd": (len(vocabulary), 64), "output_norm": (64,)}
    for l in range(2):
        shapes |= {f"blk.{l}.{name}": shape for name, shape in BLOCK.items()}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) / 10
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, Q4_1), raw_dtype=Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def tiny(tmp_path):
    path = str(tmp_path / "tiny.gguf")
    write_gguf(path)
    return path


def directly(path):
    """State dict and token ids as transformers reads them out of the .gguf file."""
    directory, file = os.path.split(path)
    model = bases.model_at("tiny", directory, torch.device("cpu"), torch.float32, gguf_file=file)
    return model.state_dict(), bases.tokenizer_at("tiny", directory, gguf_file=file)(TEXT)["input_ids"]


def check_same(path, reference):
    """load_base gives that state dict, to the bit, and those token ids."""
    model, tokenizer = load_base(path, torch.float32, "cpu")
    torch.testing.assert_close(dict(model.state_dict()), dict(reference[0]), rtol=0, atol=0)
    assert tokenizer(TEXT)["input_ids"] == reference[1] and tokenizer.decode(reference[1]) == TEXT


def converted(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def test_converted_once_and_bit_for_bit(cache, tiny, monkeypatch):
    """Against gguf's own dequantisation. A second start does not read the .gguf file; the cache is keyed by its
    content."""
    reference = directly(tiny)
    for tensor in gguf.GGUFReader(tiny).tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    loads, model_at = [], bases.model_at
    monkeypatch.setattr(bases, "model_at", lambda *args, **options: loads.append(options) or model_at(*args, **options))
    model, tokenizer = load_base(tiny, torch.float32, "cpu")
    assert model.model.layers[1].mlp.down_proj.weight.numpy().tobytes() == weight.tobytes()
    assert model.name_or_path == tiny and tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token is not None
    check_same(tiny, reference)
    assert [options.get("gguf_file") for options in loads] == ["tiny.gguf", None, None]
    (directory,) = converted(cache)
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1      # the weights' too: as the umask says
    write_gguf(tiny, seed=1)                                                    # another base under the same name
    check_same(tiny, directly(tiny))
    assert len(converted(cache)) == 2


def test_half_a_conversion_is_not_used(cache, tiny):
    """transformers saves a model on rank 0 alone: another rank leaves no directory without weights behind. What a
    killed process left is written again."""
    reference = directly(tiny)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        check_same(tiny, reference)
        assert not converted(cache)
    finally:
        torch.distributed.destroy_process_group()
    check_same(tiny, reference)
    (directory,) = converted(cache)
    directory.rename(f"{directory}.part")
    (cache / f"{directory.name}.part" / "model.safetensors").unlink()
    check_same(tiny, reference)
    assert converted(cache) == [directory]


@pytest.mark.parametrize("native", [True, False])
def test_dtype_fits_the_machine(base_directory, monkeypatch, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    default = torch.bfloat16 if native else torch.float32
    assert bases.default_dtype(torch.device("cuda")) == torch.bfloat16
    assert load_base(base_directory, device="cpu")[0].dtype == bases.default_dtype(torch.device("cpu")) == default
    assert load_base(base_directory, torch.float32, "cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("case", ["pad outside", "token outside"])
def test_tokenizer_beside_its_model(tmp_path, case):
    """A pad token always, within the embedding of 260 rows, and the model's end token; a token of text beyond the
    embedding is refused in one sentence."""
    tokenizer = make_tokenizer()
    if case == "pad outside":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        tokenizer.add_tokens([" river"])
    make_base().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if case == "token outside":
        with pytest.raises(InputError, match="' river' is beyond the rows"):
            load_base(str(tmp_path), torch.float32, "cpu")
        return
    base, tokenizer = load_base(str(tmp_path), torch.float32, "cpu")
    assert tokenizer.eos_token_id == 258
    assert tokenizer.pad_token_id == base.generation_config.pad_token_id == 258
