"""The generator of Generative Adapter (arXiv 2411.05877): hidden states of a context in, low-rank weight updates out.

Symbols, in the order a reader of the paper meets them (§2.2, §2.4):

    Sigma(t)  the context read so far: chunks C_1 .. C_t          B     batch: contexts side by side
    H_t       hidden states of chunk t, INPUT of block l          L     tokens of a chunk (paper: M_t; its L: blocks)
    h         one row of H_t, at root mean square 1 (*)           d_h   width of the residual stream
    W         a frozen linear layer of block l, (d_out, d_in)     d_r   width of the memory S
    A1, A2    (d_out, d_r), (d_r, d_h)   trained for each W       r     rank of the adapter, r <= d_r
    B1, B2    (d_h, d_r), (d_r, d_in)    trained for each W       s     scale: 1/16 Mistral, 1/8 Llama2 (appendix B)
    g         (d_h,) gain of h, trained for each W                Omega (d_r, r) fixed random sketch
    S_t       S_{t-1} + A2 H_t^T H_t B1 (eq. 3), S_0 = 0: the memory (d_r, d_r), all that is kept, at any length
    norm      S = U Sigma V^T  ->  U V^T (eq. 7), truncated to rank r: U_r V_r^T, and damped
    W_Delta   s A1 norm(S_t) B2 (eq. 6, 8; eq. 4 without norm) = (s A1 U_r) (V_r^T B2) = lora_B lora_A (eq. 9)

(*) Not in the paper but in the released code, and needed: eq. 1 to 3 read g h where the paper has rows of H_t.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from support.files import InputError, bad_input, read_safetensors
from support.matmul_norm import MatmulNorm, inverse_cholesky, product_dtype

NORMS = ("svd", "svd-exact", "frobenius")
RMS_EPS = 1e-6           # of the generator's own RMSNorm, not the base model's
NULL_DIRECTION = 1e-6    # a singular value below this share of the largest one counts as zero


@dataclass
class GeneratorConfig:
    """Shape and normalisation of a generator. train.py's recipe() picks them; the paper: d_r 1024, rank 128, s 1/16."""
    d_r: int = 256
    rank: int = 64
    scale: float = 1.0
    norm: str = "svd"          # svd | svd-exact | frobenius
    damping: float = 1e-2      # lambda = damping sigma_1; 0 is eq. 7 to the letter (svd norms only)
    targets: list = field(default_factory=lambda: ["o_proj"])
    chunk: int = 1024          # tokens of a context read at a time: those it was trained with, the paper's 1,024
    blocks: list = None        # [first, last] of the blocks that have adapters; None: all, as in the paper

    def __post_init__(self):
        check_config(self)

    @property
    def adapter_rank(self):
        """Rank of a memory's LoRA pair: r, but d_r for frobenius, which keeps full rank."""
        return self.d_r if self.norm == "frobenius" else self.rank


class LayerGenerator(nn.Module):
    """G^(l) for one target layer W (d_out, d_in): A1, A2, B1, B2 and the gain g, all fp32."""

    def __init__(self, config, d_h, d_in, d_out, device=None):
        super().__init__()
        self.config, d_r = config, config.d_r
        self.A1 = nn.Parameter(torch.zeros(d_out, d_r, device=device))          # so W_Delta = 0 before training
        self.A2 = nn.Parameter(torch.empty(d_r, d_h, device=device))
        self.B1 = nn.Parameter(torch.empty(d_h, d_r, device=device))
        self.B2 = nn.Parameter(torch.empty(d_r, d_in, device=device))
        self.g = nn.Parameter(torch.ones(d_h, device=device))
        # kaiming_normal(fan_in, a = sqrt 5): std sqrt(1/3) / sqrt(fan_in); the fan of A2 and B1 is d_h, that of B2 d_in
        for weight, fan_in in ((self.A2, d_h), (self.B1, d_h), (self.B2, d_in)):
            nn.init.normal_(weight, std=(3 * fan_in) ** -0.5)

    def update(self, h, mask=None):
        """What a chunk adds to S (eq. 3), A2 H^T H B1: h (..., L, d_h) as rms_norm gives it, mask (..., L) of 1 and 0
        -> (..., d_r, d_r) fp32. The projections run in h's dtype, the sum over tokens in fp32: rounding S to bf16
        moves norm(S) by percents."""
        # the gain scales A2 and B1, not h: the same product, and h then needs no backward pass for the gradient of g
        values = h @ (self.A2 * self.g).to(h.dtype).mT                          # (..., L, d_r)
        keys = h @ (self.g[:, None] * self.B1).to(h.dtype)                      # (..., L, d_r)
        if mask is not None:
            values = values * mask.unsqueeze(-1).to(h.dtype)                    # padding adds nothing to S
        return values.float().mT @ keys.float()                                 # (..., d_r, d_r), the sum of eq. 1

    def adapter(self, S, tokens=None):
        """W_Delta = lora_B lora_A (eq. 6, 9): S (..., d_r, d_r) -> lora_A (..., r, d_in), lora_B (..., d_out, r),
        s folded into it. rank(S) <= tokens, so r is cut to tokens where that is less, at no loss."""
        c = self.config
        if c.norm == "frobenius":                                               # full rank, r = d_r
            lora_A = frobenius_norm(S) @ self.B2                                # (..., d_r, d_in)
            return lora_A, (c.scale * self.A1).expand(*S.shape[:-2], -1, -1)    # (..., d_out, d_r)
        U, V_T = svd_norm(S, min(c.rank, tokens or c.rank), c.damping, exact=c.norm == "svd-exact")
        return V_T @ self.B2, c.scale * (self.A1 @ U)                           # (..., r, d_in), (..., d_out, r): eq. 9


def rms_norm(H):
    """Rows of H (..., L, d_h) at root mean square 1, in H's dtype. The gain g follows in update, so that the targets of
    a block share this."""
    return F.rms_norm(H, H.shape[-1:], eps=RMS_EPS)


class AdapterGenerator(nn.Module):
    """The whole generator G: one LayerGenerator for each target layer of the base.
    shapes: {module name: (d_in, d_out)}, in the base's own names, e.g. "model.layers.0.self_attn.o_proj"."""

    def __init__(self, config, d_h, shapes, device=None):
        super().__init__()
        self.config = config
        self.index = {name: i for i, name in enumerate(shapes)}                 # ModuleDict keys may not hold dots
        self.layers = nn.ModuleList(LayerGenerator(config, d_h, *shape, device) for shape in shapes.values())
        self._fingerprint = (None, None)

    def __getitem__(self, name):
        return self.layers[self.index[name]]

    def tensors(self):
        """{"<module name>.<A1|A2|B1|B2|g>": parameter}, the names a checkpoint file uses."""
        return {f"{name}.{key}": p for name in self.index for key, p in self[name].named_parameters()}

    @torch.no_grad()
    def load_tensors(self, tensors, source):
        """Copy tensors named as in tensors() into the parameters. source: the file they came from."""
        mine = self.tensors()
        if odd := sorted(mine.keys() ^ tensors.keys()):
            how = "is missing" if odd[0] in mine else "has no place in this base"
            raise InputError(f"{source}: tensor {odd[0]} {how}, so it belongs to another base or other target modules")
        for name, p in mine.items():
            if tensors[name].shape != p.shape:
                raise InputError(f"{source}: {name} has shape {tuple(tensors[name].shape)} where this base and config "
                                 f"need {tuple(p.shape)}")
        for name, p in mine.items():
            p.copy_(tensors[name])

    def fingerprint(self):
        """Hash of config and weights: a memory belongs to the generator that wrote it. Computed again only after an
        operation has changed a weight (edits through .data go unseen)."""
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        if self._fingerprint[0] != state:
            config = {name: value for name, value in asdict(self.config).items() if value is not None}  # as in its file
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
            for name, p in self.tensors().items():
                digest.update(name.encode())
                digest.update(p.detach().float().cpu().numpy().tobytes())
            self._fingerprint = (state, digest.hexdigest()[:16])
        return self._fingerprint[1]


@dataclass
class Memory:
    """All that is kept of a context: S_t of every target layer, whatever its length.

    states: {module name: S (B, d_r, d_r) fp32}, rows A2, columns B1; tokens: (B,) real tokens read; fingerprint: of the
    generator that wrote it. Memories of different generators cannot be put together.
    """
    states: dict
    tokens: torch.Tensor
    fingerprint: str = None

    def __add__(self, other):
        """The memory of contexts read apart, neither under the adapter of the other: S is a sum over tokens (eq. 3).
        Row b is added to row b, a batch of 1 to every row."""
        one_generator([self, other])
        if len(self.tokens) != len(other.tokens) and 1 not in (len(self.tokens), len(other.tokens)):
            raise InputError(f"memories of batch {len(self.tokens)} and {len(other.tokens)} cannot be added: the "
                             "batches must be equal, or one of them 1")
        states = {name: S + other.states[name].to(S.device) for name, S in self.states.items()}
        return Memory(states, self.tokens + other.tokens, self.fingerprint)

    @classmethod
    def stack(cls, memories):
        """Memories side by side, their rows in order: row b of a batch of queries is then adapted by row b."""
        one_generator(memories)
        first = memories[0]
        states = {name: torch.cat([m.states[name].to(S.device) for m in memories]) for name, S in first.states.items()}
        return cls(states, torch.cat([m.tokens for m in memories]), first.fingerprint)

    def save(self, path):
        """Write to one safetensors file, aside first and then renamed, so that a reader never meets half a memory."""
        tensors = {f"S.{name}": S.detach().float().cpu().contiguous() for name, S in self.states.items()}
        tensors["tokens"] = self.tokens.detach().cpu().contiguous()
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"{path} cannot be written: name a file in a directory that exists")
        metadata = {"format": "generative-adapter-memory", "fingerprint": self.fingerprint or ""}
        save_file(tensors, f"{path}.part", metadata=metadata)
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path):
        """Read a file that save wrote, onto the CPU."""
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != "generative-adapter-memory":
            raise InputError(f"{path} is a safetensors file but not a saved memory")
        states, tokens = {name[2:]: S for name, S in tensors.items() if name.startswith("S.")}, tensors.get("tokens")
        sound = tokens is not None and tokens.dtype == torch.long and tokens.dim() == 1 and tokens.numel() > 0
        if not sound or not all(S.dtype == torch.float32 and S.dim() == 3 and S.shape[:1] == tokens.shape
                                and S.isfinite().all() for S in states.values()):
            raise InputError(f"{path}: the saved memory is damaged (sizes disagree or values are not finite)")
        return cls(states, tokens, metadata.get("fingerprint") or None)


def one_generator(memories):
    if not memories:
        raise InputError("there is no memory to put together: give at least one")
    kinds = {(m.fingerprint, *((name, S.shape[1:]) for name, S in sorted(m.states.items()))) for m in memories}
    if len(kinds) > 1:
        raise InputError("memories of different generators cannot be put together: read the contexts again with one "
                         "generator")


def check_config(c):
    """Refuse a config that no generator can have."""
    c.targets = [c.targets] if isinstance(c.targets, str) else list(c.targets)
    numbers = all(isinstance(v, int) for v in (c.d_r, c.rank, c.chunk, *(c.blocks or ())))
    if not numbers or not all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in (c.scale, c.damping)):
        raise InputError(f"d_r, rank, chunk and blocks must be integers, scale and damping finite numbers: {c}")
    for wrong, words in (
            (c.norm not in NORMS, f"norm {c.norm!r} is unknown: choose one of {', '.join(NORMS)}"),
            (not 1 <= c.rank <= c.d_r, f"rank must lie between 1 and d_r = {c.d_r}, not {c.rank}"),
            (c.chunk < 1, f"chunk must be at least 1 token, it is {c.chunk}"),
            (c.blocks is not None and not (len(c.blocks) == 2 and 0 <= c.blocks[0] <= c.blocks[1]),
             f"blocks must be the first and the last block with adapters, not {c.blocks}"),
            (c.damping < 0, f"damping must not be negative, it is {c.damping}"),
            (not c.targets or not all(isinstance(target, str) for target in c.targets),
             "targets must name at least one module, for example o_proj")):
        if wrong:
            raise InputError(words)


def config_from_dict(values):
    """GeneratorConfig from a json object; keys it does not know are ignored, chunk and blocks may be left out."""
    names = [f.name for f in fields(GeneratorConfig) if f.name in values or f.name not in ("chunk", "blocks")]
    with bad_input("generator config: missing or malformed field", KeyError, TypeError):
        return GeneratorConfig(**{name: values[name] for name in names})


# ----------------------------------------------------------------------------------------------------------------------
# norm(S), eq. 6 and 7
#
# In words: S = U Sigma V^T; its positive singular values become 1 (eq. 7), those beyond the r leading ones 0 (eq. 8).
# In code:  U, sigma, Vh = torch.linalg.svd(S);  N = U[:, :r] @ Vh[:r]
#
# Two things differ. f = sigma / sqrt(sigma^2 + lambda^2), lambda = damping sigma_1, stands for the 1: it bounds the
# gradient by 1 / lambda; damping 0 is eq. 7. And f = 0 where sigma <= 1e-6 sigma_1, because the paper resets the
# POSITIVE singular values, where the released code sets rounding noise to 1 as well.


def svd_norm(S, rank, damping=1e-2, exact=False):
    """norm(S) of eq. 7, S (..., d_r, d_r), as a pair whose product it is (eq. 9): (..., d_r, rank), (..., rank, d_r).
    exact: by the full SVD of S, not the sketched one. Deterministic; differentiable through the product of the pair.
    Any rank >= rank(S) gives the same product. On CUDA by MatmulNorm, where the damping is enough for its gradient."""
    rank = min(rank, S.shape[-1])
    if S.is_cuda and damping >= 1e-4 and not exact:
        return MatmulNorm.apply(S, range_finder(S.detach(), rank), damping)
    return SpectralNorm.apply(S, rank, damping, exact)


def frobenius_norm(S):
    """S / ||S||_F (§5.1), with the released code's eps under the root: (..., d_r, d_r) -> (..., d_r, d_r)."""
    return S * torch.rsqrt(S.square().sum((-2, -1), keepdim=True) + 1e-6)


# The fast form. Let Q (d_r, r) be any orthonormal basis of the leading left directions: U_r = Q E, E orthogonal. Then
# the small M = Q^T S = E Sigma_r V_r^T has the sigma and V of S (sketched_svd), and MatmulNorm needs no SVD at all: P =
# (M M^T)^(-1/2) M = E V_r^T gives Q P = U_r V_r^T = N, and in lora_B = s A1 Q, lora_A = P B2 (eq. 9) E cancels. The
# true leading directions would need the SVD of S; Q from a sketch is what the released code has.


@lru_cache(maxsize=64)
def sketch(d_r, rank, device):
    """Omega (d_r, rank), drawn on the CPU from a seed fixed by its shape: one context, one adapter, on every machine.
    The released code draws a fresh one at every call: two readings of one context give adapters 30-60 % apart."""
    random = torch.Generator("cpu").manual_seed(1_000_003 * d_r + rank)
    return torch.randn(d_r, rank, generator=random, device="cpu").to(device)


def orthonormal_basis(Y):
    """Q (..., d_r, r) with the span of Y, by Cholesky-QR: Q = Y R^-1, R^T R = Y^T Y; columns without content are 0.
    Matrix products but for one r x r Cholesky, which CUDA batches (a Householder QR it does not). The Gram matrix
    squares the condition number, so it is float64; Y itself stays in its dtype."""
    wide = Y.double()
    return Y @ inverse_cholesky(wide.mT @ wide).mT.to(Y.dtype)                                  # (..., d_r, r)


def range_finder(S, rank):
    """Q (..., d_r, r): the leading left directions of S, as torch.svd_lowrank(niter=1) has them, from S S^T S Omega."""
    dtype, S = S.dtype, S.to(product_dtype(S))
    Q = orthonormal_basis(S @ sketch(S.shape[-1], rank, S.device).to(S.dtype))
    Q = orthonormal_basis(S.mT @ Q)
    return orthonormal_basis(S @ Q).to(dtype)


def sketched_svd(S, rank):
    """U (..., d_r, r), sigma (..., r) descending and Vh (..., r, d_r) of Q Q^T S, from the float64 Gram matrix of M:
    right down to sigma = 1e-8 sigma_1, and three times faster than an SVD of M."""
    Q = range_finder(S, rank)                                               # (..., d_r, r)
    M = (Q.mT @ S).double()                                                 # (..., r, d_r)
    square, E = torch.linalg.eigh(M @ M.mT)                                 # (..., r), (..., r, r), ascending
    sigma, E = square.flip(-1).clamp(min=0).sqrt(), E.flip(-1)
    Vh = E.mT @ M / sigma.clamp(min=1e-30)[..., None]                       # (..., r, d_r)
    return Q @ E.to(S.dtype), sigma.to(S.dtype), Vh.to(S.dtype)


class SpectralNorm(torch.autograd.Function):
    """S -> (U_r, f V_r^T), whose product is norm(S).

    The backward pass is the derivative of the spectral function itself (Daleckii-Krein), never of U and V: with dN the
    gradient by norm(S), X = U^T dN V, and sym and skew the symmetric and antisymmetric parts of X,

        grad_S = U (sym * D1 + skew * D2) V^T + (I - U U^T) dN V diag(f/sigma) V^T + U diag(f/sigma) U^T dN (I - V V^T)
        D1 = (f_i - f_j) / (sigma_i - sigma_j),   D2 = (f_i + f_j) / (sigma_i + sigma_j)

    It is finite on ties, on rank-deficient S and on S = 0, where autograd through a QR or an SVD is not. It is exact
    (lambda held constant) for exact=True, and for the sketch when rank(S) <= r; beyond, it takes truncated sigma as 0.
    """

    @staticmethod
    def forward(ctx, S, rank, damping, exact):
        dtype, S = S.dtype, S.to(product_dtype(S))
        U, sigma, Vh = torch.linalg.svd(S) if exact else sketched_svd(S, rank)    # (.., d_r, k), (.., k), (.., k, d_r)
        sigma_1 = sigma[..., :1].clamp(min=1e-30)
        sigma, lam = sigma / sigma_1, damping + 1e-12 / sigma_1             # units of sigma_1: else sigma^4 overflows
        w = torch.sqrt(sigma**2 + lam**2)
        kept = (sigma > NULL_DIRECTION) & (torch.arange(sigma.shape[-1], device=S.device) < rank)
        f = torch.where(kept, sigma / w, 0)
        if not exact:                                                       # a sketch's null directions are noise
            U, Vh = U * kept[..., None, :], Vh * kept[..., None]
        ctx.save_for_backward(kept, *(t.to(dtype) for t in (U, sigma, Vh, f, w, lam, sigma_1)))
        ctx.rank = rank
        U, fVh = U[..., :rank], f[..., :rank, None] * Vh[..., :rank, :]     # (..., d_r, r), (..., r, d_r)
        return U.to(dtype), fVh.to(dtype)

    @staticmethod
    def backward(ctx, grad_U, grad_fVh):
        (kept, *saved), dtype, r = ctx.saved_tensors, grad_U.dtype, ctx.rank
        U, sigma, Vh, f, w, lam, sigma_1 = (t.to(product_dtype(t)) for t in saved)
        dN_V = grad_U.to(U.dtype) * torch.where(kept, w / sigma, 0)[..., None, :r]    # grad_U = dN V diag(f)
        U_dN = grad_fVh.to(U.dtype)                                         # (..., r, d_r): grad_fVh = U^T dN
        U_dN_V = U.mT @ dN_V                                                # (..., k, r), k = d_r if exact else r
        X = U_dN_V.new_zeros(*U_dN_V.shape[:-1], U_dN_V.shape[-2])          # (..., k, k): U^T dN V
        X[..., :, :r] = U_dN_V                                              # columns of cut directions come from
        X[..., :r, :] = U_dN @ Vh.mT                                        # U_dN; a pair of two cut ones is unused

        i, j = (..., slice(None), None), (..., None, slice(None))           # index as sigma_i, sigma_j of D1, D2
        both, one = kept[i] & kept[j], kept[i] ^ kept[j]
        # D1 for two kept directions, with the difference divided out: no cancellation, and f' on ties
        smooth = lam[i] ** 2 * (sigma[i] + sigma[j]) / (w[i] * w[j] * (sigma[i] * w[j] + sigma[j] * w[i]))
        gap = sigma[i] - sigma[j]                                           # kept against cut: f jumps; none at ties
        jump = torch.where(gap.abs() > NULL_DIRECTION, (f[i] - f[j]) / gap, 0)
        D1 = torch.where(both, smooth, torch.where(one, jump, 0))           # (..., k, k)
        D2 = torch.where(both | one, (f[i] + f[j]) / (sigma[i] + sigma[j]), 0)
        K = (X + X.mT) / 2 * D1 + (X - X.mT) / 2 * D2                       # sym * D1 + skew * D2

        f_over_sigma = torch.where(kept, 1 / w, 0)[..., :r]
        left = (dN_V - U @ U_dN_V) * f_over_sigma[..., None, :]             # (..., d_r, r): grad_S's 2nd term
        right = (U_dN - (U_dN @ Vh.mT) @ Vh) * f_over_sigma[..., :, None]   # (..., r, d_r): its 3rd
        inside = K @ Vh                                                     # (..., k, d_r)
        inside[..., :r, :] += right
        # one product for all three terms, U (K V^T + right) + left V^T: on a CPU writing (d_r, d_r) is what takes time
        grad_S = torch.cat([U, left], -1) @ (torch.cat([inside, Vh[..., :r, :]], -2) / sigma_1[..., None])
        return grad_S.to(dtype), None, None, None                           # (..., d_r, d_r)
