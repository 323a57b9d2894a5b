"""Speed and memory of norm, contextualising and a training step, on a CPU or a CUDA device; JSON with --output.

    python tests/benchmark.py --output cpu.json                            # SmolLM2's shape, random weights
    python tests/benchmark.py --shape mistral --output h200.json           # Mistral-7B's, made on the device: 80 GB
    python tests/benchmark.py --shape tiny                                 # a rehearsal in seconds
    python tests/benchmark.py --shape tiny --stream                        # only a million tokens into one memory
    python tests/benchmark.py --only chunk                                 # steps of one chunk over the base alone
    python tests/benchmark.py --shape mistral --count                      # a step counted without a GPU, in minutes

Every measurement runs in a process of its own, so that peak memory is its own too; times are the best of --repeats
after one warm-up, but for the steps of one chunk: medians of processor time. On a CPU absolute times say little:
compare the ratios of one run on an idle machine.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import count
from data import doubled
from generator import GeneratorConfig, svd_norm
from model import AdaptedLM
from support.bases import default_dtype
from support.fast import HeadLoss
from train import keep_freed_memory

# base, its config, generator, chunks of a training sequence, tokens of a chunk, tokens of each of two contexts
SHAPES = {
    "smollm2": (LlamaForCausalLM,
                LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
                            tie_word_embeddings=True),
                dict(d_r=256, rank=64, scale=1.0), 8, 128, 1024),
    "mistral": (MistralForCausalLM, MistralConfig(vocab_size=32000, max_position_embeddings=32768),
                dict(d_r=1024, rank=128, scale=1 / 16), 8, 1024, 1024),
    "tiny": (LlamaForCausalLM,
             LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, vocab_size=512), dict(d_r=32, rank=8, scale=1.0), 4, 32, 64)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepare_cpu(base, L):
    """What train.py sets for chunks of L tokens."""
    if base.device.type == "cpu":
        keep_freed_memory()
        if base.dtype == torch.bfloat16 and L <= 256:
            base.set_attn_implementation("eager")


def peak_memory(device):
    """Peak memory of this process in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource                                     # which Windows has not
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


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


def norm(args, device):
    """norm of a block's prefixes, (C, d_r, d_r): ours and torch.svd_lowrank, which the released code calls. S is of
    random tokens whose features fall off as they do in a language model, by a power law."""
    _, _, generator, C, _, _ = SHAPES[args.shape]
    d_r, r = generator["d_r"], generator["rank"]
    random = torch.Generator().manual_seed(0)
    h = torch.randn(C, 8 * r, d_r, generator=random) * torch.arange(1, d_r + 1) ** -0.7
    left, right = (h @ torch.randn(d_r, d_r, generator=random) / d_r**0.5 for _ in range(2))
    S = (left.mT @ right).to(device)
    gradient = torch.randn_like(S)

    def lowrank(S):
        U, _, V = torch.svd_lowrank(S, q=r, niter=1)
        return U, V.mT

    def both(function):
        leaf = S.clone().requires_grad_()
        left, right = function(leaf)
        (left @ right).backward(gradient)

    row = {"shape": list(S.shape), "rank": r}
    for name, function in (("ours", lambda S: svd_norm(S, r)), ("svd_lowrank", lowrank)):
        row[f"{name}_forward_ms"] = best_time(lambda: function(S), device, args.repeats) * 1e3
        row[f"{name}_forward_backward_ms"] = best_time(lambda: both(function), device, args.repeats) * 1e3
    return {**row, "ratio": row["svd_lowrank_forward_backward_ms"] / row["ours_forward_backward_ms"]}


def contextualising(args, device):
    """Reading 2 contexts of a chunk each, over the plain forward pass of the same tokens without lm_head."""
    model, length = make(args, device), SHAPES[args.shape][5]
    ids = torch.randint(model.base.config.vocab_size, (2, length), device=device)
    with torch.no_grad():
        plain = best_time(lambda: model.base.get_decoder()(ids, use_cache=False), device, args.repeats)
        ours = best_time(lambda: model.contextualize(ids), device, args.repeats)
    return {"tokens": ids.numel(), "plain_s": plain, "contextualise_s": ours, "ratio": ours / plain}


def stream(args, device):
    """A context of --stream tokens read chunk by chunk: time of a chunk in the last tenth over that in the first, and
    growth of peak memory after the first tenth. S is fp32 and finite throughout."""
    model, memory, seconds, L = make(args, device), None, [], 1024
    chunks = max(args.stream // L, 20)
    for t in range(chunks):
        chunk = torch.randint(model.base.config.vocab_size, (1, L)).to(device)
        seconds.append(best_time(lambda: None, device, 1))
        start = time.perf_counter()
        memory = model.contextualize(chunk, memory=memory)
        synchronize(device)
        seconds[-1] = time.perf_counter() - start
        if t == chunks // 10:
            warm = peak_memory(device)
    assert all(S.dtype == torch.float32 and S.isfinite().all() for S in memory.states.values())
    first, last = (statistics.median(part) for part in (seconds[:chunks // 10], seconds[-(chunks // 10):]))
    return {"tokens": memory.tokens.item(), "chunks": chunks, "last_over_first": last / first,
            "peak_memory_gb": peak_memory(device), "peak_growth_percent": 100 * (peak_memory(device) / warm - 1)}


def random_batch(args, device, batch, C, L):
    """segments (B, 2C, L), visible and labels of random tokens; segment 0, which has no adapter, has no labels."""
    tokens = torch.randint(SHAPES[args.shape][1].vocab_size, (batch, C * L))
    segments, _, visible, labels = doubled(tokens, C)
    labels = labels.clone()
    labels[:, 0] = -100
    return segments.to(device), visible, labels.to(device)


def our_step(model, segments, visible, labels):
    """A function that takes a training step on them as train.py does."""
    parameters, layers = list(model.generator.parameters()), model.generator.layers
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run():
        nats, tokens = model.segment_losses(segments, None, visible, labels)
        (nats.sum() / tokens.sum()).backward()
        for layer in layers:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), len(layers) ** -0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return run


def base_alone(base, segments):
    """Forward and backward of the frozen base alone, to the embeddings of segments (B, L)."""
    embeds = base.get_input_embeddings()(segments).requires_grad_()                 # (B, L, d_h)
    hidden = base.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    HeadLoss.apply(hidden.reshape(-1, hidden.shape[-1]), segments[:, 1:].flatten(),
                   base.get_output_embeddings()).mean().backward()


def step(args, device, kind):
    """A training step on one doubled sequence. kind: "base" is the frozen base alone, forward and backward to the
    embeddings under the same loss; "step" adds the generator and AdamW; "checkpointing" recomputes activations."""
    _, config, _, C, L, _ = SHAPES[args.shape]
    segments, visible, labels = random_batch(args, device, args.batch, C, L)
    if device.type == "cuda" and args.dtype == "bfloat16":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if kind == "base":
        base = make(args, device, adapted=False)
        run = lambda: base_alone(base, segments.flatten(0, 1))
    else:
        model = make(args, device)
        base = model.base
        model.checkpointing = config.num_hidden_layers if kind == "checkpointing" else 0
        run = our_step(model, segments, visible, labels)
    prepare_cpu(base, L)
    seconds = best_time(run, device, args.repeats)
    return {"seconds": seconds, "context_tokens_per_s": args.batch * C * L / seconds,
            "peak_memory_gb": peak_memory(device)}


def chunk_step(args, device, batch, L):
    """A reconstruction step on `batch` contexts of one chunk of L tokens, in fp32 on one thread, over what the base
    alone needs for it: a forward pass of the context, forward and backward of the second half. Medians of the process's
    own time, in turns."""
    torch.set_num_threads(1)
    args.dtype = "float32"
    base = make(args, device, adapted=False)
    prepare_cpu(base, L)
    segments, visible, labels = random_batch(args, device, batch, 1, L)
    ours = our_step(make(args, device), segments, visible, labels)

    def theirs():
        with torch.no_grad():
            base.get_decoder()(segments[:, 0], use_cache=False)
        base_alone(base, segments[:, 1])

    seconds = {ours: [], theirs: []}
    for _ in range(max(5, args.repeats) + 1):
        for function, times in seconds.items():
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    ours, theirs = (statistics.median(times[1:]) for times in seconds.values())
    return {"ours_s": ours, "base_s": theirs, "ratio": ours / theirs}


def run_job(function, args, options):
    torch.set_num_threads(args.threads)
    return function(args, torch.device(args.device), **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; default bfloat16 where the hardware has it")
    add("--batch", type=int, default=1, help="sequences of a training step")
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    add("--stream", nargs="?", type=int, const=1_000_000, metavar="TOKENS",
        help="only read a context of this many tokens chunk by chunk (default 1,000,000)")
    add("--only", default="", help="measure only what starts with this")
    add("--count", action="store_true", help="only count a training step as a GPU would run it (tests/count.py)")
    add("--chunk", type=int, help="--count: tokens of a chunk; default the shape's")
    add("--checkpointing", type=int, default=0, metavar="N", help="--count: also with the first N blocks recomputed")
    add("--output", help="write all figures as JSON")
    args = parser.parse_args()
    if args.count:
        args.dtype, (*_, C, L, _) = "bfloat16", SHAPES[args.shape]
        return count.report(make(args, torch.device("meta")), args.batch, C, args.chunk or L, args.checkpointing)
    args.dtype = args.dtype or str(default_dtype(torch.device(args.device))).removeprefix("torch.")
    jobs = [("norm", norm, {}), ("contextualising", contextualising, {})]
    if args.shape != "mistral":                         # without checkpointing its activations alone are 100 GB
        jobs += [("base", step, {"kind": "base"}), ("step", step, {"kind": "step"})]
        if args.device == "cpu":
            jobs += [(f"chunk_of_{L}", chunk_step, {"batch": batch, "L": L}) for batch, L in ((4, 64), (8, 16))]
    jobs.append(("checkpointing", step, {"kind": "checkpointing"}))
    if args.stream:
        jobs = [("stream", stream, {})]
    results = {}
    for name, function, options in jobs:
        if name.startswith(args.only):
            with multiprocessing.get_context("spawn").Pool(1) as worker:
                results[name] = worker.apply(run_job, (function, args, options))
            print(f"{name:18s}", "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                           for k, v in results[name].items()), flush=True)
    if args.output:
        facts = {"shape": args.shape, "dtype": args.dtype, "threads": args.threads, "batch": args.batch,
                 "device": platform.processor() or platform.machine(),
                 "torch": torch.__version__, "transformers": transformers.__version__}
        if args.device != "cpu":
            facts["device"] = torch.cuda.get_device_name()
        with open(args.output, "w") as file:
            json.dump({**facts, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
