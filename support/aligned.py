"""The aligned start of a generator, for train.py: A2, B1, B2 from the base's own statistics. Ours, not in the paper.

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
    names, layers = model.block_targets, model.generator.layers
    adapted = [l for l, some in enumerate(names) if some]
    d_h, widest = len(layers[0].g), max(layer.B2.shape[1] for layer in layers)
    group = max(1, int(MEMORY / (8 * (2 * d_h**2 + len(model.config.targets) * widest * (widest + d_h)))))
    for at in range(0, len(adapted), group):
        blocks, moments = adapted[at:at + group], defaultdict(float)
        for ids in tqdm(batches, desc="aligned start, statistics", unit="batch", leave=False):
            add_moments(moments, model, blocks, ids)
        tokens = moments.pop("T")
        for sums in moments.values():
            sums /= tokens
        for l in tqdm(blocks, desc="aligned start", unit="block", leave=False):
            values, _ = canonical(moments[l, "he"], moments[l, "hh"], moments["ee"], moments[l, "h"], moments["e"])
            for name in names[l]:
                set_layer(model.generator[name], values, moments, l, name)


def add_moments(moments, model, blocks, ids):
    """Add the sums of h, z, e and their products over one forward pass of ids (B, L) to moments, for these blocks."""
    watched = {l: model.blocks[l] for l in blocks} | {
        name: model.base.get_submodule(name) for l in blocks for name in model.block_targets[l]}
    inputs, ids = {}, ids.to(model.base.device)
    hooks = [module.register_forward_pre_hook(lambda module, args, key=key: inputs.update({key: args[0]}))
             for key, module in watched.items()]
    model.base.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    def add(key, x, y=None):                                                    # sums over tokens, products in fp32
        moments[key] += (x.sum(0) if y is None else x.mT @ y).double()

    e = model.base.get_input_embeddings()(ids)[:, 2:].flatten(0, 1).float()     # (T, d_h)
    moments["T"] += len(e)
    add("e", e), add("ee", e, e)
    for l in blocks:
        h = rms_norm(inputs[l][:, 2:].float()).flatten(0, 1)                    # (T, d_h), positions i+1
        add((l, "h"), h), add((l, "hh"), h, h), add((l, "he"), h, e)
        for name in model.block_targets[l]:
            z = inputs[name][:, 1:-1].flatten(0, 1).float()                     # (T, d_in), positions i
            add((name, "z"), z), add((name, "zz"), z, z), add((name, "hz"), h, z)


def set_layer(layer, values, C, l, name):
    """A2, B1, B2 of one LayerGenerator from the values (d_h, k) of block l and the moments C of target name. Rows
    beyond k stay random."""
    hh, zz, mean = C[l, "hh"], C[name, "zz"], C[l, "h"]
    keys, queries = canonical(C[name, "hz"], hh, zz, mean, C[name, "z"])
    for weight, K, C_xx, factor in (
            (layer.B1.T, keys, hh, 1), (layer.A2, values, hh, 1), (layer.B2, queries, zz, QUERY_SCALE)):
        K = K[:, :len(weight)].T                                                # (k, d)
        energy = ((K @ C_xx) * K).sum()                                         # E|K x|^2
        random = C_xx.diagonal().sum() * len(K) / (3 * len(C_xx))               # its start has variance 1 / (3 fan_in)
        weight[:len(K)] = (factor * (random / energy).sqrt() * K).to(weight.dtype)


def canonical(C_hx, C_hh, C_xx, mean_h, mean_x):
    """Canonical directions of h and x without their mean directions, each column times rho^(1/2): K_h (d_h, k) and
    K_x (d_x, k), k = min(d_h, d_x)."""
    u, v = (mean / mean.norm().clamp(min=1e-30) for mean in (mean_h, mean_x))

    def project(C, u, v):                                                       # (I - u u^T) C (I - v v^T)
        C = C - torch.outer(u, u @ C)
        return C - torch.outer(C @ v, v)

    def factor(C, u):
        C, eye = project(C, u, u), torch.eye(len(C), dtype=C.dtype, device=C.device)
        return torch.linalg.cholesky(C + (RIDGE * C.diagonal().mean() + 1e-30) * eye)

    F_h, F_x = factor(C_hh, u), factor(C_xx, v)
    M = torch.linalg.solve_triangular(F_h, project(C_hx, u, v), upper=False)
    M = torch.linalg.solve_triangular(F_x, M.mT, upper=False).mT                # F_h^-1 C_hx F_x^-T (d_h, d_x)
    square, U = torch.linalg.eigh(M @ M.mT)                                     # rho^2, ascending; an SVD takes longer
    rho, U = square.flip(-1).clamp(min=1e-30).sqrt()[:len(C_xx)], U.flip(-1)[:, :len(C_xx)]        # (k,), (d_h, k)
    K_h = torch.linalg.solve_triangular(F_h.mT, U * rho.sqrt(), upper=True)     # (d_h, k)
    K_x = torch.linalg.solve_triangular(F_x.mT, M.mT @ U / rho.sqrt(), upper=True)         # V rho^(1/2)
    return K_h - torch.outer(u, u @ K_h), K_x - torch.outer(v, v @ K_x)
