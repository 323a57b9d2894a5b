"""The generator of Generative Adapter (arXiv 2411.05877): hidden states of a context in, low-rank weight updates out.

Symbols, in the order a reader of the paper meets them (§2.2, §2.4):

    Sigma(t)  the context read so far: chunks C_1 .. C_t          B     batch: contexts side by side
    H_t       (L, d_h) hidden states of chunk t, the INPUT        L     tokens of a chunk (paper: M_t; its L: blocks)
              of block l: output of block l-1, H^(l-1)
    h         one row of H_t, at root mean square 1 (*)           d_h   width of the residual stream
    W         a frozen linear layer of block l, (d_out, d_in)     d_r   width of the memory S
    A1, A2    (d_out, d_r), (d_r, d_h)   trained for each W       r     rank of the adapter, r <= d_r
    B1, B2    (d_h, d_r), (d_r, d_in)    trained for each W       s     scale: 1/16 Mistral, 1/8 Llama2 (appendix B)
    g         (d_h,) gain of h, trained for each W
    S_t       S_{t-1} + A2 H_t^T H_t B1 (eq. 3), S_0 = 0: the memory (d_r, d_r), all that is kept, at any length
    norm      S = U Sigma V^T  ->  U V^T (eq. 7), truncated to rank r: U_r V_r^T, and damped (**)
    W_Delta   s A1 norm(S_t) B2 (eq. 6, 8; eq. 4 without norm) = (s A1 U_r) (V_r^T B2) = lora_B lora_A (eq. 9)

(*)  An RMSNorm that is not in the paper but in the released code: the rows of H_t in eq. 1 to 3 are g * h, elementwise.
(**) Not in the paper: sigma / sqrt(sigma^2 + lambda^2), lambda = damping sigma_1, in place of 1; damping 0 is eq. 7.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.fast import svd_norm  # noqa: F401   norm without an SVD, from a sketch: exact where rank(S) <= r
from support.files import InputError, read_safetensors, save_tensors

NORMS = ("svd", "svd-exact", "frobenius")
RMS_EPS = 1e-6           # of the generator's own RMSNorm, not the base model's
NULL_DIRECTION = 1e-6    # a singular value below this share of the largest one counts as zero


@dataclass
class GeneratorConfig:
    """Shape and normalisation of a generator. The paper: d_r 1024, rank 128, scale 1/16 or 1/8, targets o_proj."""
    d_r: int = 256
    rank: int = 64
    scale: float = 1.0
    norm: str = "svd"          # svd (computed by svd_norm of support/fast.py), svd-exact (by norm) or frobenius
    damping: float = 1e-2      # lambda = damping sigma_1; 0 is eq. 7; frobenius has none; svd trains with >= 1e-4
    targets: list = field(default_factory=lambda: ["o_proj"])
    chunk: int = 1024          # tokens of the longest chunk, the same as in training; the paper: 1,024

    def __post_init__(self):
        if self.norm not in NORMS:
            raise InputError(f"norm {self.norm!r} is unknown: choose one of {', '.join(NORMS)}")
        if not 1 <= self.rank <= self.d_r:
            raise InputError(f"rank must lie between 1 and d_r = {self.d_r}, not {self.rank}")
        if self.chunk < 1 or not self.damping >= 0:
            raise InputError(f"chunk must be at least 1 token and damping not negative: {self}")

    @classmethod
    def from_dict(cls, values):
        """A config from a json object; keys it does not know are ignored, those left out have their defaults."""
        known = {}
        for each in fields(cls):
            if each.name in values:
                try:
                    known[each.name] = each.type(values[each.name])
                    if known[each.name] != values[each.name]:                   # half a token, not a number
                        raise ValueError(f"{each.name} is {values[each.name]!r}")
                except (TypeError, ValueError, OverflowError) as error:
                    raise InputError(f"generator config: {each.name} is of the wrong type: {error}") from None
        return cls(**known)


class LayerGenerator(nn.Module):
    """G^(l) for one target layer W (d_out, d_in): A1, A2, B1, B2 and the gain g, all fp32."""

    def __init__(self, config, d_h, d_in, d_out, device=None):
        super().__init__()
        self.config = config
        d_r = config.d_r
        self.A1 = nn.Parameter(torch.zeros(d_out, d_r, device=device))          # so W_Delta = 0 before training
        self.A2 = nn.Parameter(torch.empty(d_r, d_h, device=device))
        self.B1 = nn.Parameter(torch.empty(d_h, d_r, device=device))
        self.B2 = nn.Parameter(torch.empty(d_r, d_in, device=device))
        self.g = nn.Parameter(torch.ones(d_h, device=device))
        # kaiming_normal(fan_in, a = sqrt 5) has std sqrt(1/3) / sqrt(fan_in)
        nn.init.normal_(self.A2, std=(3 * d_h) ** -0.5)
        nn.init.normal_(self.B1, std=(3 * d_h) ** -0.5)
        nn.init.normal_(self.B2, std=(3 * d_in) ** -0.5)

    def update(self, h, mask=None):
        """What a chunk adds to S, A2 H^T H B1 (eq. 1 to 3): h (..., L, d_h) as rms_norm gives it, mask (..., L) 1 for
        real tokens -> (..., d_r, d_r) fp32. The projections run in h's dtype, the sum over tokens in fp32: rounding S
        to bf16 moves norm(S) by percents."""
        # S is a sum over tokens of outer products value key^T (not the base's attention). The gain scales A2 and B1,
        # not h: the same product, and h then needs no backward pass for the gradient of g
        values = h @ (self.A2 * self.g).to(h.dtype).mT                          # (..., L, d_r)
        keys = h @ (self.g[:, None] * self.B1).to(h.dtype)                      # (..., L, d_r)
        if mask is not None:
            values = values * mask.unsqueeze(-1).to(h.dtype)                    # padding adds nothing to S
        return values.float().mT @ keys.float()                                 # (..., d_r, d_r)

    def adapter(self, S):
        """W_Delta = lora_B lora_A (eq. 6, 9): S (..., d_r, d_r) -> lora_A (..., r, d_in), lora_B (..., d_out, r), with
        s in lora_B. For frobenius r is d_r."""
        if self.config.norm == "frobenius":
            lora_A = frobenius_norm(S) @ self.B2                                # (..., d_r, d_in)
            lora_B = self.config.scale * self.A1                                # (d_out, d_r)
            return lora_A, lora_B.expand(*S.shape[:-2], -1, -1)                 # (..., d_out, d_r)
        U, V_T = norm(S, self.config.rank, self.config.damping)                 # for svd, fast.adapter stands in
        lora_A = V_T @ self.B2                                                  # (..., r, d_in)
        lora_B = self.config.scale * (self.A1 @ U)                              # (..., d_out, r)
        return lora_A, lora_B


def split_into_chunks(ids, chunk=1024):
    """A context (a list of at least 1 id), cut evenly into C = ceil(n / chunk) lists of L = ceil(n / C) ids; the last
    may be shorter."""
    if not ids:
        raise InputError("the context is empty: it needs at least 1 token")
    C = math.ceil(len(ids) / chunk)
    L = math.ceil(len(ids) / C)
    return [ids[at:at + L] for at in range(0, len(ids), L)]


def rms_norm(H):
    """Rows of H (..., L, d_h) at root mean square 1, in H's dtype. The gain g follows in update, so that the targets of
    a block share this."""
    return F.rms_norm(H, H.shape[-1:], eps=RMS_EPS)


def norm(S, rank, damping):
    """norm(S) of eq. 7 and 8 for S (..., d_r, d_r), as a pair whose product it is: U_r (..., d_r, r), f V_r^T (..., r,
    d_r). f is 1 in the paper; here sigma / sqrt(sigma^2 + lambda^2), which bounds the gradient by 1 / lambda, and 0 for
    sigma <= 1e-6 sigma_1: the paper resets the POSITIVE singular values, the released code rounding noise as well.

    The gradient is that of torch.linalg.svd, which is undefined where two sigma are equal, as the zeros of a context of
    fewer than d_r tokens are. svd_norm of support/fast.py is the same function where rank(S) <= r, with a gradient that
    is finite everywhere.
    """
    U, sigma, V_T = torch.linalg.svd(S)                                         # S = U Sigma V^T, sigma descending
    U, sigma, V_T = U[..., :rank], sigma[..., :rank], V_T[..., :rank, :]        # the r leading ones (§2.4)
    sigma = sigma / sigma[..., :1].detach().clamp(min=1e-30)                    # in units of sigma_1, a constant
    f = sigma / torch.sqrt(sigma**2 + damping**2 + 1e-24)                       # eq. 7: 1; 1e-24 against 0 / 0
    f = torch.where(sigma > NULL_DIRECTION, f, 0)                               # (..., r)
    return U, f[..., None] * V_T


def frobenius_norm(S):
    """S / ||S||_F (§5.1), with the released code's eps under the root: (..., d_r, d_r) -> (..., d_r, d_r)."""
    return S * torch.rsqrt(S.square().sum((-2, -1), keepdim=True) + 1e-6)


class AdapterGenerator(nn.Module):
    """The whole generator G: one LayerGenerator for each target layer of the base.
    shapes: {module name: (d_in, d_out)}, in the base's own names, e.g. "model.layers.0.self_attn.o_proj"."""

    rms_norm = staticmethod(rms_norm)           # here for support/fast.py, which imports nothing from above it

    def __init__(self, config, d_h, shapes, device=None):
        super().__init__()
        self.config = config
        self.by_name = {}                                                       # {module name: LayerGenerator}
        for name, (d_in, d_out) in shapes.items():
            self.by_name[name] = LayerGenerator(config, d_h, d_in, d_out, device)
        self.layers = nn.ModuleList(self.by_name.values())                      # ModuleDict keys may not hold dots
        self._fingerprint = (None, None)

    def tensors(self):
        """{"<module name>.<A1|A2|B1|B2|g>": parameter}, the names a checkpoint file uses."""
        tensors = {}
        for name, layer in self.by_name.items():
            for key, parameter in layer.named_parameters():
                tensors[f"{name}.{key}"] = parameter
        return tensors

    @torch.no_grad()
    def load_tensors(self, tensors, source):
        """Copy tensors named as in tensors() into the parameters. source: the file they came from."""
        parameters = self.tensors()
        unmatched = sorted(parameters.keys() ^ tensors.keys())
        if unmatched:
            how = "is missing" if unmatched[0] in parameters else "has no place in this base"
            raise InputError(f"{source}: tensor {unmatched[0]} {how}, so it belongs to another base or other target "
                             "modules")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise InputError(f"{source}: {name} has shape {tuple(tensors[name].shape)} where this base and config "
                                 f"need {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])

    def fingerprint(self):
        """Hash of config and weights: a memory belongs to the generator that wrote it. Computed again only after an
        operation has changed a weight (edits through .data go unseen)."""
        versions = [(p.data_ptr(), p._version) for p in self.parameters()]      # _version counts in-place changes
        if self._fingerprint[0] != versions:
            digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
            for name, layer in self.by_name.items():
                for key, parameter in layer.named_parameters():
                    digest.update(f"{name}.{key}".encode())
                    digest.update(parameter.detach().float().cpu().numpy().tobytes())
            self._fingerprint = (versions, digest.hexdigest()[:16])
        return self._fingerprint[1]


@dataclass
class Memory:
    """All that is kept of a context: S_t of every target layer, whatever its length.

    states: {module name: S (B, d_r, d_r) fp32}, its rows A2's, its columns B1's; tokens: (B,) real tokens read;
    fingerprint: of the generator that wrote it. Memories of different generators cannot be put together.
    """
    states: dict = field(repr=False)
    tokens: torch.Tensor
    fingerprint: str = None

    def __add__(self, other):
        """The memory of contexts read apart, neither under the adapter of the other: S is a sum over tokens (eq. 3).
        Row b is added to row b, a batch of 1 to every row."""
        Memory.check_one_generator([self, other])
        sizes = {len(self.tokens), len(other.tokens)}
        if len(sizes | {1}) > 2:
            raise InputError(f"memories of batches {sizes} cannot be added: they must be equal, or one of them 1")
        states = {}
        for name, S in self.states.items():
            states[name] = S + other.states[name].to(S.device)                  # (B, d_r, d_r)
        return Memory(states, self.tokens + other.tokens, self.fingerprint)

    @classmethod
    def stack(cls, memories):
        """Memories side by side, their rows in order: row b of a batch of queries is then adapted by row b."""
        cls.check_one_generator(memories)
        states = {}
        for name, S in memories[0].states.items():
            states[name] = torch.cat([memory.states[name].to(S.device) for memory in memories])    # (B, d_r, d_r)
        tokens = torch.cat([memory.tokens for memory in memories])              # (B,)
        return cls(states, tokens, memories[0].fingerprint)

    @staticmethod
    def check_one_generator(memories):
        layouts = set()
        for memory in memories:
            shapes = [(name, *S.shape[1:]) for name, S in memory.states.items()]
            layouts.add((memory.fingerprint, *sorted(shapes)))
        if len(layouts) > 1:
            raise InputError("memories of different generators cannot be put together: read the contexts again with "
                             "one generator")

    def save(self, path, **facts):
        """Write to one safetensors file, facts (texts) among its metadata. InputError where that cannot be, and nothing
        is left behind."""
        tensors = {"tokens": self.tokens}
        for name, S in self.states.items():
            tensors[f"S.{name}"] = S.float()
        facts |= {"format": "generative-adapter-memory", "fingerprint": self.fingerprint or ""}
        save_tensors(tensors, path, facts)

    @classmethod
    def load(cls, path):
        """Read a file that save wrote, onto the CPU."""
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != "generative-adapter-memory":
            raise InputError(f"{path} is a safetensors file but not a saved memory")
        tokens = tensors.pop("tokens", torch.zeros(0))
        sound = tokens.dtype == torch.long and tokens.dim() == 1 and len(tokens) > 0
        states = {}
        for name, S in tensors.items():
            sound = sound and S.dtype == torch.float32 and S.dim() == 3 and len(S) == len(tokens) and S.isfinite().all()
            states[name.removeprefix("S.")] = S
        if not sound:
            raise InputError(f"{path}: the saved memory is damaged (sizes disagree or values are not finite)")
        return cls(states, tokens, metadata.get("fingerprint") or None)
