"""The aligned start of a generator, for train.py --init aligned: A2, B1, B2 from the base's own statistics. Ours, not in the paper.

S = sum_i a_i b_i^T holds values a_i = A2 h_i under keys b_i = B1^T h_i, and W_Delta z = s A1 norm(S) (B2 z) reads with
the query B2 z. The residual stream h_{i+1} before a block knows the token before it, and the input z_i of a target
linear knows token i, so the pair (h_{i+1}, z_i) of plain text is the pair (key, query) that copying needs, and the
token at i+1 is the value. A random start has to learn this first.

With h RMS-normalised, e the embedding of h's own token, second moments C over positions i >= 1 (the first token is an
attention sink) and the mean direction m projected out of each, P = I - m m^T / |m|^2 (a direction that all keys share
would answer every query alike), the canonical correlations rho are the singular values in

    keys and queries   W_h^T C_hz W_z = U rho V^T       B1 = P W_h U rho^(1/2)         B2 = (P W_z V rho^(1/2))^T
    values             W_h^T C_he W_e = U' rho' V'^T    A2 = (P W_h U' rho'^(1/2))^T   A1 = 0, g = 1: W_Delta is still 0

with the d_r leading directions and W_h^T C_hh W_h = I, W_h = F_h^-T from the Cholesky factor F_h of C_hh + RIDGE. A2
and B1 are scaled to the energy that the random start has on the same data, B2 to QUERY_SCALE times its amplitude.
"""

from collections import defaultdict

import torch
from torch.linalg import solve_triangular
from tqdm import tqdm

from generator import rms_norm

RIDGE = 1e-2             # of the mean eigenvalue
QUERY_SCALE = 9.0        # root mean square of B2 z over that of the random start
MEMORY = 4e9             # bytes of second moments held at once; blocks beyond take another pass over the text


@torch.no_grad()
def aligned_start(model, batches):
    """Set A2, B1, B2 of every LayerGenerator of model (an AdaptedLM) in place. batches: a list of token ids (B, L) of
    plain text, some 12,000 tokens in all; the same text gives the same start. Second moments are summed in float64 over
    the batches, for as many blocks at a time as MEMORY allows."""
    d_h = model.base.config.get_text_config().hidden_size
    floats = 2 * d_h**2                                                         # C_hh, C_he of a block
    for name in model.block_targets[0]:
        d_in = model.base.get_submodule(name).in_features
        floats += d_in**2 + d_h * d_in                                          # C_zz, C_hz of a target
    group = max(1, int(MEMORY / (8 * floats)))
    all_blocks = range(len(model.blocks))
    for first in all_blocks[::group]:
        blocks = all_blocks[first:first + group]
        C = defaultdict(float)
        for ids in tqdm(batches, desc="aligned start, statistics", unit="batch", leave=False):
            add_moments(C, model, blocks, ids.to(model.base.device))
        tokens = C.pop("tokens")
        for total in C.values():
            total /= tokens
        for l in tqdm(blocks, desc="aligned start", unit="block", leave=False):
            hh = C[l, "hh"]
            h = C[l, "h"]
            he = C[l, "he"]
            values, _ = canonical(he, hh, C["ee"], h, C["e"])                   # (d_h, k)
            for name in model.block_targets[l]:
                layer = model.generator[name]
                hz = C[name, "hz"]
                zz = C[name, "zz"]
                z = C[name, "z"]
                keys, queries = canonical(hz, hh, zz, h, z)
                set_rows(layer.A2, values, hh, 1)
                set_rows(layer.B1.T, keys, hh, 1)
                set_rows(layer.B2, queries, zz, QUERY_SCALE)


def add_moments(C, model, blocks, ids):
    """Add the sums over tokens of h, z, e and their products, of one forward pass of ids (B, L), for these blocks. The
    products are fp32."""
    watched = {}
    for l in blocks:
        watched[l] = model.blocks[l]
        for name in model.block_targets[l]:
            watched[name] = model.base.get_submodule(name)
    inputs, hooks = {}, []
    for key, module in watched.items():
        keep = lambda module, args, key=key: inputs.update({key: args[0]})
        hooks.append(module.register_forward_pre_hook(keep))
    model.base.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    e = model.base.get_input_embeddings()(ids)
    e = e[:, 2:].flatten(0, 1).float()                                          # (T, d_h)
    C["tokens"] += len(e)
    C["e"] += e.sum(0).double()
    C["ee"] += (e.mT @ e).double()
    for l in blocks:
        h = rms_norm(inputs[l].float())
        h = h[:, 2:].flatten(0, 1)                                              # (T, d_h), positions i+1
        C[l, "h"] += h.sum(0).double()
        C[l, "hh"] += (h.mT @ h).double()
        C[l, "he"] += (h.mT @ e).double()
        for name in model.block_targets[l]:
            z = inputs[name].float()
            z = z[:, 1:-1].flatten(0, 1)                                        # (T, d_in), positions i
            C[name, "z"] += z.sum(0).double()
            C[name, "zz"] += (z.mT @ z).double()
            C[name, "hz"] += (h.mT @ z).double()


def set_rows(weight, K, C, factor):
    """The rows of weight (n, d) from directions K (d, k): at factor times the amplitude that random rows have on data
    of second moments C (d, d). Rows beyond k stay random."""
    K = K[:, :len(weight)].T                                                    # (k, d)
    k, d = K.shape
    energy = (K @ C * K).sum()                                                  # E|K x|^2
    random = C.trace() * k / (3 * d)                                            # random rows have variance 1 / 3d
    amplitude = factor * (random / energy).sqrt()
    weight[:k] = amplitude * K


def canonical(C_hx, C_hh, C_xx, mean_h, mean_x):
    """Canonical directions of h and x without their mean directions, each column times rho^(1/2): K_h (d_h, k) and
    K_x (d_x, k), k = min(d_h, d_x)."""
    P = without(mean_h)
    R = without(mean_x)
    F_h = factor_of(P @ C_hh @ P)
    F_x = factor_of(R @ C_xx @ R)
    M = solve_triangular(F_h, P @ C_hx @ R, upper=False)
    M = solve_triangular(F_x, M.mT, upper=False).mT                             # F_h^-1 C_hx F_x^-T (d_h, d_x)
    square, U = torch.linalg.eigh(M @ M.mT)                                     # rho^2, ascending; an SVD takes longer
    k = min(M.shape)
    U = U.flip(-1)[:, :k]                                                       # (d_h, k)
    rho = square.flip(-1)[:k]
    rho = rho.clamp(min=1e-30).sqrt()                                           # (k,)
    V = M.mT @ U / rho                                                          # (d_x, k)
    root = rho.sqrt()
    K_h = solve_triangular(F_h.mT, U * root, upper=True)                        # (d_h, k)
    K_x = solve_triangular(F_x.mT, V * root, upper=True)                        # (d_x, k)
    return P @ K_h, R @ K_x


def without(mean):
    """I - u u^T, u the direction of the mean."""
    u = mean / mean.norm().clamp(min=1e-30)
    return torch.eye(len(u)).to(u) - torch.outer(u, u)


def factor_of(C):
    """The Cholesky factor of C + ridge."""
    ridge = RIDGE * C.trace() / len(C) + 1e-30
    C = C.clone()
    C.diagonal().add_(ridge)
    return torch.linalg.cholesky(C)
