"""A rehearsal of a GPU where there is none: meta tensors, which refuse to meet tensors of values, and the count of what
a training step does."""

import pytest
import torch

import generator
from conftest import make_base, make_model
from count import on_meta
from generator import Memory


@pytest.mark.parametrize("dtype, blocks", [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 2)])
def test_backward_on_meta(dtype, blocks, monkeypatch):
    """Forward and backward of a step, checkpointed or not, then reading and answering: every parameter gets an fp32
    gradient, and no tensor of values is met on the way."""
    monkeypatch.setattr(generator.AdapterGenerator, "fingerprint", lambda self: "of no values")
    model = make_model(base=make_base().to(dtype)).to("meta")
    model.checkpointing = blocks
    segments = torch.zeros(2, 4, 8, dtype=torch.long, device="meta")
    with on_meta(targets=2 * 4 * 7):
        nll, count = model.segment_losses(segments, None, [0, 1, 2, 2], segments)
        nll.sum().backward()
        memory = model.contextualize(segments[:, 1], memory=model.contextualize(segments[:, 0]))
        both = Memory.stack([memory, memory + memory])
        logits = model(segments[:, :2].flatten(0, 1), memory=both)
        assert all(t.is_meta for t in (nll, count, logits, *both.states.values())) and logits.dtype == dtype
    assert {(p.grad.device.type, p.grad.dtype) for p in model.generator.parameters()} == {("meta", torch.float32)}


def test_count_of_a_step_is_that_of_a_real_one():
    """FLOPs of the matrix products on meta against torch's profiler over the same step on the CPU."""
    model, segments = make_model(), torch.zeros(2, 4, 8, dtype=torch.long)
    with torch.profiler.profile(with_flops=True) as real:
        model.segment_losses(segments, None, [0, 1, 2, 2], segments)[0].sum().backward()
    model = model.to("meta")
    with on_meta(targets=2 * 4 * 7) as counted:
        model.segment_losses(segments.to("meta"), None, [0, 1, 2, 2], segments.to("meta"))[0].sum().backward()
    products = sum(row[1] for kind, row in counted.rows.items() if kind.endswith("products"))
    assert products == sum(event.flops for event in real.events() if event.name in ("aten::mm", "aten::bmm")) > 0
