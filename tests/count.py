"""A training step counted, not run: FLOPs by kind, bytes moved, kernels launched and peak bytes, on meta tensors.
`python tests/benchmark.py --count` prints it."""

import contextlib
import weakref
from collections import defaultdict
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from data import doubled

# What an H100 (SXM, 80 GB) is taken to give. Data sheet: 989 TFLOP/s in bf16, 494 in TF32, 67 in fp64, 3.35 TB/s.
# Assumed: products reach SHARES of the first three, attention half as much, copies 85 % of the bandwidth; a kernel
# takes 6 us at least (eager launches), a factorisation or triangular solve of r x r matrices 200 us.
PEAK = {"bfloat16 products": 989e12, "float32 products": 494e12, "float64 products": 67e12, "attention": 989e12 / 2}
SHARES = (0.5, 0.6, 0.7)
BANDWIDTH = 0.85 * 3.35e12
LAUNCH, FACTORISATION = 6e-6, 200e-6
NVLINK = 450e9              # bytes/s of an all_reduce

aten = torch.ops.aten
FACTORISATIONS = (aten.linalg_cholesky_ex, aten.linalg_solve_triangular, aten.triangular_solve)
LOOKUPS = (aten.embedding, aten.index, aten.gather, aten.index_select)      # read as much as they write


class Counter(TorchDispatchMode):
    """Counts what every operation under it would do on a GPU. A view costs nothing; any other operation is a kernel
    that reads its inputs and writes its outputs once. targets: how many elements a nonzero finds, which meta tensors
    cannot tell. rows: {kind: [kernels, FLOPs, bytes, seconds at each of SHARES]}; live and peak: bytes of the tensors
    that exist."""

    def __init__(self, targets):
        super().__init__()
        self.targets = targets
        self.rows = defaultdict(lambda: [0] * (3 + len(SHARES)))
        self.live = self.peak = 0
        self.known = set()

    def own(self, tensors):
        """Count these tensors as live until they are freed."""
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten.nonzero.default:
            out = args[0].new_empty(self.targets, args[0].dim(), dtype=torch.long)
        else:
            out = function(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.own(outputs)
        read = {t.untyped_storage()._cdata for t in inputs}
        view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in read for t in outputs)
        packet = function.overloadpacket
        if view or "empty" in packet.__name__:
            return out
        kind, flops, least = "elementwise", 0, LAUNCH
        moved = sum(size(t) for t in inputs + outputs)
        if packet in LOOKUPS:
            moved = sum(2 * size(t) for t in outputs)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            kind = f"{str(inputs[0].dtype)[6:]} products"
        if "attention" in packet.__name__:
            kind, flops = "attention", flops / 2                            # causal
        if packet in FACTORISATIONS:
            kind, least = "factorisations", FACTORISATION
        row = self.rows[kind]
        for i, amount in enumerate((1, flops, moved)):
            row[i] += amount
        for i, share in enumerate(SHARES, 3):
            row[i] += max(least, moved / BANDWIDTH, flops and flops / (share * PEAK[kind]))
        return out

    def total(self, k):
        return sum(row[k] for row in self.rows.values())


def size(t):
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


# ---- what CUDA runs, on tensors that are not there


class FusedRMSNorm(torch.autograd.Function):
    """Each way one operation that moves what torch's CUDA kernel moves; its values mean nothing."""

    @staticmethod
    def forward(ctx, H, weight):
        ctx.save_for_backward(H, weight, H.new_empty(H.shape[:-1], dtype=torch.float32))
        return H * weight

    @staticmethod
    def backward(ctx, grad):
        H, weight, _ = ctx.saved_tensors
        return torch.addcmul(grad, H, weight), None


def rms_norm(H, normalized_shape, weight=None, eps=None):
    return FusedRMSNorm.apply(H, H.new_empty(normalized_shape) if weight is None else weight)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert attn_mask is None and is_causal, "a mask would keep the flash kernel out"
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


@contextlib.contextmanager
def on_meta(targets):
    """Run a model of meta tensors as on CUDA, counted; yields the Counter. Transformers looks at the values of the
    positions, which count up from 0."""
    tf32 = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"                # as train.py sets it: the norm avoids it
    try:
        with (mock.patch.object(F, "rms_norm", rms_norm),
              mock.patch.object(F, "scaled_dot_product_attention", attention),
              mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
              Counter(targets) as counter):
            yield counter
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = tf32


def own_base(counter, base, shards, copies):
    """Count `copies` of the weights (with gradients and moments 4) as live: whole, or of the blocks one of `shards`
    shares and a few whole: one computed, one on its way, one being laid out, and, trained, the gradients of two."""
    blocks = list(base.get_decoder().layers.parameters())
    counter.known |= {p.untyped_storage()._cdata for p in base.parameters()}
    size = base.dtype.itemsize
    sharded = size * sum(p.numel() for p in blocks)
    counter.live += copies * (size * sum(p.numel() for p in base.parameters()) - sharded)
    counter.live += copies * sharded // shards
    if shards > 1:
        counter.live += (3 if copies == 1 else 5) * sharded // len(base.get_decoder().layers)


def report_fine_tuning(base, tokens, shards):
    """Print the peak of fine-tuning the whole base, by AdamW and passes of so many tokens (extras/finetune.py), with no
    block recomputed and with all."""
    base.requires_grad_(True)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    for n in (0, len(base.get_decoder().layers)):
        for block in base.get_decoder().layers[:n]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for p in base.parameters():
            p.grad = torch.zeros_like(p)
        with on_meta(tokens) as one_pass:
            one_pass.known |= {p.grad.untyped_storage()._cdata for p in base.parameters()}
            own_base(one_pass, base, shards, copies=4)
            hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            logits = base.get_output_embeddings()(hidden)[0].float()                                # (L, V)
            F.cross_entropy(logits, ids[0]).backward()
        print(f"counted, not measured: fine-tuning {type(base).__name__}, {str(base.dtype)[6:]}, on {shards} devices, "
              f"{n} blocks recomputed: peak {one_pass.peak / 1e9:.3g} GB each")


def report(model, batch, C, L, checkpointing, shards):
    """Print what a pass over `batch` sequences of C chunks of L tokens counts: forward alone; forward and backward with
    no block recomputed, with the first `checkpointing` and with all; and tokens/s of steps of eight such passes and
    what comes once a step, clipping and AdamW (train.py), on one H100 or on eight. Of a base in several shards
    (--shard) the memory alone counts: what the gathering takes is left out."""
    print(f"counted, not measured: {type(model.base).__name__}, {str(model.base.dtype)[6:]}, in {shards} shards, a "
          f"pass of {batch} x {C} x {L} tokens; seconds at {SHARES[1]:.0%} of the products' peak")
    segments, _, visible, _ = doubled(torch.zeros(batch, C * L, dtype=torch.long, device="meta"), C)   # (B, 2C, L)
    labels = segments.clone()
    labels[:, 0] = -100                                                 # segment 0, without an adapter, has no weight
    parameters = list(model.generator.parameters())
    gradients, moments, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
    steps = [torch.zeros((), device="meta") for _ in parameters]
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
    with on_meta(0) as once:
        for layer in model.generator.layers:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        torch._fused_adamw_(parameters, gradients, moments, squares, [], steps, lr=1e-4, beta1=0.9, beta2=0.999,
                            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
        torch._foreach_zero_(gradients)
    reduce = 2 * 7 / 8 * 4 * sum(p.numel() for p in parameters) / NVLINK
    targets = batch * (2 * C - 1) * (L - 1)
    with torch.no_grad(), on_meta(targets) as forward:
        model.segment_losses(segments, None, visible, labels)
    print(f"forward alone, as validation runs it: {forward.total(4):.3f} s")
    for n in sorted({0, min(checkpointing, len(model.blocks)), len(model.blocks)}):
        model.checkpointing = n
        with on_meta(targets) as one_pass:
            own_base(one_pass, model.base, shards, copies=1)
            one_pass.own([*parameters, *gradients, *moments, *squares])
            model.segment_losses(segments, None, visible, labels)[0].sum().backward()
        print(f"\n{n} blocks recomputed: peak {one_pass.peak / 1e9:.3g} GB, {one_pass.total(1) / 1e12:.4g} TFLOP and "
              f"{one_pass.total(2) / 1e9:.4g} GB moved a pass; once a step {once.total(4):.4f} s")
        for kind, (kernels, flops, moved, _, seconds, _) in sorted(one_pass.rows.items()):
            print(f"    {kind:18s}{kernels:7,} kernels{flops / 1e12:10.4g} TFLOP{moved / 1e9:10.4g} GB{seconds:9.4f} s")
        for i, share in enumerate(SHARES, 3):
            one = 8 * batch * C * L / (8 * one_pass.total(i) + once.total(i))
            eight = 8 * batch * C * L / (one_pass.total(i) + once.total(i) + reduce)
            print(f"    at {share:.0%} of the peak: {one:,.0f} tokens/s, on eight {eight:,.0f}")
