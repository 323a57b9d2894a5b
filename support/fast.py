"""The fast forms of what generator.py and model.py say plainly: values and gradients are the same up to rounding, but
for svd_norm, which is exact where rank(S) <= r and an approximation beyond. `model.plain = True` uses the plain ones
instead; tests/test_fast.py holds each pair together.

    norm (eq. 7, 8)                svd_norm       matrix products and r x r Cholesky factors, no SVD, its own gradient
    LayerGenerator.adapter         adapter        svd_norm, at rank min(r, tokens read)
    AdaptedLM.hidden_states        hidden_states  no gradient for what trains nothing, no work for padding
    AdaptedLM.segment_losses       losses         logits of 512 targets at a time, their gradient formed at once
    AdaptedLM.block_forward        block_forward  in training: recomputed where memory is short, fused RMSNorms
"""

import math
from functools import lru_cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOSS_ROWS = 512           # targets whose logits stand in memory at once: 512 x 49,152 fp32 is 100 MB
LEAST_DAMPING = 1e-4      # below it the gradient of svd_norm is rounding noise

# ----------------------------------------------------------------------------------------------------------------------
# norm(S) as matrix products
#
# Let Q (d_r, r) be any orthonormal basis of the leading left directions of S: U_r = Q E, E orthogonal. Then the small
# M = Q^T S = E Sigma_r V_r^T has the singular values and V of S, and its polar factor P = (M M^T)^(-1/2) M = E V_r^T
# gives Q P = U_r V_r^T = norm(S): no SVD is needed, and in lora_B = s A1 Q, lora_A = P B2 (eq. 9) E cancels. Damped,
# P = (M M^T + lambda^2)^(-1/2) M has f = sigma / sqrt(sigma^2 + lambda^2) for singular values, and is 0 where S is.
#
# The exact U_r would need the SVD of S. Q comes from a sketch S Omega, as in torch.svd_lowrank(S, niter=1), which the
# released code calls. For a context of at most r tokens, rank(S) <= r, it is exact; beyond, the smallest of the r
# directions are found only nearly.


def svd_norm(S, rank, damping=1e-2):
    """norm(S) for S (..., d_r, d_r) as a pair whose product it is: Q (..., d_r, rank), P (..., rank, d_r).
    Deterministic. Differentiable, for a damping of at least 1e-4, as the product Q P alone; ValueError where a gradient
    is asked for below. Any rank >= rank(S) gives the same product."""
    rank = min(rank, S.shape[-1])
    wide = S.detach().to(product_dtype(S))
    Q = orthonormal(wide @ sketch(S.shape[-1], rank, S.device).to(wide.dtype))  # (..., d_r, r)
    Q = orthonormal(wide.mT @ Q)
    Q = orthonormal(wide @ Q)                                                   # of S S^T S Omega
    M = (Q.mT @ wide).double()                                                  # (..., r, d_r)
    Q = Q.to(S.dtype)
    if damping >= LEAST_DAMPING:
        return PolarFactor.apply(S, Q, M, damping, wide.dtype)
    if S.requires_grad:
        raise ValueError(f"norm svd has no gradient for a damping of {damping}, below {LEAST_DAMPING}: use svd-exact")
    squares, E = torch.linalg.eigh(M @ M.mT)                                    # sigma^2 (..., r) ascending, (.., r, r)
    largest = squares[..., -1:].clamp(min=1e-60)                                # sigma_1^2
    f_over_sigma = (squares.clamp(min=0) + damping**2 * largest).rsqrt()
    f_over_sigma = torch.where(squares > 1e-12 * largest, f_over_sigma, 0)      # sigma > 1e-6 sigma_1
    P = (E * f_over_sigma[..., None, :]) @ E.mT @ M                             # (..., r, d_r)
    return Q, P.to(S.dtype)


@lru_cache(maxsize=64)
def sketch(d_r, rank, device):
    """Omega (d_r, rank), drawn on the CPU from a seed fixed by its shape: one context, one adapter, on every machine.
    The released code draws a fresh one at every call: two readings of one context give adapters 30-60 % apart."""
    random = torch.Generator("cpu").manual_seed(1_000_003 * d_r + rank)
    return torch.randn(d_r, rank, generator=random, device="cpu").to(device)


def product_dtype(S):
    """The dtype for products over S: its own, but float64 where fp32 products may run in TF32 or bf16, whose 10 or 7
    bits would turn the weak directions of S, a thousand times below the strong, into noise. The switch belongs to the
    whole process, so it is only read."""
    backend = torch.backends.cuda if S.is_cuda else torch.backends.mkldnn
    if backend.matmul.fp32_precision in ("none", "ieee"):
        return S.dtype
    return torch.float64


def orthonormal(Y):
    """Q (..., d_r, r) with the span of Y and orthonormal columns, by Cholesky-QR: Q = Y R^-1, R^T R = Y^T Y. (A
    Householder QR is not batched on CUDA.)"""
    double = Y.double()
    return Y @ inverse_cholesky(double.mT @ double).mT.to(Y.dtype)


def inverse_cholesky(gram):
    """L^-1, where L L^T = gram + shift; gram (..., r, r) symmetric positive semidefinite, float64. The shift, 1e-13 of
    the trace, keeps null directions defined: they become 0 in a basis."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]            # (..., 1, 1)
    L = torch.linalg.cholesky_ex(gram + (1e-13 * trace + 1e-60) * eye).L
    return torch.linalg.solve_triangular(L, eye.expand_as(gram), upper=False)


class PolarFactor(torch.autograd.Function):
    """(S, Q, M, damping, wide) -> (Q, P), P = Z M, M = Q^T S (r, d_r), Z = (M M^T + lambda^2)^(-1/2), lambda = damping
    sigma_1. One implementation for CPU and CUDA: matrix products but for r x r factorisations, in float64.

    Z by coupled Newton-Schulz, T = (3 a I - a^3 Z R) / 2, R <- R T, Z <- T Z, with the a that is best for a spectrum
    known to lie in [damping, 1] sigma_1 (Chen and Chow 2014): 9 steps at damping 1e-2.

    The gradient is that of the spectral function S -> norm(S) (Daleckii-Krein), finite on ties, on rank-deficient S and
    on S = 0, where autograd through a QR or an SVD is not. Without singular vectors: let R = Z^-1, dN the gradient with
    respect to norm(S), X = Q^T dN. Q and lambda are constants to autograd; the second term is for how Q changes with S:

        grad_S = Q (Z X - 2 W M) + (I - Q Q^T) (dN P^T) (M M^T)^-1 M,   R W + W R = sym(Z X M^T Z)

    Exact where rank(S) <= r, in contexts of at most r tokens; beyond, it takes the singular values cut off for 0.
    Measured on the shipped generator's own S, its cosine with the derivative of this very function is 0.95 to 0.71 at
    128 tokens and 0.82 to 0.69 at 512; it learns no worse for it (docs/training.md).
    """

    @staticmethod
    def forward(ctx, S, Q, M, damping, wide):
        ctx.wide = wide                                                         # dtype of products over S
        gram = M @ M.mT                                                         # (..., r, r)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # sigma_1^2 = tr(gram^k)^(1/k) with k = 4,096, at most r^(1/k) too large (0.1 % at r = 128): by two 64th powers,
        # each first divided by its trace; log sums the logarithms of those traces, each over its k
        power = gram
        log = 0.0
        for k in (1, 64, 4096):
            trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-200)      # (..., 1, 1)
            log = log + trace.log() / k
            if k < 4096:
                power = torch.linalg.matrix_power(power / trace, 64)
        largest = log.exp().clamp(min=1e-24)                                    # sigma_1^2, (..., 1, 1)
        bound = largest * (1 + damping**2)                                      # of the spectrum of gram + lambda^2
        R = (gram + damping**2 * largest * eye) / bound                         # spectrum in [low^2, 1]
        Z = eye
        low = damping / (1 + damping**2) ** 0.5
        ctx.low = low
        while low < 1 - 1e-6:                   # R -> R^(1/2), Z -> R^(-1/2); the spectrum of Z R lies in [low^2, 1]
            a = (3 / (1 + low + low**2)) ** 0.5
            low = a * low * (3 - a**2 * low**2) / 2
            T = 1.5 * a * eye - 0.5 * a**3 * (Z @ R)
            R = R @ T
            Z = T @ Z
        R = R * bound.sqrt()
        Z = Z / bound.sqrt()
        ctx.save_for_backward(Q, M.to(S.dtype), R, Z, bound.sqrt())
        return Q, (Z @ M).to(S.dtype)                                           # (..., d_r, r), (..., r, d_r)

    @staticmethod
    def backward(ctx, grad_Q, grad_P):                                  # dN P^T (..., d_r, r), Q^T dN (..., r, d_r)
        Q, M, R, Z, top = ctx.saved_tensors                     # top: of the spectrum of R
        wide = ctx.wide
        Q = Q.to(wide)
        grad_Q = grad_Q.to(wide)
        X = grad_P.to(wide)
        exact = M.double()
        Y = Z @ (X.double() @ exact.mT) @ Z                                     # (..., r, r)
        W = solve_lyapunov(R, (Y + Y.mT).to(wide) / 2, top, ctx.low)
        inside = Z.to(wide) @ X - 2 * W @ M.to(wide)                            # (..., r, d_r)
        L_inverse = inverse_cholesky(exact @ exact.mT)
        outside = (L_inverse.mT @ L_inverse @ exact).to(wide)                   # (..., r, d_r)
        inside = inside - Q.mT @ grad_Q @ outside
        # one product for both terms: on a CPU writing (d_r, d_r) is what takes time
        grad_S = torch.cat([Q, grad_Q], -1) @ torch.cat([inside, outside], -2)
        return grad_S.to(M.dtype), None, None, None, None


def solve_lyapunov(R, Y, top, low):
    """W with R W + W R = Y, by Smith's doubling, in Y's dtype: Y symmetric, R (..., r, r) float64 with eigenvalues in
    [low, 1] top (..., 1, 1)."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    p = low**0.5 * top                                                          # the geometric mean converges fastest
    L_inverse = inverse_cholesky(p * eye + R)
    V = L_inverse.mT @ L_inverse                                                # (p + R)^-1
    C = (2 * p * V - eye).to(Y.dtype)
    W = (2 * p * V).to(Y.dtype) @ Y @ V.to(Y.dtype)
    left = (1 - low**0.5) / (1 + low**0.5)
    while left > 1e-5:                                                          # W = sum_k C^k W_0 C^k, |C| <= left
        W = W + C @ W @ C
        C = C @ C
        left = left**2
    return W


def adapter(layer, S, tokens=math.inf):
    """layer.adapter(S) by svd_norm. rank(S) <= tokens, the number read, so r is cut to tokens where that is less, at no
    loss: for chunks of 16 or 32 tokens norm would else be most of a step on a CPU."""
    config = layer.config
    if config.norm != "svd":
        return layer.adapter(S)
    Q, P = svd_norm(S, min(config.rank, tokens), config.damping)
    return P @ layer.B2, config.scale * (layer.A1 @ Q)                          # (..., r, d_in), (..., d_out, r): eq. 9


# ----------------------------------------------------------------------------------------------------------------------
# all segments in one pass


def hidden_states(model, segments, mask, visible):
    """AdaptedLM.hidden_states in two passes: segments without an adapter train nothing, so they go first, without
    gradient, and only their h of every block is kept; then those with an adapter. Hidden states of segments and columns
    that are padding in every row are not computed: they are 0."""
    B, N, L = segments.shape
    lengths = [L] * N                                           # of each segment, its longest row
    if mask is not None:
        lengths = mask.bool().sum(-1).amax(0).tolist()          # padding is on the right
    C = max(visible)                                            # segments that enter S, without a tail of padding
    while C > 0 and lengths[C - 1] == 0:
        C -= 1
    longest = max(lengths[:C], default=0)                       # of these
    read = [min(v, C) for v in visible]                         # segments that an adapter has read
    first = []                                                  # segments without an adapter
    second = []                                                 # segments with one
    for j in range(N):
        if lengths[j] > 0 and read[j] > 0:
            second.append(j)
        elif lengths[j] > 0 or j < C:
            first.append(j)
    d_h = model.base.config.get_text_config().hidden_size
    hidden = torch.zeros(B, N, L, d_h, dtype=model.base.dtype, device=segments.device)
    h_first = {}                                                # {block: {chunk: h}} of the first pass

    def split(H, among):
        """{chunk: h (B, longest, d_h)} from H (B among, L', d_h), the input of a block in a pass over the segments
        `among`, the longest of which has L' tokens."""
        H = H.view(B, len(among), -1, d_h)                                      # (B, among, L', d_h)
        some = [j for j in among if j < C]                                      # they come first
        h = model.generator.rms_norm(H[:, :len(some)])
        h = F.pad(h, (0, 0, 0, longest - h.shape[2]))                           # (B, some, longest, d_h)
        return dict(zip(some, h.unbind(1)))

    def keep(block, H):
        h_first[block] = split(H, first)
        return {}

    def states(block, H):
        """S_1 .. S_C (B, C, d_r, d_r) of each target of the block."""
        h = {**h_first.get(block, {}), **split(H, second)}
        h = torch.stack([h[j] for j in range(C)], 1)                            # (B, C, longest, d_h)
        real = None if mask is None else mask[:, :C, :longest]                  # (B, C, longest)
        S = []
        for name in model.block_targets[block]:
            updates = model.generator.by_name[name].update(h, real)
            S_t = list(accumulate(updates.unbind(1)))           # eq. 3; the kernel of cumsum is slow on a CPU
            S.append(torch.stack(S_t, 1))                                       # (B, C, d_r, d_r)
        return S

    def adapters(block, H):
        if block < model.checkpointing and torch.is_grad_enabled():
            S = checkpoint(states, block, H, use_reentrant=False, preserve_rng_state=False)
        else:
            S = states(block, H)
        lora = {}
        for name, S_name in zip(model.block_targets[block], S):
            # never recomputed: the pairs are small, and norm is slow
            pair = []
            for matrix in adapter(model.generator.by_name[name], S_name, longest * C):      # (B, C, ..)
                columns = matrix.to(H.dtype).unbind(1)          # unbind and stack: the backward of an index is slow
                rows = torch.stack([columns[read[j] - 1] for j in second], 1)
                pair.append(rows.flatten(0, 1))                                 # (B second, ..)
            lora[name] = pair
        return lora

    def forward_pass(among, function):
        length = max(1, *(lengths[j] for j in among))
        ids = segments[:, among, :length].flatten(0, 1)                         # (B among, L')
        out = model.run(function, model.base.get_decoder(), input_ids=ids, use_cache=False).last_hidden_state
        hidden[:, among, :length] = out.view(B, len(among), length, d_h)

    if first:
        with torch.no_grad():
            forward_pass(first, keep if second else None)
    if second:
        forward_pass(second, adapters)
    return hidden


def block_forward(model, l, lora, forward, H, *args, **kwargs):
    """AdaptedLM.block_forward in training. The first model.checkpointing blocks are computed again in the backward
    pass, which reaches those last, when the others' activations are freed (transformers' own checkpointing is off in
    eval mode). RMSNorms are torch's own, one kernel on CUDA; transformers' are eight and keep an fp32 copy of H for the
    backward pass. Both give the same in fp32; in bf16 torch's rounds once where the other rounds twice."""
    norms = []
    for module in model.blocks[l].modules():            # not Gemma's norm, which scales by 1 + weight
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norms.append((module, module.forward))

    def run(H):
        for norm, _ in norms:
            norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight,
                                   eps=norm.variance_epsilon)
        model.lora_of_block = lora
        try:
            return forward(H, *args, **kwargs)
        finally:
            model.lora_of_block = {}
            for norm, own_forward in norms:
                norm.forward = own_forward

    if l < model.checkpointing:
        return checkpoint(run, H, use_reentrant=False, preserve_rng_state=False)
    return run(H)


# ----------------------------------------------------------------------------------------------------------------------
# the loss


def losses(lm_head, hidden, labels):
    """Next-token cross-entropy of hidden (B, N, L, d_h) on labels (B, N, L), -100 where there is no target: (nats
    summed (B, N) fp32, target tokens (B, N)). Only targets go through lm_head."""
    targets = labels[:, :, 1:]                                                  # (B, N, L-1)
    scored = targets != -100
    index = scored.flatten().nonzero().squeeze(1)                               # (T,)
    # one contiguous 2-D block: a linear over a strided slice copies the whole lm_head once per row of the batch
    hidden = hidden[:, :, :-1].flatten(0, 2)[index]                             # (T, d_h)
    nats = HeadLoss.apply(hidden, targets.flatten()[index], lm_head)            # (T,)
    nats = torch.zeros(scored.numel(), device=nats.device).index_put((index,), nats)
    return nats.view(scored.shape).sum(-1), scored.sum(-1)                      # (B, N), (B, N)


class HeadLoss(torch.autograd.Function):
    """Next-token nats (T,) of hidden states (T, d_h) under a frozen lm_head, LOSS_ROWS tokens at a time. The gradient
    by the hidden states, (softmax - one-hot) W_head, is formed in the forward pass, in the buffer of the logits: logits
    (T, V) never stand in memory at once nor are computed twice."""

    @staticmethod
    def forward(ctx, hidden, targets, lm_head):
        nats = [hidden.new_zeros(0, dtype=torch.float32)]
        grads = [hidden.new_zeros(0, hidden.shape[-1])]
        for h, target in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS)):
            logp = lm_head(h).float()                                           # (rows, V)
            logp -= logp.logsumexp(-1, keepdim=True)
            index = (torch.arange(len(h), device=h.device), target)
            nats.append(-logp[index])                                           # (rows,)
            if hidden.requires_grad:
                p = logp.exp_()
                p[index] -= 1
                grads.append(p.to(h.dtype) @ lm_head.weight)                    # (rows, d_h)
        ctx.grad = torch.cat(grads)                                             # (T, d_h)
        return torch.cat(nats)                                                  # (T,)

    @staticmethod
    def backward(ctx, grad_nats):
        return ctx.grad * grad_nats[:, None].to(ctx.grad.dtype), None, None

