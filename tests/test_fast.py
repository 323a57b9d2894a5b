"""support/fast.py against the plain forms of generator.py and model.py: the same values to 1e-5 and gradients to 1e-4."""

import pytest
import torch
import torch.nn.functional as F

from conftest import make_base, make_model, tokens
from generator import norm
from support import fast


def close(got, want, tolerance):
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12, ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3])
def test_norm(damping):
    """Values and gradients at rank = d_r: norm truncates nothing, the sketch is exact, and all sigma are different. Of a
    short context, rank(S) <= r < d_r, the same value at any rank that holds it."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(3, 40, 16, generator=random, dtype=torch.float64)
    S = h.mT @ torch.randn(3, 40, 16, generator=random, dtype=torch.float64)
    G = torch.randn(3, 16, 16, generator=random, dtype=torch.float64)
    results = []
    for function in (norm, fast.svd_norm):
        leaf = S.clone().requires_grad_()
        left, right = function(leaf, 16, damping)
        (left @ right * G).sum().backward()
        results.append(((left @ right).detach(), leaf.grad))
    close(results[1][0], results[0][0], 1e-6)
    close(results[1][1], results[0][1], 1e-5)
    S = torch.randn(2, 32, 6, generator=random) @ torch.randn(2, 6, 32, generator=random)
    for rank in (6, 8, 32):
        close(torch.matmul(*fast.svd_norm(S, rank, damping)), torch.matmul(*norm(S, 8, damping)), 1e-5)


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


@pytest.mark.parametrize("checkpointing", [0, 2])
@pytest.mark.parametrize("name", PASSES)
def test_pass_and_loss(name, checkpointing):
    """nats, target counts and the gradient of every weight of the generator; labels at random places."""
    shape, visible, lengths = PASSES[name]
    segments = tokens(*shape)
    mask, labels = None, segments.clone()
    if lengths is not None:
        mask = (torch.arange(shape[2]) < torch.tensor(lengths)[:, :, None]).long()
        labels = labels.masked_fill(mask == 0, -100)
    labels = labels.masked_fill(tokens(*shape, seed=1) < 100, -100)
    weights = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2))
    results = []
    for plain in (True, False):
        model = make_model(rank=24, targets=["o_proj", "down_proj"])
        model.plain, model.checkpointing = plain, checkpointing
        nats, count = model.segment_losses(segments, mask, visible, labels)
        if nats.requires_grad:
            (nats * weights).sum().backward()
        results.append((nats.detach(), count, [p.grad for p in model.generator.parameters()]))
    (nats, count, grads), (fast_nats, fast_count, fast_grads) = results
    assert torch.equal(count, fast_count) and count.sum() > 20
    close(fast_nats, nats, 1e-5)
    compared = 0
    for got, want in zip(fast_grads, grads):
        if want is not None and want.any():
            close(got, want, 1e-4)
            compared += 1
    assert compared == (0 if name == "nothing adapted" else len(grads))


@torch.no_grad()
def test_forward_segments_where_nothing_is_padding():
    """The logits of every segment, and memories: read, adapted, generated from."""
    model, segments = make_model(rank=24), tokens(2, 4, 30)
    results = []
    for plain in (True, False):
        model.plain = plain
        logits = model.forward_segments(segments, None, [0, 1, 1, 2])
        memory = model.contextualize(segments[:, 1], memory=model.contextualize(segments[:, 0]))
        results.append((logits, model(segments[:, 2], memory=memory)))
    for got, want in zip(results[1], results[0]):
        close(got, want, 1e-5)


def test_rank_is_cut_to_the_tokens_read():
    """At no loss: S of 6 tokens has rank 6."""
    layer = make_model(rank=24).generator.layers[0]
    h = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    S = layer.update(h)
    lora_A, lora_B = fast.adapter(layer, S, tokens=6)
    assert lora_A.shape[1] == 6
    whole_A, whole_B = layer.adapter(S)
    close(lora_B @ lora_A, whole_B @ whole_A, 1e-5)


def test_losses_against_cross_entropy():
    """More targets than one piece holds; the gradient by the hidden states."""
    random = torch.Generator().manual_seed(0)
    lm_head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(2, 3, 400, 16, generator=random)
    labels = torch.randint(0, 50, (2, 3, 400), generator=random)
    labels[torch.rand(labels.shape, generator=random) < 0.3] = -100
    leaf, plain_leaf = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    nats, count = fast.losses(lm_head, leaf, labels)
    want = F.cross_entropy(lm_head(plain_leaf)[:, :, :-1].flatten(0, 2), labels[:, :, 1:].flatten(), reduction="none",
                           ignore_index=-100)
    torch.testing.assert_close(nats, want.view(2, 3, 399).sum(-1))
    assert torch.equal(count, (labels[:, :, 1:] != -100).sum(-1)) and count.sum() > fast.LOSS_ROWS
    nats.sum().backward()
    want.sum().backward()
    close(leaf.grad, plain_leaf.grad, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_the_base_stays_the_base(kind):
    """In bf16, where a fused norm rounds otherwise: bit for bit the same before and after it is wrapped and trained
    through, wherever no adapter is active."""
    ids = tokens(2, 30)
    base = make_base(kind).bfloat16()
    with torch.no_grad():
        before = base(ids).logits
    model = make_model(base=base)
    nats, _ = model.segment_losses(tokens(2, 2, 30), None, [0, 1])
    nats.sum().backward()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before) and torch.equal(model(ids), before)
