"""The aligned start of a generator, for train.py --init aligned: A2, B1, B2 from the base's own statistics. It is ours,
not in the paper.

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
def aligned_start(model, batches, quiet=False):
    """Set A2, B1, B2 of every LayerGenerator of model (an AdaptedLM) in place. batches: a list of token ids (B, L) of
    plain text, some 12,000 tokens in all; the same text gives the same start. Second moments are summed in float64 over
    the batches, for as many blocks at a time as MEMORY allows."""
    d_h = model.base.config.get_text_config().hidden_size
    floats = 0
    for name in model.block_targets[0]:
        floats += (d_h + model.base.get_submodule(name).in_features) ** 2       # C_hh, C_he, C_zz, C_hz
    group = max(1, int(MEMORY / (8 * floats)))
    for first in range(0, len(model.blocks), group):
        blocks = range(len(model.blocks))[first:first + group]
        C, mean = second_moments(model, blocks, batches, quiet)
        for l in tqdm(blocks, desc="aligned start", leave=False, disable=quiet):
            values, _ = canonical(C, mean, l, "e")                              # (d_h, k)
            for name in model.block_targets[l]:
                keys, queries = canonical(C, mean, l, name)                     # (d_h, k), (d_in, k)
                layer = model.generator.by_name[name]
                set_rows(layer.A2, values, C[l, l], 1)
                set_rows(layer.B1.T, keys, C[l, l], 1)
                set_rows(layer.B2, queries, C[name, name], QUERY_SCALE)


def second_moments(model, blocks, batches, quiet=False):
    """C[x, y] (d_x, d_y), the sum of x y^T over the tokens of batches, and mean[x] (d_x,), that of x, float64: the
    number of tokens drops out of what follows. x and y: "e", the number of one of these blocks for its h, the name of a
    target for its z."""
    watched = {}
    pairs = [("e", "e")]
    for l in blocks:
        watched[l] = model.blocks[l]
        pairs += [(l, l), (l, "e")]
        for name in model.block_targets[l]:
            watched[name] = model.base.get_submodule(name)
            pairs += [(name, name), (l, name)]
    inputs, hooks = {}, []
    for key, module in watched.items():
        keep = lambda module, args, key=key: inputs.update({key: args[0]})
        hooks.append(module.register_forward_pre_hook(keep))

    C, mean = defaultdict(float), defaultdict(float)
    for ids in tqdm(batches, desc="aligned start, statistics", leave=False, disable=quiet):
        ids = ids.to(model.base.device)
        model.base.get_decoder()(input_ids=ids, use_cache=False)
        rows = {"e": model.base.get_input_embeddings()(ids[:, 2:])}             # positions i+1
        for l in blocks:
            rows[l] = rms_norm(inputs[l][:, 2:].float())                        # positions i+1
            for name in model.block_targets[l]:
                rows[name] = inputs[name][:, 1:-1]                              # positions i
        for key, x in rows.items():
            rows[key] = x.flatten(0, 1).float()                                 # (T, d_x)
            mean[key] += rows[key].sum(0).double()
        for x, y in pairs:
            C[x, y] += (rows[x].mT @ rows[y]).double()                          # the products are fp32
    for hook in hooks:
        hook.remove()
    return C, mean


def set_rows(weight, K, C, factor):
    """The rows of weight (n, d) from directions K (d, k): at factor times the amplitude that random rows have on data
    of second moments C (d, d). Rows beyond k stay random."""
    K = K[:, :len(weight)].T                                                    # (k, d)
    k, d = K.shape
    energy = (K @ C * K).sum()                                                  # E|K x|^2
    random = C.trace() * k / (3 * d)                                            # random rows have variance 1 / 3d
    weight[:k] = factor * (random / energy).sqrt() * K


def canonical(C, mean, h, x):
    """Canonical directions of h and x without their mean directions, each column times rho^(1/2): K_h (d_h, k) and
    K_x (d_x, k), k = min(d_h, d_x)."""
    P, F_h = without_mean(C[h, h], mean[h])
    R, F_x = without_mean(C[x, x], mean[x])
    M = solve_triangular(F_h, P @ C[h, x] @ R, upper=False)
    M = solve_triangular(F_x, M.mT, upper=False).mT                             # F_h^-1 C_hx F_x^-T (d_h, d_x)
    square, U = torch.linalg.eigh(M @ M.mT)                                     # rho^2, ascending; an SVD takes longer
    k = min(M.shape)
    U = U.flip(-1)[:, :k]                                                       # (d_h, k)
    rho = square.flip(-1)[:k].clamp(min=1e-30).sqrt()                           # (k,)
    V = M.mT @ U / rho                                                          # (d_x, k)
    K_h = solve_triangular(F_h.mT, U * rho.sqrt(), upper=True)                  # (d_h, k)
    K_x = solve_triangular(F_x.mT, V * rho.sqrt(), upper=True)                  # (d_x, k)
    return P @ K_h, R @ K_x


def without_mean(C, mean):
    """P = I - u u^T, u the direction of the mean, and the Cholesky factor of P C P + ridge."""
    u = mean / mean.norm().clamp(min=1e-30)
    P = torch.eye(len(C)).to(C) - torch.outer(u, u)
    C = P @ C @ P
    C.diagonal().add_(RIDGE * C.trace() / len(C) + 1e-30)
    return P, torch.linalg.cholesky(C)
