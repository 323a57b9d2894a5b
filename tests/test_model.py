"""The adapted model: one pass equals streaming, rows are independent, padding changes nothing, files round-trip, bad
input is one sentence."""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from conftest import ROOT, make_base, make_model, tokens
from generator import GeneratorConfig, InputError, Memory
from model import AdaptedLM, load_base
from processes import finish, start
from support.bases import DEFAULT_BASE, DEFAULT_BASE_HUB_ID
from support.formats import read_generator

SHORT = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
# name: kind and what differs from conftest's shape; between them q/k/v biases, q/k norms, tied and untied embeddings,
# sliding windows, a vision tower
BASES = {"llama": ("llama", {}),
         "llama-tied-biased": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
         "mistral": ("mistral", dict(sliding_window=8)), "qwen2": ("qwen2", {}),
         "qwen3-tied-biased": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
         "gemma3-tied": ("gemma3_text", SHORT), "gemma3-vision-tied": ("gemma3", SHORT),
         "gemma3-untied": ("gemma3_text", dict(tie_word_embeddings=False, **SHORT))}
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GREEDY = {"do_sample": False, "eos_token_id": None}
O_PROJ = "model.layers.{}.self_attn.o_proj"


def stream(model, chunks, memory=None):
    for t in range(chunks.shape[1]):
        memory = model.contextualize(chunks[:, t], memory=memory)
    return memory


@torch.no_grad()
def make_architecture(name):
    """A base of BASES whose biases and norms do something: at initialisation they are 0 and 1."""
    kind, changes = BASES[name]
    base = make_base(kind, **changes)
    for p in base.parameters():
        if p.dim() == 1:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return base


@pytest.mark.parametrize("name, targets, norm",
                         [(name, ["o_proj"], "svd") for name in BASES]
                         + [("qwen2", ALL_TARGETS, "svd"), ("llama", ["down_proj", "q_proj"], "svd-exact"),
                            ("llama", ["o_proj"], "frobenius")])
@torch.no_grad()
def test_chunk_parallel_equals_streaming(name, targets, norm):
    """forward_segments on the doubled schedule against contextualize and forward, chunk by chunk."""
    base = make_architecture(name)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert tied == ("tied" in name.split("-"))
    model = make_model(base=base, targets=targets, norm=norm)
    B, C, L = 2, 3, 20
    chunks, probe = tokens(B, C, L), tokens(B, C, L, seed=1)
    logits = model.forward_segments(torch.cat([chunks, probe], 1), None, [0, 1, 2, 1, 2, 3])
    memory = None
    for t in range(C):
        torch.testing.assert_close(logits[:, t], model(chunks[:, t], memory=memory), atol=1e-4, rtol=1e-4)
        memory = model.contextualize(chunks[:, t], memory=memory)
        torch.testing.assert_close(logits[:, C + t], model(probe[:, t], memory=memory), atol=1e-4, rtol=1e-4)
    assert memory.tokens.tolist() == [C * L] * B
    assert (logits[:, C] - model(probe[:, 0])).abs().max() > 1e-2           # the adapter does something


@torch.no_grad()
def test_equals_the_formula_in_a_plain_loop():
    """S, norm and W_Delta of one chunk from the paper's equations, token by token in float64, added to the base's own
    weight."""
    model = make_model(rank=24, damping=0.0, norm="svd-exact")
    chunk, query = tokens(1, 40), tokens(1, 7, seed=1)
    hidden = model.base.model(chunk, output_hidden_states=True).hidden_states
    adapted = make_base()
    for l in range(3):
        g = model.generator.by_name[O_PROJ.format(l)]
        A1, A2, B1, B2 = (p.double() for p in (g.A1, g.A2, g.B1, g.B2))
        S = torch.zeros(24, 24, dtype=torch.float64)
        for h in hidden[l][0].double():
            h = h / (h.square().mean() + 1e-6).sqrt() * g.g
            S += torch.outer(A2 @ h, h @ B1)                                # eq. 1-3
        U, _, Vh = torch.linalg.svd(S)
        adapted.model.layers[l].self_attn.o_proj.weight += (0.5 * A1 @ (U @ Vh) @ B2).float()       # eq. 7, 8
    torch.testing.assert_close(model(query, memory=model.contextualize(chunk)), adapted(query).logits, atol=1e-4,
                               rtol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing():
    """Pad tokens of any value, and whole chunks of padding, leave memory and losses as they are."""
    model = make_model()
    chunk, probe = tokens(1, 13), tokens(1, 20, seed=3)
    alone = model.contextualize(chunk)
    want = F.cross_entropy(model(probe, memory=alone)[0, :-1], probe[0, 1:], reduction="sum")
    for fill, dtype in ((0, torch.bool), (200, torch.long)):
        mask = (torch.arange(20) < 13)[None].to(dtype)
        padded = F.pad(chunk, (0, 7), value=fill)
        memory = model.contextualize(padded, mask)
        memory = model.contextualize(torch.full_like(padded, fill), torch.zeros_like(mask), memory)
        assert memory.tokens.tolist() == [13]
        for name, S in alone.states.items():
            torch.testing.assert_close(memory.states[name], S, atol=1e-3, rtol=1e-5)
        segments, real = torch.stack([padded, probe], 1), torch.stack([mask, torch.ones_like(mask)], 1)
        nats, count = model.segment_losses(segments, real, [0, 1], segments.masked_fill(real == 0, -100))
        torch.testing.assert_close(nats[0, 1], want, atol=1e-3, rtol=1e-5)
        assert count.tolist() == [[12, 19]]


def test_short_and_empty_contexts():
    """Three tokens give a finite adapter of rank 3, padding alone gives none. Segments of one token, or with labels of
    -100 alone, have no nats, no targets and a gradient of zero."""
    model = make_model()
    three = model.lora(model.contextualize(tokens(1, 3)))
    nothing = model.lora(model.contextualize(tokens(1, 5), torch.zeros(1, 5)))
    for name, (A, B) in three.items():
        sigma = torch.linalg.svdvals(B[0] @ A[0])
        assert sigma.isfinite().all() and sigma[2] > 1e-3 and sigma[3] < 1e-4 * sigma[0]
        assert (nothing[name][1] @ nothing[name][0]).abs().max() == 0
    for segments, labels in ((tokens(2, 2, 1), tokens(2, 2, 1)), (tokens(2, 2, 9), torch.full((2, 2, 9), -100))):
        nats, count = model.segment_losses(segments, None, [0, 1], labels)
        nats.sum().backward()
        assert nats.tolist() == [[0, 0], [0, 0]] == count.tolist()
    assert all(p.grad is None or not p.grad.any() for p in model.generator.parameters())


def test_losses_equal_plain_cross_entropy_and_checkpointing_changes_nothing():
    """Each of the first n blocks is computed once more in the backward pass, the last of them first."""
    model = make_model()
    segments, visible = tokens(2, 4, 20), torch.tensor([1, 1, 1, 2])
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    logits = model.forward_segments(segments, None, visible)
    want = F.cross_entropy(logits[:, :, :-1].flatten(0, 2), segments[:, :, 1:].flatten(), reduction="none")
    want = want.view(2, 4, 19).sum(-1)
    (want * weights).sum().backward()
    grads = [p.grad.clone() for p in model.generator.parameters()]
    computed = []
    for l, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, l=l: computed.append(l))
    for checkpointing, again in ((0, []), (2, [1, 0]), (3, [2, 1, 0])):     # of 3 blocks
        model.zero_grad()
        model.checkpointing = checkpointing
        nats, _ = model.segment_losses(segments, None, visible, segments)
        torch.testing.assert_close(nats, want)
        computed.clear()
        (nats * weights).sum().backward()
        assert computed == again
        for p, grad in zip(model.generator.parameters(), grads):
            torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in model.base.parameters())


@torch.no_grad()
def test_generate_equals_greedy_by_hand():
    """KV cache and left padding against argmax over full forward passes."""
    model = make_model(scale=10.0)
    memory, prompt = model.contextualize(tokens(2, 20)), tokens(2, 6, seed=1)
    want = prompt
    for _ in range(5):
        want = torch.cat([want, model(want, memory=memory)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 5, **GREEDY}
    assert model.generate(prompt, memory, **options).tolist() == want.tolist()
    padded, mask = F.pad(prompt, (3, 0), value=259), F.pad(torch.ones_like(prompt), (3, 0))
    assert model.generate(padded, memory, attention_mask=mask, **options)[:, 9:].tolist() == want[:, 6:].tolist()
    plain = model.base.generate(prompt, **options)
    assert model.generate(prompt, **options).tolist() == plain.tolist() != want.tolist()


@torch.no_grad()
def test_sum_of_memories():
    """a + b is the memory of contexts read apart, S a sum over the tokens of both (eq. 3); a batch of 1 is added to
    every row."""
    model = make_model()
    a, b = model.contextualize(tokens(2, 20)), model.contextualize(tokens(2, 13, seed=1))
    one = model.contextualize(tokens(2, 13, seed=1)[1:])
    for memory in (a + b, a + one, one + a):
        assert memory.tokens.tolist() == [33, 33]
        for name, S in memory.states.items():
            torch.testing.assert_close(S[1], a.states[name][1] + b.states[name][1], atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_every_user_in_one_batch_as_alone():
    """Memories of contexts of different lengths side by side, prompts left-padded: row b is what user b gets alone."""
    model = make_model(scale=10.0)
    memories = [model.contextualize(tokens(1, n, seed=n)) for n in (9, 20, 31)]
    prompts = [tokens(1, n, seed=100 + n) for n in (4, 7, 2)]
    together = Memory.stack(memories)
    assert together.tokens.tolist() == [9, 20, 31]
    padded = torch.cat([F.pad(p, (7 - p.shape[1], 0), value=259) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 6, **GREEDY}
    served = model.generate(padded, together, attention_mask=mask, **options)[:, 7:].tolist()
    logits = model(padded, mask, together)
    chunk = tokens(3, 8)
    more = model.contextualize(chunk, memory=together)                      # streaming goes on for all of them at once
    for b, (memory, prompt) in enumerate(zip(memories, prompts)):
        n = prompt.shape[1]
        assert served[b] == model.generate(prompt, memory, **options)[0, n:].tolist()
        torch.testing.assert_close(logits[b, 7 - n:], model(prompt, memory=memory)[0], atol=1e-4, rtol=1e-4)
        alone = model.contextualize(chunk[b:b + 1], memory=memory)
        for name, S in alone.states.items():
            torch.testing.assert_close(more.states[name][b], S[0], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name, scale, alpha", [*((name, 0.5, 4) for name in BASES), ("llama", 0.3, 8)])
@torch.no_grad()
def test_exported_adapter_in_peft(tmp_path, name, scale, alpha):
    """The exported adapter, applied by peft beside the weights and merged into them, gives the adapted model's
    logits."""
    peft = pytest.importorskip("peft")
    model = make_model(base=make_architecture(name), targets=ALL_TARGETS, scale=scale)
    memory, query = model.contextualize(tokens(1, 30)), tokens(1, 12, seed=1)
    model.base.name_or_path = DEFAULT_BASE                  # not the hub's weights, but PEFT and vLLM have no others
    model.export_peft(memory, tmp_path)
    want = model(query, memory=memory)
    loaded = peft.PeftModel.from_pretrained(make_architecture(name), tmp_path).eval()
    torch.testing.assert_close(loaded(query).logits, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded.merge_and_unload()(query).logits, want, atol=1e-4, rtol=1e-4)
    assert (want - model(query)).abs().max() > 1e-2
    config = json.load(open(tmp_path / "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["lora_alpha"]) == (DEFAULT_BASE_HUB_ID, alpha)


@torch.no_grad()
def test_memory_in_another_process(tmp_path, base_directory):
    """Generator and memory saved here, loaded and asked there."""
    model = make_model(base=load_base(base_directory, torch.float32, "cpu")[0])
    memory = model.contextualize(tokens(1, 30))
    model.save_pretrained(tmp_path / "generator")
    memory.save(tmp_path / "user.safetensors")
    script = ("import sys; from conftest import tokens; from model import *;"
              "model = AdaptedLM.from_pretrained(load_base(sys.argv[1], torch.float32, 'cpu')[0], 'generator');"
              "print(model(tokens(1, 8), memory=Memory.load('user.safetensors')).double().sum().item())")
    process = start(["-c", script, base_directory], tmp_path / "printed", cwd=tmp_path)
    assert finish(process) == [0], (tmp_path / "printed").read_text()
    got = float((tmp_path / "printed").read_text().splitlines()[-1])
    assert got == pytest.approx(model(tokens(1, 8), memory=memory).double().sum().item(), rel=1e-6)


def refused(words, function, *args, kind=InputError, **options):
    with pytest.raises(kind, match=words):
        function(*args, **options)


def test_bad_bases(tmp_path, monkeypatch):
    monkeypatch.setattr("support.bases.CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    for name, words in (("no/such.gguf", "no such file"), (str(tmp_path / "broken.gguf"), "cannot be loaded")):
        refused(words, load_base, name)
    refused("logits", make_model, base=make_base("granite", logits_scaling=8.0))
    refused("no target module 'z_proj'", make_model, targets=["z_proj"])
    refused("GPT2LMHeadModel is not a decoder", make_model, base=make_base("gpt2"))
    refused("no target module 'o_proj'", make_model, base=make_base("phi"))


def test_bad_configs_and_checkpoints(tmp_path):
    for values, words in (({"norm": "l2"}, "norm"), ({"d_r": 8, "rank": 9}, "rank"), ({"damping": -1}, "damping")):
        refused(words, GeneratorConfig, **values)
    for values in ({"d_r": 64.5}, {"scale": float("nan")}, {"targets": "o_proj"}):
        refused(next(iter(values)), GeneratorConfig.from_dict, values)
    load = AdaptedLM.from_pretrained
    make_model().save_pretrained(tmp_path)
    refused("this base and config need", load, make_base(hidden_size=32, num_attention_heads=2), tmp_path)
    os.truncate(tmp_path / "generator.safetensors", 1000)
    refused("cannot be read as safetensors", load, make_base(), tmp_path)
    # of the authors
    golden = os.path.join(ROOT, "tests", "golden", "ckpt_llama_o")
    config = json.load(open(os.path.join(golden, "adapter_config.json")))
    shutil.copy(os.path.join(golden, "adapter_model.safetensors"), tmp_path)
    for change, words in (({"fastlora_merge": "mean"}, "pre-norm-sum"), ({"fastlora_alpha": None}, "malformed")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        refused(words, load, make_base(), tmp_path)
    change = {"fastlora_max_rank": 99, "fastlora_norm": "forbenius"}        # capped at d_r; their spelling is read
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    values, _, _ = read_generator(tmp_path)
    assert (values["rank"], values["norm"]) == (24, "frobenius")


def test_bad_memories_and_contexts(tmp_path):
    model, other = make_model(), make_model(seed=5)
    path = tmp_path / "m.safetensors"
    model.contextualize(tokens(1, 9)).save(path)
    memory, foreign = Memory.load(path), other.contextualize(tokens(1, 4))
    two, three = model.contextualize(tokens(2, 4)), model.contextualize(tokens(3, 4))
    refused("another generator", other.generate, tokens(1, 4), memory, max_new_tokens=1)
    refused("different generators", memory.__add__, foreign)
    refused("batches {2, 3}", two.__add__, three)
    save_file({"x": torch.zeros(1)}, path)
    refused("not a saved memory", Memory.load, path)
    refused("empty", model.contextualize, torch.zeros(1, 0, dtype=torch.long))
    refused("takes token ids", model.read, "a text")
    refused("right", model.contextualize, tokens(1, 4), torch.tensor([[0, 1, 1, 1]]), kind=ValueError)
    assert model.read(tokens(600)).tokens.tolist() == [600]
    model.export_peft(memory, tmp_path / "peft")
    refused("holds files already", model.export_peft, memory, tmp_path / "peft")
