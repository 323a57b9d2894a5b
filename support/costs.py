"""Costs from shapes, for Table 1 and Fig. 3: 2 FLOPs a weight and token, and attention over the keys before it.
evaluate.py needs it."""

import math
import time

import torch

COSTS = ("inference_tflops", "released_tflops", "contextualisation_tflops", "storage_mfloats",
         "contextualisation_seconds", "context_tokens")


def shape(base):
    """(weights of the blocks' linear layers, of lm_head, width of a token's queries in all blocks, of its keys)."""
    config = base.config.get_text_config()
    weights = 0
    for module in base.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            weights += module.weight.numel()
    lm_head = base.get_output_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * head_dim
    return weights, lm_head, width * config.num_attention_heads, width * config.num_key_value_heads


def base_flops(base, tokens, past=0, head=True):
    """FLOPs of the base for that many tokens after `past` cached ones. head=False: without lm_head, as a context is
    read."""
    weights, lm_head, queries, _ = shape(base)
    if head:
        weights += lm_head
    pairs = tokens * past + tokens * (tokens + 1) / 2                   # of a query and a key
    return 2 * weights * tokens + 4 * queries * pairs                   # 2 for q k, 2 for v


def query_costs(base, tokens, past):
    """TFLOPs of a question and its answer after `past` cached tokens: ours, and as the released code counts them
    (fastlora/eval_utils.py, estimate_flops), for the figures of Table 1: one operation a multiply-add, and attention of
    q tokens as q (q context) d, quadratic in q."""
    weights, lm_head, queries, _ = shape(base)
    released = tokens * (weights + lm_head) + queries * tokens * (tokens * past)
    flops = base_flops(base, tokens, past)
    return {"inference_tflops": flops / 1e12, "released_tflops": released / 1e12}


def kv_cache_floats(base, tokens):
    _, _, _, keys = shape(base)
    return 2 * keys * tokens


def context_costs(model, tokens):
    """TFLOPs of reading a context, chunk by chunk; M floats of its LoRA adapter, which is kept to answer about it.

    Counted are the base without lm_head and the generator's matrix products: projections and S for each token, norm and
    LoRA pair for each chunk; of norm (svd) the four products with S, the eight of (d_r, r) with (r, r) and the 36 of
    (r, r), those of a damping of 1e-2."""
    config = model.config
    chunks = math.ceil(tokens / min(config.chunk, model.window))
    d_r = config.d_r
    r = config.rank
    if config.norm == "frobenius":
        r = d_r
    flops = chunks * base_flops(model.base, tokens / chunks, head=False)
    floats = 0
    for layer in model.generator.layers:
        pair = layer.B2.numel() + layer.A1.numel()                      # d_r (d_in + d_out)
        floats += r * pair // d_r
        flops += tokens * (4 * layer.A2.numel() + 2 * d_r**2)
        if config.norm == "frobenius":                                  # lora_A = N B2; lora_B is s A1 itself
            pair = layer.B2.numel()
        flops += chunks * 2 * r * pair
        if config.norm == "svd":
            flops += chunks * (8 * d_r**2 * r + 16 * d_r * r**2 + 72 * r**3)
    return {"contextualisation_tflops": flops / 1e12, "storage_mfloats": floats / 1e6}


def clock(device):
    """Seconds, once all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.time()
