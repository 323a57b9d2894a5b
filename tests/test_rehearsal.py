"""A rehearsal of a GPU where there is none: meta tensors, which refuse to meet tensors of values, and the count of what
a training step does."""

import pytest
import torch

import generator
from conftest import make_base, make_model
from count import Counter, on_meta
from generator import Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [0, 2])
def test_backward_on_meta(dtype, blocks, monkeypatch):
    """Forward and backward of a step, checkpointed or not, then reading and answering: every parameter gets an fp32
    gradient, and no tensor of values is met on the way."""
    monkeypatch.setattr(generator.AdapterGenerator, "fingerprint", lambda self: "of no values")
    model = make_model(base=make_base().to(dtype)).to("meta")
    model.checkpointing = blocks
    segments = torch.zeros(2, 4, 8, dtype=torch.long, device="meta")
    with on_meta(targets=2 * 4 * 7):
        nll, count = model.segment_losses(segments, None, [0, 1, 2, 2])
        nll.sum().backward()
        memory = model.contextualize(segments[:, 1], memory=model.contextualize(segments[:, 0]))
        both = Memory.stack([memory, memory + memory])
        logits = model(segments[:, :2].flatten(0, 1), memory=both)
        assert all(t.is_meta for t in (nll, count, logits, *both.states.values())) and logits.dtype == dtype
    assert {(p.grad.device.type, p.grad.dtype) for p in model.generator.parameters()} == {("meta", torch.float32)}


def test_counter():
    """By hand: FLOPs, bytes, kernels and peak of a few operations, and what a view or a freed tensor costs."""
    x, w = torch.empty(10, 20, device="meta"), torch.empty(20, 30, device="meta")
    with Counter(targets=7) as counter:
        y = x @ w                                               # reads 200 + 600 floats, writes 300
        z = y.view(300)[:100].clone()                           # reads 100, writes 100
        del y
        z.mul_(2), z.view(50, 2).t(), torch.empty_like(x)       # reads 100, writes 100
        found = (z > 0).nonzero()                               # 100 floats, 100 bytes; those again, 7 longs
    assert found.shape == (7, 1)
    assert dict(counter.rows)["float32 products"][:3] == [1, 2 * 10 * 20 * 30, 4 * 1100]
    assert dict(counter.rows)["elementwise"][:3] == [4, 0, 4 * 200 + 4 * 200 + (400 + 100) + (100 + 56)]
    assert counter.peak == 4 * (300 + 100) and counter.live == 4 * 100 + 56


def test_count_of_a_step_is_that_of_a_real_one():
    """FLOPs of the matrix products on meta against torch's profiler over the same step on the CPU."""
    model, segments = make_model(), torch.zeros(2, 4, 8, dtype=torch.long)
    with torch.profiler.profile(with_flops=True) as real:
        model.segment_losses(segments, None, [0, 1, 2, 2])[0].sum().backward()
    model = model.to("meta")
    with on_meta(targets=2 * 4 * 7) as counted:
        model.segment_losses(segments.to("meta"), None, [0, 1, 2, 2])[0].sum().backward()
    products = sum(row[1] for kind, row in counted.rows.items() if kind.endswith("products"))
    assert products == sum(event.flops for event in real.events() if event.name in ("aten::mm", "aten::bmm")) > 0
