"""support/fast.py against the plain forms of generator.py and model.py: values to 1e-5, gradients to 1e-4."""

import pytest
import torch

from conftest import make_base, make_model, tokens
from support import fast


def close(got, want, tolerance):
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12, ((got - want).norm() / want.norm()).item()


# segments (B, N, L), visible, lengths of each row's segments (None: no padding)
PASSES = {"doubled": ((2, 6, 30), [0, 1, 2, 1, 2, 3], None),
          "one chunk": ((3, 2, 30), [0, 1], None),
          "completion": ((2, 3, 30), [0, 1, 2], None),
          "read apart": ((2, 4, 30), [0, 0, 2, 2], None),
          "nothing adapted": ((2, 2, 30), [0, 0], None),
          "everything adapted": ((2, 2, 30), [1, 2], None),
          "right padding": ((2, 4, 34), [0, 1, 2, 3], [[30, 30, 28, 20], [30, 27, 30, 9]]),
          "chunks of padding": ((2, 5, 40), [0, 1, 2, 3, 4], [[30, 29, 0, 0, 12], [30, 30, 0, 0, 7]]),
          "a row of padding": ((2, 3, 34), [0, 1, 2], [[30, 25, 9], [30, 0, 12]])}


@pytest.mark.parametrize("name", PASSES)
def test_pass_and_loss(name, monkeypatch):
    """nats, target counts and the gradient of every weight of the generator; labels at random places, more than one
    piece of the loss holds."""
    monkeypatch.setattr(fast, "LOSS_ROWS", 16)
    shape, visible, lengths = PASSES[name]
    segments = tokens(*shape)
    mask, labels = None, segments.clone()
    if lengths is not None:
        mask = (torch.arange(shape[2]) < torch.tensor(lengths)[:, :, None]).long()
        labels = labels.masked_fill(mask == 0, -100)
    labels = labels.masked_fill(tokens(*shape, seed=1) < 100, -100)
    weights = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2))
    results = []
    for plain, checkpointing in ((True, 0), (False, 0), (False, 2)):
        model = make_model(rank=24, targets=["o_proj", "down_proj"])
        model.plain, model.checkpointing = plain, checkpointing
        nats, count = model.segment_losses(segments, mask, visible, labels)
        if nats.requires_grad:
            (nats * weights).sum().backward()
        results.append((nats.detach(), count, [p.grad for p in model.generator.parameters()]))
    (want_nats, want_count, want_grads), *fast_results = results
    for nats, count, grads in fast_results:
        assert torch.equal(count, want_count) and count.sum() > 20
        close(nats, want_nats, 1e-5)
        compared = 0
        for got, want in zip(grads, want_grads):
            if want is not None and want.any():
                close(got, want, 1e-4)
                compared += 1
        assert compared == (0 if name == "nothing adapted" else len(grads))


def test_rank_is_cut_to_the_tokens_read():
    """At no loss: S of 6 tokens has rank 6."""
    layer = make_model(rank=24).generator.layers[0]
    h = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    S = layer.update(h)
    lora_A, lora_B = fast.adapter(layer, S, tokens=6)
    assert lora_A.shape[1] == 6
    whole_A, whole_B = layer.adapter(S)
    close(lora_B @ lora_A, whole_B @ whole_A, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_base_stays_the_base(kind):
    """In bf16, where a fused norm rounds otherwise: bit for bit the same before and after it is wrapped and trained
    through, wherever no adapter is active. S is fp32 all the same."""
    ids = tokens(2, 30)
    base = make_base(kind).bfloat16()
    with torch.no_grad():
        before = base(ids).logits
    model = make_model(base=base)
    nats, _ = model.segment_losses(tokens(2, 2, 30), None, [0, 1], tokens(2, 2, 30))
    nats.sum().backward()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before) and torch.equal(model(ids), before)
    want = make_model(kind).contextualize(ids).states
    for name, S in model.contextualize(ids).states.items():
        assert S.dtype == torch.float32
        close(S, want[name], 0.05)
