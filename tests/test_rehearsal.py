"""A rehearsal of CUDA where there is none: tensors that are on a GPU in name, meta tensors for the backward pass, and
the norm that svd_norm takes there, in a whole training step on the CPU."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

import generator
import train
from conftest import make_base, make_model
from count import Counter, matmul_norm, on_meta
from generator import Memory
from test_train import command

CUDA = torch.device("cuda:0")


class WithoutDeviceGuard(TorchFunctionMode):
    """Three functions that ask for a CUDA build even on fake tensors, put as those that do not. Every label is a
    target: how many there are is not known of a tensor without values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        x = args[0] if args else None
        if function is torch.Tensor.contiguous:
            return x.clone(memory_format=torch.contiguous_format)
        if function is torch.Tensor.nonzero:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.long)
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        index, dim, at = list(args[1]) if isinstance(args[1], tuple) else [args[1]], 0, []
        if any(i is Ellipsis for i in index):
            k = [i is Ellipsis for i in index].index(True)
            index[k:k + 1] = [slice(None)] * (x.dim() + 1 - sum(i is not None for i in index))
        for i in index:
            if isinstance(i, int):
                x = x.select(dim, i)
                continue
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, slice):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
            at.append(None if i is None or isinstance(i, slice) else torch.as_tensor(i, device=x.device))
            dim += 1
        return x if all(i is None for i in at) else torch.ops.aten.index(x, at)


@torch.no_grad()
def test_forward_on_fake_cuda(monkeypatch):
    """Reading, adding and stacking memories, answering, the losses and an optimiser step: on the GPU to the end, by
    MatmulNorm, and an error where a tensor stays behind. (Torch builds without CUDA have no backward pass there.)"""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(generator.AdapterGenerator, "fingerprint", lambda self: "of no values")
    monkeypatch.setattr(generator, "SpectralNorm", None)
    generator.sketch.cache_clear()
    fake, model = FakeTensorMode(), make_model(base=make_base(num_hidden_layers=2).to(torch.bfloat16))
    model._apply(lambda t: FakeTensor(fake, t.to("meta"), CUDA))
    with fake, WithoutDeviceGuard():
        segments = torch.zeros(2, 4, 8, dtype=torch.long, device=CUDA)
        nats, count = model.segment_losses(segments, None, [0, 1, 2, 2])
        memory = model.contextualize(segments[:, 1], memory=model.contextualize(segments[:, 0]))
        both = Memory.stack([memory, memory + memory])
        logits = model(segments[:, :2].flatten(0, 1), memory=both)
        parameters = list(model.generator.parameters())
        flat = torch.zeros(sum(p.numel() for p in parameters), device=CUDA)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.optim.AdamW(parameters, fused=True).step()
        assert all(t.device == CUDA for t in (nats, count, logits, *both.states.values()))
        assert logits.dtype == torch.bfloat16 and nats.dtype == torch.float32
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            model(torch.zeros(2, 8, dtype=torch.long))
    generator.sketch.cache_clear()                          # it holds a fake tensor now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [0, 2])
def test_backward_on_meta(dtype, blocks):
    """Forward and backward of a step, checkpointed or not, as on CUDA: every parameter gets an fp32 gradient, and no
    tensor of values is met on the way."""
    model = make_model(base=make_base().to(dtype)).to("meta")
    model.checkpointing = blocks
    with on_meta(targets=2 * 4 * 7):
        nats, _ = model.segment_losses(torch.zeros(2, 4, 8, dtype=torch.long, device="meta"), None, [0, 1, 2, 2])
        nats.sum().backward()
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
    with torch.profiler.profile(with_flops=True) as real, mock.patch.object(generator, "svd_norm", matmul_norm):
        model.segment_losses(segments, None, [0, 1, 2, 2])[0].sum().backward()
    model = model.to("meta")
    with on_meta(targets=2 * 4 * 7) as counted:
        model.segment_losses(segments.to("meta"), None, [0, 1, 2, 2])[0].sum().backward()
    products = sum(row[1] for kind, row in counted.rows.items() if kind.endswith("products"))
    assert products == sum(event.flops for event in real.events() if event.name in ("aten::mm", "aten::bmm")) > 0


@pytest.mark.parametrize("flags", [(), ("--checkpointing", "2")], ids=["plain", "checkpointing"])
def test_training_step_by_matrix_products(tmp_path, base_directory, text_file, monkeypatch, flags):
    """Two steps of train.py with the norm of CUDA against the same with the spectral norm; 2 chunks of 16 tokens, so
    that rank(S) <= r = 32. The reduced, clipped gradient of the first step is ten times its first moment."""
    monkeypatch.setattr("data.CACHE", str(tmp_path / "cache"))
    spectral, logs = generator.svd_norm, []
    for name, norm in (("spectral", spectral), ("matmul", matmul_norm)):
        monkeypatch.setattr(generator, "svd_norm", norm)
        line = command(base_directory, text_file, tmp_path / name, "--d-r", "48", "--rank", "32", "--steps", "2",
                       "--save-every", "1", *flags)
        train.train(train.arguments(line[1:]))
        logs.append([json.loads(row) for row in open(tmp_path / name / "log.jsonl")])
    assert logs[0] != logs[1]
    for ours, theirs in zip(*logs):
        for key in ("reconstruction", "completion"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "step-000001" / "optimizer.safetensors")
                    for name in ("matmul", "spectral"))
    for name in (name for name in ours if name.startswith("exp_avg/")):
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
    assert logs[0][1]["reconstruction"] != logs[0][0]["reconstruction"]
