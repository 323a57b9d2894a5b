"""A training step counted, not run: FLOPs by kind, bytes moved, kernels launched and peak bytes, on meta tensors.
`python tests/benchmark.py --count` prints it."""

import contextlib
import math
import weakref
from collections import defaultdict
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data import doubled

# What an H100 (SXM, 80 GB) is taken to give. Data sheet: 989 TFLOP/s in bf16, 494 in TF32, 67 in fp64, 3.35 TB/s.
# Assumed: products reach SHARES of the first three, attention half as much, copies 85 % of the bandwidth; a kernel
# takes 6 us at least (eager launches), a factorisation or triangular solve of r x r matrices 200 us.
PEAK = {"bfloat16 products": 989e12, "float32 products": 494e12, "float64 products": 67e12, "attention": 989e12 / 2}
SHARES, BANDWIDTH, LAUNCH, FACTORISATION = (0.5, 0.6, 0.7), 0.85 * 3.35e12, 6e-6, 200e-6
NVLINK, FITS = 450e9, 72e9              # bytes/s of an all_reduce; of 80 GB, a tenth is left for CUDA and fragmentation

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
        self.targets, self.live, self.peak, self.known = targets, 0, 0, set()
        self.rows = defaultdict(lambda: [0] * (3 + len(SHARES)))

    def own(self, tensors):
        """Count these tensors as live until they are freed."""
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.nonzero.default:
            out = args[0].new_empty(self.targets, args[0].dim(), dtype=torch.long)
        else:
            out = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        self.own(outputs)
        read = {t.untyped_storage()._cdata for t in inputs}
        view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in read for t in outputs)
        packet = function.overloadpacket
        if not view and "empty" not in packet.__name__:
            moved = [2 * size(t) for t in outputs] if packet in LOOKUPS else map(size, inputs + outputs)
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
            if "attention" in packet.__name__:
                kind, flops = "attention", flops / 2                        # causal
            else:
                kind = f"{str(inputs[0].dtype)[6:]} products" if flops else "elementwise"
                kind = "factorisations" if packet in FACTORISATIONS else kind
            moved, least = sum(moved), FACTORISATION if kind == "factorisations" else LAUNCH
            seconds = [max(least, moved / BANDWIDTH, flops and flops / (share * PEAK[kind])) for share in SHARES]
            self.rows[kind] = [a + b for a, b in zip(self.rows[kind], (1, flops, moved, *seconds))]
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
    patches = (mock.patch.object(F, "rms_norm", rms_norm), mock.patch.object(F, "scaled_dot_product_attention", attention),
               mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            yield stack.enter_context(Counter(targets))
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = tf32


def training_step(model, batch, C, L, checkpointing):
    """Two Counters of a model on meta: one pass over `batch` sequences of C chunks of L tokens, forward and backward,
    and what comes once a step, clipping and AdamW (train.py)."""
    model.checkpointing, parameters = checkpointing, list(model.generator.parameters())
    segments, _, visible, _ = doubled(torch.zeros(batch, C * L, dtype=torch.long), C)                  # (B, 2C, L)
    segments = segments.to("meta")
    labels = torch.cat([torch.full_like(segments[:, :1], -100), segments[:, 1:]], 1)        # segment 0 has no weight
    with on_meta(batch * (2 * C - 1) * (L - 1)) as one_pass:
        one_pass.own(model.base.parameters())
        one_pass.own(parameters)
        flat, moments = (torch.zeros(n * sum(p.numel() for p in parameters), device="meta") for n in (1, 2))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
        one_pass.rows.clear()
        nats, _ = model.segment_losses(segments, None, visible, labels)
        nats.sum().backward()
    with on_meta(0) as once:
        for layer in model.generator.layers:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        exp_avg, exp_avg_sq = ([m.view_as(p) for m, p in zip(half.split([p.numel() for p in parameters]), parameters)]
                               for half in moments.chunk(2))
        steps = [torch.zeros((), device="meta") for _ in parameters]
        torch._fused_adamw_(parameters, [p.grad for p in parameters], exp_avg, exp_avg_sq, [], steps, lr=1e-4,
                            beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
        flat.zero_()
    for p in parameters:
        p.grad = None
    return one_pass, once


def report(model, batch, C, L, checkpointing):
    """Print what a pass over `batch` sequences counts with no block recomputed, with all, with the first
    `checkpointing`, and with the fewest that fit 80 GB; and tokens/s of steps of eight such passes, on one H100 or on
    eight."""
    blocks, done = len(model.blocks), {}
    print(f"counted, not measured: {type(model.base).__name__}, {str(model.base.dtype)[6:]}, a pass of {batch} x {C} x "
          f"{L} tokens; seconds at {SHARES[1]:.0%} of the products' peak\n")
    print("| blocks recomputed | kind | kernels | TFLOP | GB moved | seconds |\n|" + " --- |" * 6)

    def count(n):
        if n not in done:
            done[n] = training_step(model, batch, C, L, n)
            rows(n, done[n][0])
        return done[n][0].peak

    none, every = count(0), count(blocks)
    count(min(checkpointing, blocks))
    if none > FITS > every:
        n = math.ceil(blocks * (none - FITS) / (none - every))
        while count(n) > FITS:
            n += 1
    rows("once a step", done[0][1])
    reduce = 2 * 7 / 8 * 4 * sum(p.numel() for p in model.generator.parameters()) / NVLINK
    print(f"| once a step, on eight | all_reduce | 1 | 0 | | {reduce:.4f} |\n")
    print("| blocks recomputed | peak, GB | TFLOP | GB moved | "
          f"{' | '.join(f'tokens/s at {share:.0%}' for share in SHARES)} | on eight |\n|" + " --- |" * 8)
    for n, (one_pass, once) in sorted(done.items()):
        rates = [8 * batch * C * L / (8 * one_pass.total(k) + once.total(k)) for k in range(3, 3 + len(SHARES))]
        rates.append(8 * batch * C * L / (one_pass.total(4) + once.total(4) + reduce))
        print(f"| {n} | {one_pass.peak / 1e9:.3g} | {one_pass.total(1) / 1e12:.4g} | {one_pass.total(2) / 1e9:.4g} | "
              + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")


def rows(name, counter):
    for kind, (kernels, flops, moved, _, seconds, _) in sorted(counter.rows.items()):
        print(f"| {name} | {kind} | {kernels:,} | {flops / 1e12:.4g} | {moved / 1e9:.4g} | {seconds:.4f} |", flush=True)
