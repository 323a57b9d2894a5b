"""Costs from shapes, for Table 1 and Fig. 3: 2 FLOPs a weight and token, and attention over the keys before it.
evaluate.py, fine-tuning and tests/benchmark.py need it."""

import time

import torch

from model import find_blocks

COSTS = ("inference_tflops", "contextualisation_tflops", "storage_mfloats", "contextualisation_seconds")


def widths(base):
    """(weights of the blocks' linear layers, of lm_head, width of a token's queries in all blocks, of its keys)."""
    c = base.config.get_text_config()
    width = c.num_hidden_layers * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    weights = sum(m.weight.numel() for m in find_blocks(base)[1].modules() if isinstance(m, torch.nn.Linear))
    lm_head = base.get_output_embeddings().weight.numel()
    return weights, lm_head, width * c.num_attention_heads, width * c.num_key_value_heads


def window(base):
    """Tokens that the base can read at once."""
    return base.config.get_text_config().max_position_embeddings


def base_flops(base, tokens, past=0, head=True):
    """FLOPs of the base for that many tokens after `past` cached ones. head=False: without lm_head, as a context is
    read."""
    weights, lm_head, queries, _ = widths(base)
    pairs = tokens * past + tokens * (tokens + 1) / 2                  # of a query and a key
    return 2 * (weights + head * lm_head) * tokens + 4 * queries * pairs               # 2 for q k, 2 for v


def released_flops(base, tokens, context):
    """Inference as the released code counts it (fastlora/eval_utils.py, estimate_flops), for the figures of Table 1:
    one operation a multiply-add, and attention of q tokens as q (q context) d, quadratic in q."""
    weights, lm_head, queries, _ = widths(base)
    return tokens * (weights + lm_head) + queries * tokens * (tokens * context)


def kv_cache_floats(base, tokens):
    return 2 * widths(base)[3] * tokens


def generator_flops(model, tokens, chunks):
    """FLOPs of the generator's matrix products for a context: projections and S for each token, norm and LoRA pair for
    each chunk. Of norm (svd) the four products with S and the nine of (d_r, r) with (r, r) are counted."""
    d_r, r, total = model.config.d_r, model.config.adapter_rank, 0
    norm = 8 * d_r * d_r * r + 18 * d_r * r * r if model.config.norm == "svd" else 0
    with_A1 = model.config.norm != "frobenius"                              # whose lora_B is s A1 itself
    for layer in model.generator.layers:
        d_out, d_in, d_h = len(layer.A1), layer.B2.shape[1], len(layer.g)
        total += tokens * (4 * d_h * d_r + 2 * d_r * d_r) + chunks * (norm + 2 * r * d_r * (d_in + d_out * with_A1))
    return total


def context_flops(model, tokens):
    """FLOPs of contextualising: the base without lm_head, chunk by chunk, and the generator."""
    chunks = -(-tokens // model.config.chunk)
    sizes = [tokens // chunks + (i < tokens % chunks) for i in range(chunks)]
    return sum(base_flops(model.base, n, head=False) for n in sizes) + generator_flops(model, tokens, chunks)


def adapter_floats(model):
    """Floats of one LoRA adapter, r (d_in + d_out) a target layer: what is kept of a context to answer about it."""
    return sum(model.config.adapter_rank * (layer.B2.shape[1] + len(layer.A1)) for layer in model.generator.layers)


def clock(device):
    """Seconds, once all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.time()
