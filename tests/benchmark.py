"""Speed and memory of contextualising and a training step, on a CPU or a CUDA device.

    python tests/benchmark.py                                              # SmolLM2's shape, random weights
    python tests/benchmark.py --shape mistral                              # Mistral-7B's, made on the device: 80 GB
    python tests/benchmark.py --shape tiny --stream                        # only a million tokens into one memory
    python tests/benchmark.py --shape mistral --count                      # a step counted without a GPU, in minutes
    python tests/benchmark.py --shape llama-70b --count --shards 8 --chunks 2       # train.py --shard on 8 devices
    python tests/benchmark.py --shape mistral --count --shards 8 --finetune         # train.py --stage finetune

Every measurement runs in a process of its own, for its peak memory; times are the best of --repeats after one warm-up.
On a CPU absolute times say little: compare the ratios of one run on an idle machine.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import count
from data import doubled
from generator import GeneratorConfig
from model import AdaptedLM
from support.bases import default_dtype
from support.costs import clock
from support.fast import losses
from train import keep_freed_memory

# config of the base, generator, chunks of a training sequence, tokens of a chunk, tokens of each of two contexts
SHAPES = {
    "smollm2": (LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
                            tie_word_embeddings=True), {"d_r": 256, "rank": 64}, 8, 128, 1024),
    "mistral": (MistralConfig(vocab_size=32000, max_position_embeddings=32768),
                {"d_r": 1024, "rank": 128, "scale": 1 / 16}, 8, 1024, 1024),
    "llama-70b": (LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                              intermediate_size=28672, vocab_size=128256, max_position_embeddings=131072),
                  {"d_r": 1024, "rank": 128, "scale": 1 / 8}, 8, 1024, 1024),
    "tiny": (LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, vocab_size=512), {"d_r": 32, "rank": 8}, 4, 32, 64)}


def best_time(function, device, repeats):
    """Seconds of one call: the best of `repeats` after a warm-up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = clock(device)
        function()
        seconds.append(clock(device) - start)
    return min(seconds)


def peak_memory(device):
    """Peak memory of this process in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def make(args, device):
    """An AdaptedLM with random weights on the device, whose A1 is not zero."""
    config, generator, *_ = SHAPES[args.shape]
    if args.targets:
        generator = {**generator, "targets": args.targets}
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model = AdaptedLM(base, GeneratorConfig(**generator))
    for layer in model.generator.layers:
        torch.nn.init.normal_(layer.A1, std=0.02)
    return model


def contextualising(args, device):
    """Reading 2 contexts of a chunk each, over the plain forward pass of the same tokens without lm_head."""
    model = make(args, device)
    ids = torch.randint(model.base.config.vocab_size, (2, SHAPES[args.shape][4]), device=device)
    with torch.no_grad():
        plain = best_time(lambda: model.base.get_decoder()(ids, use_cache=False), device, args.repeats)
        ours = best_time(lambda: model.contextualize(ids), device, args.repeats)
    return {"plain_s": plain, "contextualise_s": ours, "ratio": ours / plain}


def stream(args, device):
    """A context of --stream tokens read chunk by chunk: time of a chunk in the last tenth over that in the first, and
    growth of peak memory after the first tenth. S is fp32 and finite throughout."""
    model, memory, times = make(args, device), None, []
    tenth = max(args.stream // 10240, 2)
    for t in range(10 * tenth):
        chunk = torch.randint(model.base.config.vocab_size, (1, 1024)).to(device)
        start = clock(device)
        memory = model.contextualize(chunk, memory=memory)
        times.append(clock(device) - start)
        if t == tenth:
            warm = peak_memory(device)
    assert all(S.dtype == torch.float32 and S.isfinite().all() for S in memory.states.values())
    ratio = statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
    growth = 100 * (peak_memory(device) / warm - 1)
    return {"tokens": memory.tokens.item(), "last_over_first": ratio, "peak_growth_percent": growth}


def step(args, device, kind, batch, C, L):
    """A training step on `batch` doubled sequences of C chunks of L tokens. kind: "step", as train.py takes it;
    "checkpointing", the same with all blocks recomputed; "base", what the frozen base alone needs for it: a forward
    pass of the first segments, which have no adapter, and forward and backward of the others, to their embeddings."""
    tokens = torch.randint(SHAPES[args.shape][0].vocab_size, (batch, C * L), device=device)
    segments, _, visible, _ = doubled(tokens, C)                                    # (B, 2C, L)
    labels = segments.clone()
    labels[:, 0] = -100
    if device.type == "cuda" and args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")
    model = make(args, device)
    base, layers = model.base, model.generator.layers
    model.checkpointing = len(model.blocks) if kind == "checkpointing" else 0
    optimizer = torch.optim.AdamW(model.generator.parameters(), lr=1e-5, fused=True)
    keep_freed_memory()
    if device.type == "cpu" and args.dtype == "bfloat16" and L <= 256:          # as train.py does
        base.set_attn_implementation("eager")

    def ours():
        nats, count = model.segment_losses(segments, None, visible, labels)
        (nats.sum() / count.sum()).backward()
        for layer in layers:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), len(layers) ** -0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def alone():
        with torch.no_grad():
            base.get_decoder()(segments[:, 0], use_cache=False)
        embeds = base.get_input_embeddings()(segments[:, 1:].flatten(0, 1)).requires_grad_()        # (B (2C-1), L, d_h)
        hidden = base.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        nats, count = losses(base.get_output_embeddings(), hidden.view(batch, 2 * C - 1, L, -1), labels[:, 1:])
        (nats.sum() / count.sum()).backward()

    seconds = best_time(alone if kind == "base" else ours, device, args.repeats)
    return {"seconds": seconds, "tokens_per_s": batch * C * L / seconds, "peak_memory_gb": peak_memory(device)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; default bfloat16 where the hardware has it")
    add("--batch", type=int, default=1, help="sequences of a training step")
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    add("--stream", nargs="?", type=int, const=1_000_000, metavar="TOKENS", help="only read such a context (1,000,000)")
    add("--only", default="", help="measure only what starts with this")
    add("--count", action="store_true", help="only count a training step as a GPU would run it (tests/count.py)")
    add("--targets", nargs="+", help="linear layers with adapters; default o_proj")
    add("--chunk", type=int, help="--count: tokens of a chunk; default the shape's")
    add("--chunks", type=int, help="--count: chunks of a sequence; default the shape's")
    add("--shards", type=int, default=1, help="--count: devices that share the base out")
    add("--finetune", action="store_true", help="--count: the base fine-tuned in fp32, passes of 2,048 tokens")
    add("--checkpointing", type=int, default=12, help="--count: blocks recomputed, besides none and all")
    args = parser.parse_args()
    _, _, C, L, _ = SHAPES[args.shape]
    if args.count and args.finetune:
        args.dtype = "float32"
        return count.report_fine_tuning(make(args, torch.device("meta")).base, 2048, args.shards)
    if args.count:
        args.dtype = "bfloat16"
        model = make(args, torch.device("meta"))
        return count.report(model, args.batch, args.chunks or C, args.chunk or L, args.checkpointing, args.shards)
    args.dtype = args.dtype or str(default_dtype(torch.device(args.device))).removeprefix("torch.")
    jobs = {"contextualising": (contextualising, [])}
    for kind in ("base", "step", "checkpointing"):
        if args.shape == "mistral" and kind != "checkpointing":             # the activations alone are 100 GB
            continue
        for name, sizes in (("", (args.batch, C, L)), ("chunk of 64, ", (4, 1, 64)), ("chunk of 16, ", (8, 1, 16))):
            jobs[name + kind] = (step, [kind, *sizes])
    if args.stream:
        jobs = {"stream": (stream, [])}
    print(f"{args.shape}, {args.dtype}, {args.device}, {args.threads} threads")
    for name, (function, options) in jobs.items():
        if name.startswith(args.only):
            with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (args.threads,)) as worker:
                result = worker.apply(function, (args, torch.device(args.device), *options))
            print(f"{name:26s}", *(f" {key} {value:.4g}" for key, value in result.items()), flush=True)


if __name__ == "__main__":
    main()
