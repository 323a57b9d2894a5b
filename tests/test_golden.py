"""Parity with the released code: tensors it produced on tiny models (tests/golden), reached through its own checkpoint
format."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, MistralConfig, MistralForCausalLM

from generator import InputError
from model import AdaptedLM
from support import formats
from support.formats import checkpoint_base

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
INDEX = json.load(open(os.path.join(GOLDEN, "index.json")))
INPUTS = {name: t.long() for name, t in load_file(os.path.join(GOLDEN, "inputs.safetensors")).items()}
OURS = {"A1": "B2", "A2": "B1", "A3": "A2", "B": "A1", "hidden_state_norm": "g"}
DOUBLED = [*range(8), *range(1, 9)]


def golden_model(case):
    arch = case.split("_")[0]
    config = dict(INDEX["bases"][arch])
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config), dtype=torch.float32)
    base.load_state_dict(load_file(os.path.join(GOLDEN, f"base_{arch}.safetensors")))
    base.name_or_path = f"tiny-random-{arch}"
    directory = os.path.join(GOLDEN, f"ckpt_{arch}_o")
    assert checkpoint_base(directory) == base.name_or_path
    model = AdaptedLM.from_pretrained(base, directory)
    assert (model.config.norm, model.config.rank, model.config.scale, model.config.damping) == ("svd", 8, 0.5, 0.0)
    # the golden cases were run with these norms in place of the checkpoint's own
    model.config.norm = "frobenius" if case.endswith("frob") else "svd-exact"
    model.config.rank = INDEX["cases"][case]["rank"]
    return model, load_file(os.path.join(GOLDEN, f"case_{case}.safetensors"))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case, batch", [(case, "b1") for case in INDEX["cases"]]
                         + [(case, "b2") for case in INDEX["cases"] if "mistral" in case])
def test_inference(case, batch, plain):
    """Chunk-parallel logits, S_1 .. S_3 of the streamed context and the adapted query; b2 has a right-padded chunk."""
    model, golden = golden_model(case)
    model.plain = plain
    context, mask, query = INPUTS[f"ctx_{batch}"], INPUTS[f"ctx_{batch}_mask"], INPUTS[f"query_{batch}"]
    with torch.no_grad():
        logits = model.forward_segments(context, mask, [0, 1, 2])
        torch.testing.assert_close(logits[mask.bool()], golden[f"{batch}/default_logits"][mask.bool()], atol=1e-4,
                                   rtol=0)
        memory = None
        for t in range(3):
            memory = model.contextualize(context[:, t], mask[:, t], memory)
            for l in range(3):
                theirs = golden[f"{batch}/S/L{l}.o_proj"][t]                       # their rows are our columns
                ours = memory.states[f"model.layers.{l}.self_attn.o_proj"].mT
                assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        torch.testing.assert_close(model(query, memory=memory), golden[f"{batch}/query_logits"], atol=1e-4, rtol=0)
    if batch == "b1":
        new = model.generate(query, memory, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, query.shape[1]:]
        assert new.tolist() == golden["b1/greedy_ids"].tolist()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", INDEX["cases"])
def test_doubled_sequence(case, plain):
    """The loss, averaged the authors' way (one token mean over all 16 segments), and its gradients."""
    model, golden = golden_model(case)
    model.plain = plain
    facts = INDEX["cases"][case]
    for data in ("copy", "windows"):
        ids, mask, labels = (INPUTS[f"train{facts['segment_length']}_{data}_{part}"]
                             for part in ("input_ids", "attention_mask", "labels"))
        model.zero_grad()
        nats, count = model.segment_losses(ids, mask, DOUBLED, labels)
        loss = nats.sum() / count.sum()
        assert abs(loss.item() - facts[f"{data}_loss"]) < 1e-5
        if data == facts["gradients"]:
            loss.backward()
            prefix = f"train/abcdabcd/{data}/grad/L"
            compared = 0
            for name in golden:
                if name.startswith(prefix):
                    layer, part = name[len(prefix):].split(".o_proj.fastlora_")
                    grad = getattr(model.generator.by_name[f"model.layers.{layer}.self_attn.o_proj"], OURS[part]).grad
                    grad = grad.T if part == "A2" else grad
                    assert (grad - golden[name]).norm() < 1e-3 * golden[name].norm(), name
                    compared += 1
            assert compared == 15


def test_checkpoint_of_the_hub(monkeypatch, capsys):
    """A hub id is downloaded, configs and safetensors alone; what was read from it is said."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **options: asked.append(options) or os.path.join(GOLDEN, "ckpt_llama_o"))
    values, tensors, base_name = formats.read_generator("owner/Generative-Adapter-v0.2")
    assert (values["scale"], len(tensors), base_name) == (0.5, 15, "tiny-random-llama")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked[0]["allow_patterns"])
    assert "'base': 'tiny-random-llama'" in capsys.readouterr().out
    for name in ("../up/there", "owner//name"):
        with pytest.raises(InputError, match="not a hub id"):
            formats.locate_checkpoint(name)


def test_published_checkpoint_dry_run(monkeypatch):
    """A checkpoint of the shape of the authors' Mistral-7B one, on the meta device: its adapter is the
    paper's 32 M floats."""
    with torch.device("meta"):
        base = MistralForCausalLM(MistralConfig(vocab_size=32000))
        shapes = {"A1": (1024, 4096), "A2": (1024, 4096), "A3": (1024, 4096), "B": (4096, 1024),
                  "hidden_state_norm": (4096,)}
        theirs = {}
        for l in range(32):
            for part, shape in shapes.items():
                theirs[f"base_model.model.model.layers.{l}.base_layer.self_attn.o_proj.fastlora_{part}.weight"] = (
                    torch.empty(shape, dtype=torch.bfloat16))
    base.name_or_path = "mistralai/Mistral-7B-Instruct-v0.2"
    config = {"peft_type": "FASTLORA", "base_model_name_or_path": base.name_or_path, "fastlora_r": 1024,
              "fastlora_inter_size": None, "fastlora_max_rank": 128, "fastlora_alpha": 64, "fastlora_norm": "svd",
              "fastlora_merge": "pre-norm-sum"}
    monkeypatch.setattr(formats, "read_json", lambda path: config)
    monkeypatch.setattr(formats, "read_safetensors", lambda path: (theirs, {}))
    model = AdaptedLM.from_pretrained(base, os.path.join(GOLDEN, "ckpt_mistral_o"))
    assert (model.config.d_r, model.config.rank, model.config.scale, model.config.damping,
            model.config.targets) == (1024, 128, 1 / 16, 0.0, ["o_proj"])
    assert sum(p.numel() for p in model.generator.parameters()) == 32 * (4 * 1024 * 4096 + 4096)
    pairs = [layer.adapter(torch.empty(1, 1024, 1024, device="meta")) for layer in model.generator.layers]
    assert sum(A.numel() + B.numel() for A, B in pairs) == 32 * 128 * 8192                       # appendix B: 32 M
