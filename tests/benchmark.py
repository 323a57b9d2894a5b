"""Speed and memory of norm, contextualising and a training step, on a CPU or a CUDA device: a table, and JSON with
--output.

    python tests/benchmark.py --output cpu.json                            # SmolLM2's shape, random weights
    python tests/benchmark.py --shape mistral --output h200.json           # Mistral-7B's, made on the device: 80 GB
    python tests/benchmark.py --shape tiny                                 # a rehearsal in seconds
    python tests/benchmark.py --shape tiny --stream --output stream.json   # only a million tokens into one memory
    python tests/benchmark.py --only chunk                                 # steps of one chunk over the bare base
    python tests/benchmark.py --shape mistral --count                      # a step counted without a GPU, in minutes

Every measurement runs in a process of its own, so that peak memory is its own too; times are the best of --repeats
after one warm-up, but for the steps of one chunk: medians of processor time. On a CPU absolute times say little:
compare the ratios of one run on an idle machine.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import count
from data import doubled
from generator import GeneratorConfig
from model import AdaptedLM
from support.fast import HeadLoss, svd_norm
from support.bases import default_dtype
from support.costs import base_flops, generator_flops
from support.machine import choose_attention, keep_freed_memory, peak_memory

# base, its config, generator, chunks of a training sequence, tokens of a chunk, tokens of each of two contexts
SHAPES = {
    "smollm2": (LlamaForCausalLM,
                LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            intermediate_size=1536, vocab_size=49152,
                            max_position_embeddings=8192, tie_word_embeddings=True), dict(d_r=256, rank=64, scale=1.0),
                8, 128, 1024),
    "mistral": (MistralForCausalLM, MistralConfig(vocab_size=32000, max_position_embeddings=32768),
                dict(d_r=1024, rank=128, scale=1 / 16), 8, 1024, 1024),
    "tiny": (LlamaForCausalLM,
             LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, vocab_size=512), dict(d_r=32, rank=8, scale=1.0),
             4, 32, 64)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_time(function, device, repeats):
    """Seconds of one call: the best of `repeats` after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(args, device):
    """What the hardware gives: a large matrix product in bf16 and fp32, and a copy."""
    n = 8192 if device.type == "cuda" else 2048
    row = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        row[f"matmul_{str(dtype)[6:]}_tflops"] = 2 * n**3 / best_time(lambda: a @ b, device, 5) / 1e12
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    row["copy_gb_per_s"] = 2 * x.numel() * 4 / best_time(lambda: y.copy_(x), device, 5) / 1e9
    return row


def context_S(tokens, d_r, batch, device):
    """S of random tokens whose features fall off as they do in a language model (a power law): (batch, d_r, d_r)."""
    random = torch.Generator().manual_seed(tokens)
    h = torch.randn(batch, tokens, d_r, generator=random) * torch.arange(1, d_r + 1) ** -0.7
    left, right = (h @ torch.randn(d_r, d_r, generator=random) / d_r**0.5 for _ in range(2))
    return (left.mT @ right).to(device)


def norm(args, device):
    """norm of a block's prefixes, (C, d_r, d_r): ours and torch.svd_lowrank, which the released code calls."""
    _, _, generator, C, _, _ = SHAPES[args.shape]
    d_r, r = generator["d_r"], generator["rank"]
    S = context_S(8 * r, d_r, C, device)
    gradient = torch.randn_like(S)

    def lowrank(S):
        U, _, V = torch.svd_lowrank(S, q=r, niter=1)
        return U, V.mT

    def both(function):
        leaf = S.clone().requires_grad_()
        left, right = function(leaf)
        (left @ right).backward(gradient)

    ours = lambda S: svd_norm(S, r)
    with torch.no_grad():
        row = {"shape": list(S.shape), "rank": r,
               "ours_forward_ms": best_time(lambda: ours(S), device, args.repeats) * 1e3,
               "svd_lowrank_forward_ms": best_time(lambda: lowrank(S), device, args.repeats) * 1e3}
    row["ours_forward_backward_ms"] = best_time(lambda: both(ours), device, args.repeats) * 1e3
    row["svd_lowrank_forward_backward_ms"] = best_time(lambda: both(lowrank), device, args.repeats) * 1e3
    row["speedup_forward_backward"] = row["svd_lowrank_forward_backward_ms"] / row["ours_forward_backward_ms"]
    return row


def gradient_distance(args, device):
    """The derivative of norm along changes that keep the rank of S, in float64: ours against central differences of the
    same function, as |ours - numeric| over the root mean square of numeric. Exact for contexts of at most r tokens;
    beyond, it leaves out how the sketched basis turns."""
    _, _, generator, _, _, _ = SHAPES[args.shape]
    d_r, r, row = generator["d_r"], generator["rank"], {}
    random = torch.Generator().manual_seed(0)
    for tokens in (r // 2, r, 2 * r, 16 * r):
        S = context_S(tokens, d_r, 1, "cpu")[0].double()
        sigma = torch.linalg.matrix_norm(S, 2)
        G = torch.randn(d_r, d_r, generator=random).double()
        leaf = S.clone().requires_grad_()
        left, right = svd_norm(leaf, r, 1e-2)
        (left @ right * G).sum().backward()

        def value(S):                                   # lambda stays what it is at S, as in the backward pass
            left, right = svd_norm(S, r, 1e-2 * (sigma / torch.linalg.matrix_norm(S, 2)).item())
            return (left @ right * G).sum()

        pairs = []
        for _ in range(8):
            L, R = (torch.randn(d_r, d_r, generator=random).double() / d_r**0.5 for _ in range(2))
            step = 1e-6 * (L @ S + S @ R)
            pairs.append(torch.stack([(leaf.grad * step).sum(), (value(S + step) - value(S - step)) / 2]))
        ours, numeric = torch.stack(pairs, 1)
        row[f"tokens_{tokens}"] = ((ours - numeric).square().mean().sqrt() / numeric.square().mean().sqrt()).item()
    return row


def make(args, device, adapted=True):
    """A base of the shape with random weights on the device, and the AdaptedLM round it with an A1 that is not zero."""
    kind, config, generator, *_ = SHAPES[args.shape]
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(device):
        base = kind(config).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    if not adapted:
        return base
    model = AdaptedLM(base, GeneratorConfig(**generator))
    for layer in model.generator.layers:
        torch.nn.init.normal_(layer.A1, std=0.02)
    return model


def contextualising(args, device):
    """Reading 2 contexts of a chunk each, beside the plain forward pass of the same tokens without lm_head, and with
    it."""
    model, length = make(args, device), SHAPES[args.shape][5]
    ids = torch.randint(model.base.config.vocab_size, (2, length), device=device)
    with torch.no_grad():
        row = {"tokens": ids.numel(),
               "plain_s": best_time(lambda: model.base.get_decoder()(ids, use_cache=False), device, args.repeats),
               "plain_logits_s": best_time(lambda: model.base(ids, use_cache=False), device, args.repeats),
               "contextualise_s": best_time(lambda: model.contextualize(ids), device, args.repeats)}
    return {**row, "ratio": row["contextualise_s"] / row["plain_s"],
            "tokens_per_s": ids.numel() / row["contextualise_s"]}


def decoding(args, device):
    """Greedy tokens after a short prompt: the base alone, the base with an adapter merged into its weights, and the
    adapter beside the weights. Left out where peft is not installed."""
    import peft
    base, model, new = make(args, device, adapted=False), make(args, device), 64
    prompt = torch.randint(base.config.vocab_size, (1, 8), device=device)
    memory = model.contextualize(prompt)
    with tempfile.TemporaryDirectory() as directory:
        model.export_peft(memory, directory)
        merged = peft.PeftModel.from_pretrained(make(args, device, adapted=False), directory).merge_and_unload()
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "attention_mask": torch.ones_like(prompt)}
    calls = {"base": lambda: base.generate(prompt, **options), "merged": lambda: merged.generate(prompt, **options),
             "adapter": lambda: model.generate(prompt, memory, **options)}
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(args.repeats):                       # in turns, so that the clock's drift meets all alike
        for name, call in calls.items():
            seconds[name] = min(seconds[name], best_time(call, device, 1))
    return {**{f"{name}_tokens_per_s": new / s for name, s in seconds.items()},
            "merged_speed": seconds["base"] / seconds["merged"], "adapter_speed": seconds["base"] / seconds["adapter"]}


def stream(args, device):
    """A context of --stream tokens read chunk by chunk. After a tenth of it, peak memory should grow by less than 1 %;
    the median time of a chunk in the last tenth should be at most 1.1 times that in the first. S is fp32 and finite
    throughout."""
    model, memory, seconds, L = make(args, device), None, [], 1024
    chunks = max(args.stream // L, 20)
    for t in range(chunks):
        chunk = torch.randint(model.base.config.vocab_size, (1, L)).to(device)
        synchronize(device)
        start = time.perf_counter()
        memory = model.contextualize(chunk, memory=memory)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        assert all(S.dtype == torch.float32 for S in memory.states.values())
        if t == chunks // 10:
            warm = peak_memory(device)
    assert all(S.isfinite().all() for S in memory.states.values())
    first, last = (torch.tensor(part).median().item() for part in (seconds[:chunks // 10], seconds[-(chunks // 10):]))
    return {"tokens": memory.tokens.item(), "chunks": chunks, "first_decile_ms": first * 1e3,
            "last_decile_ms": last * 1e3, "last_over_first": last / first,
            "peak_memory_gb": peak_memory(device), "peak_growth_percent": 100 * (peak_memory(device) / warm - 1),
            "largest_S": max(S.abs().max().item() for S in memory.states.values())}


def random_batch(args, device, batch, C, L):
    """segments (B, 2C, L), visible and labels of random tokens."""
    tokens = torch.randint(SHAPES[args.shape][1].vocab_size, (batch, C * L))
    segments, _, visible, labels = doubled(tokens, C, pad=0)
    labels[:, 0] = -100                                                 # segment 0 has no adapter: train.py masks it
    return segments.to(device), visible, labels.to(device)


def our_step(model, segments, visible, labels):
    """A function that takes a training step on them as train.py does."""
    choose_attention(model.base, segments.shape[-1])
    parameters, layers = list(model.generator.parameters()), model.generator.layers
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=segments.device)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)

    def run():
        nats, tokens = model.segment_losses(segments, None, visible, labels)
        (nats.sum() / tokens.sum()).backward()
        for layer in layers:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), len(layers) ** -0.5)
        optimizer.step()
        flat.zero_()

    return run


def bare(base, segments):
    """Forward and backward of the frozen base alone, to the embeddings of segments (B, L)."""
    embeds = base.get_input_embeddings()(segments).requires_grad_()                 # (B, L, d_h)
    hidden = base.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    HeadLoss.apply(hidden.reshape(-1, hidden.shape[-1]), segments[:, 1:].flatten(),
                   base.get_output_embeddings()).mean().backward()


def step(args, device, kind):
    """A training step on one doubled sequence. kind: "bare" is the frozen base alone, forward and backward to the
    embeddings under the same loss; "step" adds the generator and AdamW; "checkpointing" recomputes activations."""
    if device.type == "cpu":
        keep_freed_memory()
    elif args.dtype == "bfloat16":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    _, config, _, C, L, _ = SHAPES[args.shape]
    segments, visible, labels = random_batch(args, device, args.batch, C, L)
    if kind == "bare":
        base, flops = make(args, device, adapted=False), 0
        choose_attention(base, L)
        run = lambda: bare(base, segments.flatten(0, 1))
    else:
        model = make(args, device)
        model.checkpointing = config.num_hidden_layers if kind == "checkpointing" else 0
        run = our_step(model, segments, visible, labels)
        # forward, and backward to the hidden states alone: twice the frozen base, but once and without lm_head for
        # segment 0; generator weights have a gradient too: three times. Recomputation is no model FLOP
        flops = args.batch * (2 * (2 * C - 1) * base_flops(model.base, L) + base_flops(model.base, L, head=False)
                              + 3 * generator_flops(model, C * L, C))
    seconds = best_time(run, device, args.repeats)
    return {"seconds": seconds, "context_tokens_per_s": args.batch * C * L / seconds,
            "peak_memory_gb": peak_memory(device), "model_tflops": flops / 1e12}


def chunk_step(args, device, batch, L):
    """A reconstruction step on `batch` contexts of one chunk of L tokens, in fp32 on one thread, over what the bare
    base needs for it: a forward pass of the context, forward and backward of the second half. Medians of the process's
    own time, in turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    args.dtype = "float32"
    base = make(args, device, adapted=False)
    segments, visible, labels = random_batch(args, device, batch, 1, L)
    ours = our_step(make(args, device), segments, visible, labels)

    def theirs():
        with torch.no_grad():
            base.get_decoder()(segments[:, 0], use_cache=False)
        bare(base, segments[:, 1])

    seconds = {ours: [], theirs: []}
    for _ in range(max(5, args.repeats) + 1):
        for function, times in seconds.items():
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    ours, theirs = (statistics.median(times[1:]) for times in seconds.values())
    return {"ours_s": ours, "bare_s": theirs, "ratio": ours / theirs}


def run_job(function, args, options):
    torch.set_num_threads(args.threads)
    return function(args, torch.device(args.device), **options)


def compare(results, args):
    """The ratios worth a table, {name: value}; adds norm's share and utilisation to the rows of the steps."""
    ratios, layers = {}, SHAPES[args.shape][1].num_hidden_layers
    forward, both = results["norm"]["ours_forward_ms"] / 1e3, results["norm"]["ours_forward_backward_ms"] / 1e3
    for name in ("step", "checkpointing"):
        if name in results:
            row = results[name]
            again = forward if name == "checkpointing" else 0
            row["norm_share"] = layers * args.batch * (both + again) / row["seconds"]
            ceiling = results["ceilings"][f"matmul_{args.dtype}_tflops"]
            row["model_flops_utilisation"] = row["model_tflops"] / row["seconds"] / ceiling
            if "bare" in results:
                ratios[f"{name} / bare"] = row["seconds"] / results["bare"]["seconds"]
                ratios[f"{name} / bare, peak memory"] = row["peak_memory_gb"] / results["bare"]["peak_memory_gb"]
            ratios[f"{name}, norm's share"] = row["norm_share"]
            ratios[f"{name}, model FLOPs utilisation"] = row["model_flops_utilisation"]
    ratios["contextualising / plain forward"] = results["contextualising"]["ratio"]
    if "decoding" in results:
        ratios["decoding speed, merged / base"] = results["decoding"]["merged_speed"]
        ratios["decoding speed, adapter beside the weights / base"] = results["decoding"]["adapter_speed"]
    for name in results:
        if name.startswith("chunk"):
            ratios["step of one " + name.replace("_", " ") + " / bare"] = results[name]["ratio"]
    ratios["norm forward + backward, svd_lowrank / ours"] = results["norm"]["speedup_forward_backward"]
    if "step_bfloat16" in results:
        ratios["step, fp32 / bf16"] = results["step"]["seconds"] / results["step_bfloat16"]["seconds"]
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the base; default bfloat16 where the hardware has it; float32 there has a step in bfloat16 beside it")
    add("--batch", type=int, default=1, help="sequences of a training step")
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    add("--stream", nargs="?", type=int, const=1_000_000, metavar="TOKENS",
        help="only read a context of this many tokens chunk by chunk (default 1,000,000)")
    add("--only", default="", help="measure only what starts with this, and print no table")
    add("--count", action="store_true", help="only count a training step as a GPU would run it (tests/count.py)")
    add("--chunk", type=int, help="--count: tokens of a chunk; default the shape's")
    add("--checkpointing", type=int, default=0, metavar="N", help="--count: also with the first N blocks recomputed")
    add("--output", help="write all figures as JSON")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    if args.count:
        args.dtype, (*_, C, L, _) = "bfloat16", SHAPES[args.shape]
        return count.report(make(args, torch.device("meta")), args.batch, C, args.chunk or L, args.checkpointing)
    has_bfloat16 = default_dtype(torch.device(args.device)) == torch.bfloat16
    args.dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float32")
    jobs = [("ceilings", ceilings, {}), ("norm", norm, {}), ("gradient_distance", gradient_distance, {}),
            ("contextualising", contextualising, {}),
            *([("decoding", decoding, {})] if importlib.util.find_spec("peft") else [])]
    if args.shape != "mistral":                         # without checkpointing its activations alone are 100 GB
        jobs += [("bare", step, {"kind": "bare"}), ("step", step, {"kind": "step"})]
    jobs += [("checkpointing", step, {"kind": "checkpointing"})]
    if cpu and args.shape != "mistral":
        jobs += [(f"chunk_of_{L}", chunk_step, {"batch": batch, "L": L}) for batch, L in ((4, 64), (8, 16))]
    if args.dtype == "float32" and has_bfloat16 and args.shape != "mistral":
        jobs += [("bare_bfloat16", step, {"kind": "bare"}), ("step_bfloat16", step, {"kind": "step"})]
    if args.stream:
        both = args.dtype == "float32" and has_bfloat16
        jobs = [("stream", stream, {}), *([("stream_bfloat16", stream, {})] if both else [])]
    results, pool = {}, multiprocessing.get_context("spawn")
    for name, function, options in jobs:
        if not name.startswith(args.only):
            continue
        if name.endswith("bfloat16"):
            args = argparse.Namespace(**{**vars(args), "dtype": "bfloat16"})
        with pool.Pool(1) as worker:
            results[name] = worker.apply(run_job, (function, args, options))
        print(f"{name:18s} " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                         for k, v in results[name].items()), flush=True)

    if args.only:
        return
    ratios = {}
    if args.stream:
        for name, row in results.items():
            ratios |= {f"{name}: chunk time, last tenth / first": row["last_over_first"],
                       f"{name}: peak memory growth, percent": row["peak_growth_percent"]}
    else:
        ratios = compare(results, args)
    print("\n| figure | value |\n| --- | --- |")
    for name, value in ratios.items():
        print(f"| {name} | {value:.3g} |")
    if args.output:
        facts = {"shape": args.shape,
                 "device": torch.cuda.get_device_name() if not cpu else platform.processor() or platform.machine(),
                 "threads": args.threads, "batch": args.batch,
                 "torch": torch.__version__, "transformers": transformers.__version__}
        with open(args.output, "w") as file:
            json.dump({**facts, "results": results, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main()
