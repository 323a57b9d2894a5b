"""Tiny random bases and a byte-level tokenizer, so that the suite needs no download and little time."""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, PreTrainedTokenizerFast

from generator import GeneratorConfig
from model import AdaptedLM

torch.set_num_threads(1)          # LAPACK on small matrices is fast and steady with one thread


def make_base(kind="llama", seed=0, **changes):
    """A random decoder of 3 blocks, width 64, grouped-query attention."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 96,
             "vocab_size": 260, "max_position_embeddings": 512, "bos_token_id": 257, "eos_token_id": 258,
             "pad_token_id": 259, "initializer_range": 0.1}
    shape |= changes
    if kind == "gemma3":                # the one with a vision tower; gemma3_text has none
        vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                  "image_size": 28, "patch_size": 14}
        shape = {"text_config": shape, "vision_config": vision}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.float32).eval()


def make_model(kind="llama", seed=0, base=None, **config):
    """An AdaptedLM whose A1 is not zero, so that its adapters do something."""
    base = base or make_base(kind, seed)
    torch.manual_seed(seed + 1)
    model = AdaptedLM(base, GeneratorConfig(**{"d_r": 24, "rank": 8, "scale": 0.5, **config}))
    with torch.no_grad():
        for layer in model.generator.layers:
            layer.A1.normal_(std=0.1)
    return model


def tokens(*shape, seed=0):
    """Random token ids."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def make_tokenizer():
    """Every byte is a token; then <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<unused>", "<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory):
    """A tiny llama with its tokenizer, saved as transformers saves them."""
    path = tmp_path_factory.mktemp("base")
    make_base(max_position_embeddings=4096).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Enough distinct text to train on for a few steps."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    random = torch.Generator().manual_seed(0)
    words = ["river", "stone", "lamp", "seven", "green", "walks", "under", "paper", "cold", "tree", "sings", "north"]
    with open(path, "w") as file:
        for _ in range(40):
            picks = torch.randint(len(words), (60,), generator=random).tolist()
            file.write('{"text": "%s."}\n' % " ".join(words[i] for i in picks))
    return str(path)
