"""Training: a flat loop for one process or many, in three stages.

    python train.py --data corpus.parquet --out out/run                             # pretrain the generator (§2.3): one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py --data corpus.parquet \\
        --base mistralai/Mistral-7B-Instruct-v0.2 --checkpointing --out out/mistral   # the paper's setting: flags default to its recipe
    python train.py --stage instruct --checkpoint out/run/step-000280 --data qa.parquet tasks.parquet --out out/instruct      # Table 3
    python train.py --stage finetune --data qa.parquet --documents docs.parquet --out out/sft      # the baselines SFT and CPT: the base itself

The global batch is fixed by --batch whatever the number of processes. Every checkpoint out/run/step-* is a directory that
evaluate.py --checkpoint reads; --resume continues from the newest one, on a CPU to weights bit-identical to an unbroken run.
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from data import instruction_batches, open_tokens, pretraining_batches, sequences, trim
from generator import NORMS, GeneratorConfig
from model import DEFAULT_BASE, AdaptedLM, load_base
from support.files import InputError, is_file_source, make_directory, read_json, read_safetensors, run_command
from support.finetune import finetune
from support.instructions import TABLE_3

MAX_SKIPPED = 10          # steps in a row without a finite gradient before the run gives up


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["pretrain", "instruct", "finetune"], default="pretrain")
    add("--base", default=DEFAULT_BASE, help="frozen base model: hub id, directory or .gguf file")
    add("--checkpoint", help="start from this trained generator; its config decides d_r, rank, scale, norm, damping and targets")
    add("--data", nargs="+", help=".parquet, .jsonl(.gz), .txt(.gz) files, a hub data set id, or one packed .bin file; instruct: default the hub sets of Table 3")
    add("--documents", nargs="+", help="finetune: learn these texts first, by log-likelihood (CPT)")
    add("--validation", nargs="+", help="files of the same kinds; default: the last --eval-sequences sequences of --data, which then stay out of training")
    add("--max-tokens", type=int, help="pack at most this many tokens of --data")
    add("--out", required=True, help="directory for checkpoints, log.jsonl and validation.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, or start if there is none")
    # None: chosen for the size of the base in recipe()
    add("--chunk", type=int, help="tokens of a chunk (L)")
    add("--chunks", type=int, help="chunks of a sequence (C); the pass holds 2C segments")
    add("--batch", type=int, help="sequences of a step over all processes")
    add("--micro-batch", type=int, default=1, help="sequences of one forward and backward pass")
    add("--steps", type=int, help="optimiser steps")
    add("--epochs", type=int, help="instruct: passes over the data instead of --steps (default 2); finetune: at most this many over the questions (default 10)")
    add("--patience", type=int, default=3, help="finetune: stop after this many epochs in a row without a better validation loss")
    add("--lr", type=float)
    add("--warmup", type=int, help="steps of linear warm-up; then linear decay to 0")
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--clip-layers", action="store_true", help="clip each layer's generator by itself, to clip / sqrt(layers)")
    add("--beta2", type=float, default=0.999)
    add("--start", choices=["aligned", "random"], default="aligned", help="of A2, B1, B2: from the base's own statistics (support/aligned.py), or the paper's")
    add("--query-scale", type=float, default=3.0)
    add("--objective", choices=["both", "reconstruction", "completion"], default="both", help="eq. 5, or Table 2's ablations")
    add("--windows", action="store_true", help="reconstruct random windows of the prefix, as the released code does, not a copy")
    add("--d-r", type=int)
    add("--rank", type=int)
    add("--scale", type=float)
    add("--norm", choices=NORMS, help="default svd")
    add("--damping", type=float, help="default 1e-2")
    add("--targets", nargs="+", help="default o_proj")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; generator and S stay fp32. Default bfloat16; finetune float32, where steps of 1e-5 do not round away")
    add("--device", help="default: CUDA where there is one")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--eval-every", type=int, default=200)
    add("--eval-sequences", type=int, default=50)
    add("--save-every", type=int, default=200)
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--max-minutes", type=float, help="stop with a checkpoint after this long")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def recipe(args, base):
    """Fill what the command line left open. A base of width 2,048 or more gets the paper's recipe (appendix B; model_type llama stands for
    Llama2); a smaller one what shows memory in minutes on a CPU: chunks so short that rank(S) <= r, where the gradient of norm is exact."""
    llama = base.config.model_type == "llama"
    if base.config.get_text_config().hidden_size >= 2048:
        defaults = {"d_r": 1024, "rank": 128, "scale": 1 / 8 if llama else 1 / 16, "chunk": 1024, "chunks": 8, "warmup": 100}
        defaults |= {"lr": 5e-5, "batch": 32} if args.stage == "instruct" else {"lr": 1e-4 if llama else 5e-5, "batch": 8, "steps": 15_259}   # 1 B tokens
    else:
        defaults = {"d_r": 256, "rank": 64, "scale": 1.0, "chunk": 32, "chunks": 2, "warmup": 15, "batch": 8}
        defaults |= {"lr": 1e-3, "chunk": 128, "chunks": 4} if args.stage == "instruct" else {"lr": 4e-3, "steps": 280}
    for name, value in {**defaults, "norm": "svd", "damping": 1e-2, "targets": ["o_proj"]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("chunk", "chunks", "batch", "micro_batch", "eval_every", "eval_sequences", "save_every", "keep"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if args.seed < 0:
        raise InputError("--seed must not be negative")
    for name in ("steps", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    if args.chunk < 2:
        raise InputError("--chunk must be at least 2: the first token of a segment is never a target")
    if args.stage == "pretrain" and args.objective == "completion" and args.chunks < 2:
        raise InputError("--objective completion needs --chunks of at least 2: the first chunk has no adapter")
    if min(args.lr, args.clip) <= 0 or min(args.warmup, args.weight_decay) < 0:
        raise InputError("--lr and --clip must be positive, --warmup and --weight-decay not negative")


def adapted_model(args, base):
    """The model to train: a fresh generator, or that of --checkpoint, whose config then fills the flags."""
    names = ("d_r", "rank", "scale", "norm", "damping", "targets")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoint is None:
        recipe(args, base)
        return AdaptedLM(base, GeneratorConfig(**{name: getattr(args, name) for name in names}, chunk=args.chunk))
    model = AdaptedLM.from_pretrained(base, args.checkpoint)
    for name in names:
        if given.get(name, getattr(model.config, name)) != getattr(model.config, name):
            raise InputError(f"--{name.replace('_', '-')} {given[name]} is not what --checkpoint {args.checkpoint} was trained with ({getattr(model.config, name)}); leave the flag out")
        setattr(args, name, getattr(model.config, name))
    recipe(args, base)
    model.config.chunk = args.chunk                     # evaluate.py reads contexts in chunks of this length
    return model


def learning_rate(args, step):
    """Linear warm-up, then linear decay to 0 (WarmupDecayLR)."""
    return args.lr * min((step + 1) / max(args.warmup, 1), (args.steps - step) / max(args.steps - args.warmup, 1), 1.0)


# --------------------------------------------------------------------------------------------------------------------
# weights of eq. 5


def loss_weights(labels, C, objective):
    """Weight of a nat in each segment, (B, N): eq. 5 as the sum of two token means over the whole global batch, or the one token mean over answers.
    Segment 0 has no adapter and trains nothing, so it is left out. (The released code takes one token mean over all 2C segments.)"""
    targets = (labels[:, :, 1:] != -100).sum(-1)                            # (B, N)
    weights = torch.zeros(targets.shape)
    if objective != "completion":
        weights[:, C:] = 1 / targets[:, C:].sum().clamp(min=1)
    if objective != "reconstruction":
        weights[:, 1:C] = 1 / targets[:, 1:C].sum().clamp(min=1)
    return weights


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(args, step, model, optimizer):
    """out/step-NNNNNN, written aside, flushed to disk and renamed: a kill at any moment leaves the last complete one."""
    final = os.path.join(args.out, f"step-{step:06d}")
    if os.path.isdir(final):
        return
    part = os.path.join(args.out, "checkpoint.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    state = {f"{key}/{name}": value for name, p in model.generator.tensors().items() for key, value in optimizer.state[p].items()}
    save_file({**state, "torch_rng": torch.get_rng_state()}, os.path.join(part, "optimizer.safetensors"))
    with open(os.path.join(part, "trainer.json"), "w") as file:
        json.dump({"step": step, "sequences_seen": step * args.batch, "args": vars(args)}, file, indent=1)
    for name in os.listdir(part):
        with open(os.path.join(part, name), "rb+") as file:
            os.fsync(file.fileno())
    os.rename(part, final)
    for old in checkpoints(args.out)[:-args.keep]:
        shutil.rmtree(old)


def checkpoints(out):
    """Complete checkpoints of a run, oldest first."""
    names = sorted(name for name in os.listdir(out) if name.startswith("step-")) if os.path.isdir(out) else []
    return [os.path.join(out, name) for name in names]


def load_checkpoint(args, path, model, optimizer):
    """Restore generator, optimiser and RNG; returns the step. Raises InputError when the run was started with other flags."""
    trainer = read_json(os.path.join(path, "trainer.json"))
    free = {"out", "resume", "micro_batch", "device", "checkpointing", "eval_every", "save_every", "keep", "max_minutes"}    # change no result but rounding
    for name, value in vars(args).items():
        if name not in free and trainer["args"].get(name) != value:
            raise InputError(f"--resume: {path} was trained with --{name.replace('_', '-')} {trainer['args'].get(name)}, not {value}; repeat its flags or choose another --out")
    tensors, _ = read_safetensors(os.path.join(path, "generator.safetensors"))
    model.generator.load_tensors(tensors, path)
    state, _ = read_safetensors(os.path.join(path, "optimizer.safetensors"))
    torch.set_rng_state(state.pop("torch_rng"))
    for name, p in model.generator.tensors().items() if state else ():        # no state: every step so far was skipped
        optimizer.state[p] = {key: state[f"{key}/{name}"].to(p.device if key != "step" or optimizer.defaults["fused"] else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")}
    return trainer["step"]


def trim_log(path, step):
    """Drop the lines that a killed run wrote after the checkpoint of that step; all of them where it left none (step None)."""
    if os.path.exists(path):
        with open(path) as file:
            kept = [line for line in file if step is not None and line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(path + ".part", "w") as file:
            file.writelines(kept)
        os.replace(path + ".part", path)


# --------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(model, batches, process, world):
    """Token-mean nats of each fixed validation item, (n, 3): second half (reconstruction, or the answers), completion (NaN where there is none), and
    the second half under the adapter of a random control context, which tells memory from a mere change of style."""
    segments, mask, visible, labels = batches.validation
    C, n, device = int(visible.max()), len(segments), model.base.device
    losses = torch.zeros(n, 3, dtype=torch.float64)
    for i in tqdm(range(process, n, world), desc="validation", leave=False, disable=process != 0):
        for column, source in ((0, i), (2, batches.controls[i])):
            context, own = slice(source, source + 1), slice(i, i + 1)
            mixed = [torch.cat([t[context, :C], t[own, C:]], 1) for t in (mask, segments)]
            targets = labels[own].clone()
            if source != i:
                targets[:, :C] = -100
            (m, s, targets), v = trim(mixed[0], visible, mixed[1], targets)
            nats, count = model.segment_losses(s.to(device), None if m.all() else m.to(device), v, targets.to(device))
            own_C = int(v.max())
            losses[i, column] = nats[:, own_C:].sum() / count[:, own_C:].sum()
            if source == i:
                losses[i, 1] = nats[:, 1:own_C].sum() / count[:, 1:own_C].sum()
    if world > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    return losses.cpu()


def report_validation(args, step, losses):
    """Append to validation.jsonl and print, with the paired difference to step 0 and its standard error over sequences."""
    path = os.path.join(args.out, "validation.jsonl")
    second = "answer" if args.stage == "instruct" else "reconstruction"
    columns = {name: losses[:, k] for k, name in enumerate((second, "completion", second + "_shuffled")) if not losses[:, k].isnan().any()}
    with open(path, "a") as file:
        means = {name: values.mean().item() for name, values in columns.items()}
        file.write(json.dumps({"step": step, **means, "sequences": {name: values.tolist() for name, values in columns.items()}}) + "\n")
    with open(path) as file:
        start = json.loads(file.readline())["sequences"]
    for name, values in columns.items():
        change = values - torch.tensor(start[name], dtype=torch.float64)
        tqdm.write(f"step {step:6d}  {name:24s} {means[name]:.4f} nats  perplexity {math.exp(means[name]):9.2f}  "
                   f"since step 0 {change.mean():+.4f} +- {change.std() / len(change) ** 0.5:.4f}")


# --------------------------------------------------------------------------------------------------------------------
# the loop


def peak_memory(device):
    """Peak memory of this process in GB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                 # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def keep_freed_memory():
    """glibc gives large freed blocks back to the system, and a CPU step then spends a fifth of its time on getting them again, page by page."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, -1)   # M_MMAP_MAX: never by mmap; M_TRIM_THRESHOLD: never trim
        except (OSError, AttributeError):               # another C library
            pass


def train(args):
    process, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.stage == "instruct":
        args.data = args.data or TABLE_3
        if args.checkpoint is None:
            raise InputError("--stage instruct starts from a pretrained generator: name it with --checkpoint")
    if not args.data:
        raise InputError("--data is missing: name text files, a hub data set id, or a packed .bin file")
    if torch.cuda.is_available() and args.device in (None, "cuda"):
        args.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:                                       # the others may wait for hours while the first process packs the text
        dist.init_process_group("nccl" if str(args.device).startswith("cuda") else "gloo", timeout=timedelta(hours=24))
    for source in args.validation or []:
        if not is_file_source(source) and not source.endswith(".bin"):
            raise InputError(f"--validation {source}: name files (.parquet, .jsonl, .txt or a packed .bin)")
    if checkpoints(args.out) and not args.resume:
        raise InputError(f"--out {args.out} already holds checkpoints: add --resume to continue that run, or name another directory")

    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32")
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype), args.device)
    device = base.device
    torch.manual_seed(args.seed)
    model = adapted_model(args, base)
    if args.batch % world:
        raise InputError(f"--batch {args.batch} must be a multiple of the {world} processes")
    if device.type == "cpu":
        keep_freed_memory()
    elif args.dtype == "bfloat16":                      # TF32 holds the bf16 factors of S exactly; norm turns it off for itself
        torch.set_float32_matmul_precision("high")
    model.checkpointing = args.checkpointing
    if device.type == "cpu" and args.dtype == "bfloat16" and args.chunk <= 256:
        base.set_attn_implementation("eager")           # short bf16 attention is several times slower by the fused kernel on a CPU
    parameters = list(model.generator.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    # gradients are views of one buffer, with the totals of a step behind them: second half, completion, stop?, failed?
    flat = torch.zeros(sum(p.numel() for p in parameters) + 4, device=device)
    for p, grad in zip(parameters, flat[:-4].split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    totals = flat[-4:]

    if world > 1 and local > 0:                         # the first process of a machine packs, the others then find the files
        dist.barrier()
    common = {"chunk": args.chunk, "chunks": args.chunks, "batch_size": args.batch, "seed": args.seed, "eval_sequences": args.eval_sequences}
    if args.stage == "instruct":
        batches = instruction_batches(tokenizer, args.data, args.validation, **common)
        args.steps = args.steps or max(1, (args.epochs or 2) * batches.epoch // args.batch)
    else:
        batches = pretraining_batches(tokenizer, args.data, args.validation, **common, max_tokens=args.max_tokens, windows=args.windows)
    if world > 1 and local == 0:
        dist.barrier()

    def prepare(step):
        """The micro-batches of this process, as (segments, mask, visible, labels, weights). Every process cuts the whole global batch, so that the
        token counts need no communication, and keeps its own rows."""
        segments, mask, visible, labels = batches.training(step)
        weights = loss_weights(labels, int(visible.max()), args.objective if args.stage == "pretrain" else "reconstruction")
        parts = []
        labels = labels.masked_fill((weights == 0)[:, :, None], -100)      # no lm_head for a loss of weight 0
        for rows in torch.arange(process, args.batch, world).split(args.micro_batch):
            (m, s, l, w), v = trim(mask[rows], visible, segments[rows], labels[rows], weights[rows])
            tensors = [s, None if m.all() else m, l, w]
            parts.append(([t.pin_memory() if t is not None and device.type == "cuda" else t for t in tensors], v))
        return parts

    make_directory(args.out)
    resumed = args.resume and checkpoints(args.out)
    step = load_checkpoint(args, resumed[-1], model, optimizer) if resumed else 0
    length = args.chunks * args.chunk                   # context tokens of a row; in instruction tuning at most
    if process == 0:
        for name in ("log.jsonl", "validation.jsonl"):
            trim_log(os.path.join(args.out, name), step if resumed else None)
        size = sum(p.numel() for p in parameters)
        print(f"generator of {size / 1e6:.1f} M parameters on {args.base}; {batches.about}; {args.batch} x {args.chunks} chunks of {args.chunk} tokens a step; "
              f"{args.steps} steps from step {step}; {world} process{'es' if world > 1 else ''} on {device}")

    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    began, skipped = time.time(), 0
    if step == 0 and args.start == "aligned" and args.checkpoint is None:
        import support.aligned
        support.aligned.QUERY_SCALE = args.query_scale
        data = open_tokens(args.data, tokenizer, args.max_tokens)
        support.aligned.aligned_start(model, sequences(data, 128, 0, 160, args.seed).split(16))
        print(f"aligned start in {time.time() - began:.0f} s")
    if step == 0:
        losses = validate(model, batches, process, world)
        if process == 0:
            report_validation(args, 0, losses)
    bar = tqdm(total=args.steps, initial=step, desc="training", unit="step", disable=process != 0)
    loader = ThreadPoolExecutor(1)                      # cuts and pins the next batch while this one is computed
    coming = loader.submit(prepare, step)
    while step < args.steps:
        t0 = time.time()
        parts, coming = coming.result(), loader.submit(prepare, step + 1)
        read = 0
        for (segments, mask, labels, weights), visible in parts:
            C = int(visible.max())
            read += segments[:, :C].numel() if mask is None else int(mask[:, :C].sum())
            segments, mask, labels, weights = (t if t is None else t.to(device, non_blocking=True) for t in (segments, mask, labels, weights))
            try:
                nats, _ = model.segment_losses(segments, mask, visible, labels)
                losses = nats * weights                                     # (B, N)
                losses.sum().backward()
                totals[0] += losses[:, C:].sum().detach()
                totals[1] += losses[:, 1:C].sum().detach()
            except torch.linalg.LinAlgError:            # NaN in S: the step is lost, and skipped below by every process
                totals[3] += 1
        totals[2] = bool(stopping) or bool(args.max_minutes and time.time() - began > 60 * args.max_minutes)
        if world > 1:
            dist.all_reduce(flat)

        second, completion, stop, failed = totals.tolist()
        if args.clip_layers:
            layers = model.generator.layers
            norm = torch.stack([torch.nn.utils.clip_grad_norm_(layer.parameters(), args.clip / len(layers) ** 0.5) for layer in layers]).norm().item()
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        finite = math.isfinite(norm + second + completion) and not failed
        lr = learning_rate(args, step)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        flat.zero_()
        skipped = 0 if finite else skipped + 1
        step += 1

        if process == 0:
            names = {"answer": second} if args.stage == "instruct" else {"reconstruction": second, "completion": completion}
            row = {"step": step, "loss": second + completion, **names, "lr": lr, "grad_norm": norm, "skipped": not finite, "tokens": step * args.batch * length,
                   "tokens_per_s": read * world / (time.time() - t0), "memory_gb": peak_memory(device)}
            with open(os.path.join(args.out, "log.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
            bar.update()
            bar.set_postfix(**{name: f"{value:.3f}" for name, value in names.items()}, tokens_s=f"{row['tokens_per_s']:.0f}")
        if skipped == MAX_SKIPPED:
            raise InputError(f"the loss or its gradient was not finite {MAX_SKIPPED} steps in a row (step {step}): lower --lr or raise --damping; checkpoints already written are good")
        last = stop or step == args.steps
        if step % args.eval_every == 0 or step == args.steps:
            losses = validate(model, batches, process, world)
            if process == 0:
                report_validation(args, step, losses)
        if process == 0 and (step % args.save_every == 0 or last):
            save_checkpoint(args, step, model, optimizer)
        if last:
            break
    bar.close()
    loader.shutdown()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if process == 0:
        print(f"stopped at step {step} of {args.steps}; generator in {checkpoints(args.out)[-1]}")


def main():
    args = arguments()
    if args.stage == "finetune":
        keep_freed_memory()
    (finetune if args.stage == "finetune" else train)(args)


if __name__ == "__main__":
    run_command(main)
