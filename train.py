"""Training: a flat loop for one process or many, in three stages.

    python train.py --data corpus.parquet --out out/run                     # pretrain the generator (§2.3), CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py --data corpus.parquet --checkpointing --out out/mistral \\
        --base mistralai/Mistral-7B-Instruct-v0.2                           # the paper's setting: its recipe by default
    python train.py --stage instruct --checkpoint out/run/step-000300 --data qa.parquet --out out/instruct     # Table 3
    python train.py --stage finetune --data qa.parquet --documents docs.parquet --out out/sft   # baselines: SFT, CPT

The global batch is --batch for any number of processes. Every out/run/step-* is a checkpoint that evaluate.py reads;
--resume continues from the newest one, on a CPU to weights bit-identical to an unbroken run.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from data import instruction_batches, pretraining_batches, sequences, trim
from generator import NORMS, GeneratorConfig
from model import DEFAULT_BASE, AdaptedLM, load_base
from support.aligned import aligned_start
from support.files import InputError, is_file_source, make_directory, read_json, read_safetensors, run_command
from support.finetune import finetune
from support.instructions import TABLE_3
from support.machine import keep_freed_memory, peak_memory

SHAPE = ("d_r", "rank", "scale", "norm", "damping", "targets")     # of a generator; a --checkpoint decides them
MAX_SKIPPED = 10          # steps in a row without a finite gradient before the run gives up


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["pretrain", "instruct", "finetune"], default="pretrain")
    add("--base", default=DEFAULT_BASE, help="frozen base model: hub id, directory or .gguf file")
    add("--checkpoint", help="start from this trained generator; its config decides " + ", ".join(SHAPE))
    add("--start", choices=["aligned", "random"], default="aligned", help="without --checkpoint: A2, B1, B2 from the "
        "base's own statistics (support/aligned.py), or the paper's random ones")
    add("--data", nargs="+", help=".parquet, .jsonl(.gz), .txt(.gz) files, a hub data set id, or one packed .bin file; "
        "instruct: default the hub sets of Table 3")
    add("--documents", nargs="+", help="finetune: learn these texts first, by log-likelihood (CPT)")
    add("--validation", nargs="+", help="files of the same kinds; default: the last --eval-sequences sequences of "
        "--data, which then stay out of training")
    add("--weights", nargs="+", metavar="SOURCE=N", help="instruct: how many times an epoch goes through a source, a "
        "row's \"dataset\" or a file of --data; default 1")
    add("--excerpts", type=float, help="instruct: probability that a document longer than the length drawn for its "
        "context is cut to the sentences around an answer; default 0")
    add("--max-tokens", type=int, help="pack at most this many tokens of --data")
    add("--out", required=True, help="directory for checkpoints, log.jsonl and validation.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, or start if there is none")
    # None: chosen for the size of the base in recipe()
    add("--chunk", type=int, help="tokens of a chunk (L)")
    add("--chunks", type=int, help="chunks of a sequence (C); the pass holds 2C segments")
    add("--batch", type=int, help="sequences of a step over all processes")
    add("--micro-batch", type=int, help="sequences of one forward and backward pass")
    add("--steps", type=int, help="optimiser steps")
    add("--epochs", type=int, help="instruct: passes over the data instead of --steps (default 2); finetune: at most "
        "this many over the questions (default 10)")
    add("--patience", type=int, default=3, help="finetune: stop after this many epochs in a row without a better loss")
    add("--lr", type=float)
    add("--warmup", type=int, help="steps of linear warm-up; then linear decay to 0")
    add("--beta2", type=float, help="of AdamW")
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest gradient norm; each of n layers is clipped to clip / sqrt(n)")
    add("--objective", choices=["both", "reconstruction", "completion"], default="both", help="eq. 5, or Table 2's "
        "ablations; one chunk has no completion")
    add("--windows", action="store_true", help="reconstruct random windows of the prefix, as the released code does")
    add("--d-r", type=int)
    add("--rank", type=int)
    add("--scale", type=float)
    add("--norm", choices=NORMS)
    add("--damping", type=float)
    add("--targets", nargs="+")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; generator and S stay fp32. Default bfloat16 "
        "where the hardware has it; finetune float32, where steps of 1e-5 do not round away")
    add("--device", help="default: CUDA where there is one")
    add("--checkpointing", nargs="?", type=int, const=10_000, default=0, metavar="N", help="recompute the activations "
        "of the first N blocks (without a number: of all) in the backward pass; as few as memory allows")
    add("--eval-every", type=int, default=200)
    add("--eval-sequences", type=int, default=50)
    add("--save-every", type=int, default=200)
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--max-minutes", type=float, help="stop with a checkpoint after this long")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def recipe(args, base):
    """Fill what the command line left open. A base of width 2,048 or more gets the paper's recipe (appendix B;
    model_type llama stands for Llama2); a smaller one what shows memory within minutes on a CPU."""
    llama, instruct = base.config.model_type == "llama", args.stage == "instruct"
    if base.config.get_text_config().hidden_size >= 2048:
        defaults = {"d_r": 1024, "rank": 128, "scale": 1 / 8 if llama else 1 / 16, "targets": ["o_proj"], "chunk": 1024,
                    "chunks": 8, "micro_batch": 1, "warmup": 100, "beta2": 0.999}
        defaults |= {"lr": 5e-5, "batch": 32} if instruct else {
            "lr": 1e-4 if llama else 5e-5, "batch": 8, "steps": 15_259}                        # 1 B tokens
    else:
        defaults = {"d_r": 192, "rank": 64, "scale": 1.0, "targets": ["down_proj"], "chunk": 16, "chunks": 1,
                    "batch": 32, "micro_batch": 32, "warmup": 15, "beta2": 0.98}
        defaults |= {"lr": 6e-3, "steps": 100} if not instruct else {
            "lr": 1e-3, "chunk": 1024, "batch": 8, "micro_batch": 4}
    for name, value in {**defaults, "norm": "svd", "damping": 1e-2}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("chunk", "chunks", "batch", "micro_batch", "eval_every", "eval_sequences", "save_every", "keep",
                 "steps", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for wrong, words in (
            (args.seed < 0, "--seed must not be negative"),
            (not 0 <= (args.excerpts or 0) <= 1, "--excerpts is a probability: give a number from 0 to 1"),
            (args.chunk < 2, "--chunk must be at least 2: the first token of a segment is never a target"),
            (not instruct and args.objective == "completion" and args.chunks < 2,
             "--objective completion needs --chunks of at least 2: the first chunk has no adapter"),
            (min(args.lr, args.clip) <= 0 or min(args.warmup, args.weight_decay) < 0 or not 0 <= args.beta2 < 1,
             "--lr and --clip must be positive, --warmup and --weight-decay not negative, --beta2 from 0 to below 1")):
        if wrong:
            raise InputError(words)


def adapted_model(args, base):
    """The model to train: a fresh generator, or that of --checkpoint, whose config then fills the flags."""
    if args.checkpoint is None:
        recipe(args, base)
        return AdaptedLM(base, GeneratorConfig(**{name: getattr(args, name) for name in SHAPE}, chunk=args.chunk))
    model = AdaptedLM.from_pretrained(base, args.checkpoint)
    for name in SHAPE:
        given, trained = getattr(args, name), getattr(model.config, name)
        if given not in (None, trained):
            raise InputError(f"--{name.replace('_', '-')} {given} is not what --checkpoint {args.checkpoint} was "
                             f"trained with ({trained}); leave the flag out")
        setattr(args, name, trained)
    recipe(args, base)
    model.config.chunk = args.chunk                     # evaluate.py reads contexts in chunks of this length
    return model


def loss_weights(labels, C, objective):
    """Weight of a nat in each segment, (B, N): eq. 5 as the sum of two token means over the whole global batch, or the
    one token mean over answers. Segment 0 has no adapter and trains nothing, so it is left out. (The released code
    takes one token mean over all 2C segments.)"""
    targets = (labels[:, :, 1:] != -100).sum(-1)                            # (B, N)
    weights = torch.zeros(targets.shape)
    if objective != "completion":
        weights[:, C:] = 1 / targets[:, C:].sum().clamp(min=1)
    if objective != "reconstruction":
        weights[:, 1:C] = 1 / targets[:, 1:C].sum().clamp(min=1)
    return weights


def learning_rate(args, step):
    """Linear warm-up, then linear decay to 0 (WarmupDecayLR)."""
    decay = (args.steps - step) / max(args.steps - args.warmup, 1)
    return args.lr * min((step + 1) / max(args.warmup, 1), decay, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def train(args):
    process, world, local = (int(os.environ.get(name, value))
                             for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.stage == "instruct":
        args.data = args.data or TABLE_3
        if args.checkpoint is None:
            raise InputError("--stage instruct starts from a pretrained generator: name it with --checkpoint")
    if not args.data:
        raise InputError("--data is missing: name text files, a hub data set id, or a packed .bin file")
    for source in args.validation or []:
        if not is_file_source(source) and not source.endswith(".bin"):
            raise InputError(f"--validation {source}: name files (.parquet, .jsonl, .txt or a packed .bin)")
    if checkpoints(args.out) and not args.resume:
        raise InputError(f"--out {args.out} already holds checkpoints: add --resume to continue that run, or name "
                         "another directory")
    if torch.cuda.is_available() and args.device in (None, "cuda"):
        args.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:
        cuda = str(args.device).startswith("cuda")
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=15),
                                device_id=torch.device(args.device) if cuda else None)
        packing = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    resumed, args.dtype = share(resume_point(args) if process == 0 else None)

    base, tokenizer = load_base(args.base, args.dtype and getattr(torch, args.dtype), args.device)
    device, args.dtype = base.device, str(base.dtype).split(".")[-1]
    torch.manual_seed(args.seed)
    model = adapted_model(args, base)
    model.checkpointing = args.checkpointing
    if args.batch % world:
        raise InputError(f"--batch {args.batch} must be a multiple of the {world} processes")
    if device.type == "cuda" and args.dtype == "bfloat16":
        torch.backends.cuda.matmul.fp32_precision = "tf32"      # holds the bf16 factors of S exactly; norm avoids it
    if device.type == "cpu":
        keep_freed_memory()
        if args.dtype == "bfloat16" and args.chunk <= 256:      # the fused kernel's backward pass is far slower there
            base.set_attn_implementation("eager")
    parameters = list(model.generator.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay,
                                  fused=True)
    # gradients are views of one buffer, which is reduced whole, with a step's totals at its end:
    # nats of the second half, of completion, context tokens, stop?, failed?
    flat = torch.zeros(sum(p.numel() for p in parameters) + 5, device=device)
    for p, grad in zip(parameters, flat[:-5].split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    totals = flat[-5:]

    if world > 1 and local > 0:                         # the first process of a machine packs, the others find the file
        dist.barrier(packing)
    common = {"chunk": args.chunk, "chunks": args.chunks, "batch_size": args.batch, "seed": args.seed,
              "eval_sequences": args.eval_sequences}
    if args.stage == "instruct":
        batches = instruction_batches(tokenizer, args.data, args.validation, **common, weights=args.weights or (),
                                      excerpts=args.excerpts or 0.0)
        args.steps = args.steps or max(1, (args.epochs or 2) * batches.epoch // args.batch)
    else:
        batches = pretraining_batches(tokenizer, args.data, args.validation, **common, max_tokens=args.max_tokens,
                                      windows=args.windows)
    if world > 1 and local == 0:
        dist.barrier(packing)

    step, tokens, validated = 0, 0, []
    if process == 0:
        make_directory(args.out)
        if resumed:
            step, tokens = load_checkpoint(args, resumed, model, optimizer)
        elif args.start == "aligned" and args.checkpoint is None:
            aligned_start(model, sequences(batches.text, 128, 0, 160, args.seed).split(16))
        trim_log(os.path.join(args.out, "log.jsonl"), step if resumed else None)
        validated = trim_log(os.path.join(args.out, "validation.jsonl"), step if resumed else None)
        print(f"generator of {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters on {args.base}, {args.dtype}, "
              f"{device}; {batches.about}; {args.batch} x {args.chunks} chunks of {args.chunk} tokens a step; "
              f"{args.steps} steps from step {step}; {world} process{'es' if world > 1 else ''}")
    step, tokens, validated = share((step, tokens, validated))
    share_state(parameters, optimizer, step > 0)

    instruct = args.stage == "instruct"
    second_name, objective = ("answer", "reconstruction") if instruct else ("reconstruction", args.objective)

    def prepare(step):
        """The micro-batches of this process, as (segments, mask, labels, weights), visible. Every process cuts the
        whole global batch, so that the token counts need no communication, and keeps its own rows."""
        segments, mask, visible, labels = batches.training(step)
        weights = loss_weights(labels, int(visible.max()), objective)
        labels = labels.masked_fill((weights == 0)[:, :, None], -100)      # no lm_head for what has no weight
        parts = []
        for rows in torch.arange(process, args.batch, world).split(args.micro_batch):
            (m, s, l, w), v = trim(mask[rows], visible, segments[rows], labels[rows], weights[rows])
            tensors = [s, None if m.all() else m, l, w]
            parts.append(([t.pin_memory() if t is not None and device.type == "cuda" else t for t in tensors], v))
        return parts

    stopping, stop, began, skipped = [], False, time.time(), 0
    signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    bar = tqdm(total=args.steps, initial=step, desc="training", unit="step", disable=process != 0)
    loader = ThreadPoolExecutor(1)                      # cuts and pins the next batch while this one is computed
    coming = loader.submit(prepare, step)
    while True:
        if (step % args.eval_every == 0 or step == args.steps) and step not in validated and not stop:
            losses = validate(args, model, batches, process, world)
            if process == 0:
                report_validation(args, step, losses)
        if step == args.steps or stop:
            break
        t0 = time.time()
        parts, coming = coming.result(), loader.submit(prepare, step + 1)
        for tensors, visible in parts:
            segments, mask, labels, weights = (t if t is None else t.to(device, non_blocking=True) for t in tensors)
            C = int(visible.max())
            try:
                nats, _ = model.segment_losses(segments, mask, visible, labels)
                losses = nats * weights                                     # (B, N)
                losses.sum().backward()
                totals[0] += losses[:, C:].sum().detach()
                totals[1] += losses[:, 1:C].sum().detach()
            except torch.linalg.LinAlgError:            # NaN in S: the step is lost, and skipped below by every process
                totals[4] += 1
            totals[2] += segments[:, :C].numel() if mask is None else mask[:, :C].sum()
        totals[3] = bool(stopping) or bool(args.max_minutes and time.time() - began > 60 * args.max_minutes)
        if world > 1:
            dist.all_reduce(flat)                       # the loss is already divided by the global token counts

        second, completion, read, stop, failed = totals.tolist()
        # layer by layer: one layer's weak directions of S can make its gradient jump, and should not cost all the step
        layers = model.generator.layers
        norms = [torch.nn.utils.clip_grad_norm_(layer.parameters(), args.clip / len(layers) ** 0.5) for layer in layers]
        norm = torch.stack(norms).norm().item()
        finite = math.isfinite(norm + second + completion) and not failed
        lr = learning_rate(args, step)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        flat.zero_()
        skipped = 0 if finite else skipped + 1
        step, tokens = step + 1, tokens + int(read)

        if process == 0:
            nats = {second_name: second} | ({} if instruct else {"completion": completion})
            row = {"step": step, "loss": second + completion, **nats, "lr": lr, "grad_norm": norm, "tokens": tokens,
                   "skipped": not finite, "tokens_per_s": read / (time.time() - t0), "memory_gb": peak_memory(device)}
            with open(os.path.join(args.out, "log.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
            bar.update()
            bar.set_postfix(loss=f"{second + completion:.3f}", tokens_s=f"{row['tokens_per_s']:.0f}")
        if skipped == MAX_SKIPPED:
            raise InputError(f"the loss or its gradient was not finite {MAX_SKIPPED} steps in a row (step {step}): "
                             "lower --lr or raise --damping; checkpoints already written are good")
        if process == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            save_checkpoint(args, step, tokens, model, optimizer)
    bar.close()
    loader.shutdown()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if process == 0:
        print(f"stopped at step {step} of {args.steps}; generator in {checkpoints(args.out)[-1]}")


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(args, model, batches, process, world):
    """Token-mean nats of each fixed validation item, (n, 3): second half (reconstruction, or the answers); completion,
    NaN where there is none; the second half under the adapter of a random control context, which tells memory from a
    mere change of style, NaN where an item has none."""
    segments, mask, visible, labels = batches.validation
    C, n, device = int(visible.max()), len(segments), model.base.device
    losses = torch.zeros(n, 3, dtype=torch.float64)
    mine = torch.arange(process, n, world).split(args.micro_batch) if process < n else []
    for rows in tqdm(mine, desc="validation", leave=False, disable=process != 0):
        control = torch.tensor([i if batches.controls[i] is None else batches.controls[i] for i in rows.tolist()])
        for context in (rows, control):
            mixed = [torch.cat([t[context, :C], t[rows, C:]], 1) for t in (mask, segments)]
            own = labels[rows] if context is rows else labels[rows].index_fill(1, torch.arange(C), -100)
            (m, s, own), v = trim(mixed[0], visible, mixed[1], own)
            nats, count = model.segment_losses(s.to(device), None if m.all() else m.to(device), v, own.to(device))
            end = int(v.max())
            second = nats[:, end:].sum(1) / count[:, end:].sum(1)           # (rows,)
            if context is rows:
                losses[rows, 0] = second.double().cpu()
                losses[rows, 1] = (nats[:, 1:end].sum(1) / count[:, 1:end].sum(1)).double().cpu()
            else:
                losses[rows, 2] = second.double().cpu().masked_fill(control == rows, math.nan)
    if world > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    return losses.cpu()


def report_validation(args, step, losses):
    """Append to validation.jsonl (null where an item has no value) and print, with the paired difference to step 0 and
    its standard error over items; then how much better the own context is than the control."""
    path = os.path.join(args.out, "validation.jsonl")
    second = "answer" if args.stage == "instruct" else "reconstruction"
    names = (second, "completion", second + "_shuffled")
    columns = {name: losses[:, k] for k, name in enumerate(names) if not losses[:, k].isnan().all()}
    with open(path, "a") as file:
        means = {name: values.nanmean().item() for name, values in columns.items()}
        items = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in columns.items()}
        file.write(json.dumps({"step": step, **means, "sequences": items}) + "\n")
    with open(path) as file:
        start = json.loads(file.readline())["sequences"]

    def difference(a, b):
        d = (a - b)[~(a - b).isnan()]
        return f"{d.mean():+.4f} +- {d.std() / len(d) ** 0.5:.4f}" if len(d) > 1 else "unknown"

    for name, values in columns.items():
        change = difference(values, torch.tensor([math.nan if v is None else v for v in start[name]]))
        tqdm.write(f"step {step:6d}  {name:24s} {means[name]:.4f} nats  perplexity {math.exp(means[name]):9.2f}  "
                   f"since step 0 {change}")
    tqdm.write(f"step {step:6d}  {'control - own context':24s} {difference(losses[:, 2], losses[:, 0])} nats")


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints, and what processes share


def save_checkpoint(args, step, tokens, model, optimizer):
    """out/step-NNNNNN, written aside, flushed to disk and renamed: a kill at any moment leaves the last complete."""
    final, part = os.path.join(args.out, f"step-{step:06d}"), os.path.join(args.out, "checkpoint.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    state = {f"{key}/{name}": value for name, p in model.generator.tensors().items()
             for key, value in optimizer.state[p].items()}
    save_file(state, os.path.join(part, "optimizer.safetensors"))
    with open(os.path.join(part, "trainer.json"), "w") as file:
        json.dump({"step": step, "tokens": tokens, "args": vars(args)}, file, indent=1)
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


def resume_point(args):
    """(newest checkpoint to resume from or None, dtype): a resumed run keeps the dtype it was started with."""
    path = checkpoints(args.out)[-1] if args.resume and checkpoints(args.out) else None
    return path, args.dtype or (read_json(os.path.join(path, "trainer.json"))["args"]["dtype"] if path else None)


def load_checkpoint(args, path, model, optimizer):
    """Restore generator and optimiser; returns step and tokens. The run must have been started with the same flags."""
    trainer = read_json(os.path.join(path, "trainer.json"))
    free = "out resume micro_batch device checkpointing eval_every save_every keep max_minutes".split()
    for name, value in vars(args).items():              # those free change no result but rounding
        if name not in free and trainer["args"].get(name) != value:
            raise InputError(f"--resume: {path} was trained with --{name.replace('_', '-')} "
                             f"{trainer['args'].get(name)}, not {value}; repeat its flags or choose another --out")
    model.generator.load_tensors(read_safetensors(os.path.join(path, "generator.safetensors"))[0], path)
    state, _ = read_safetensors(os.path.join(path, "optimizer.safetensors"))
    for name, p in model.generator.tensors().items() if state else ():        # no state: every step so far was skipped
        optimizer.state[p] = {key: state[f"{key}/{name}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")}
    return trainer["step"], trainer["tokens"]


def share(value):
    """Process 0's value on every process: it alone may have the checkpoints."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def share_state(parameters, optimizer, resumed):
    """Process 0's weights and, of a resumed run, its optimiser state, on every process."""
    if not dist.is_initialized():
        return
    known = share(resumed and len(optimizer.state) > 0)
    for p in parameters:
        dist.broadcast(p.data, 0)
        if known:
            state = optimizer.state[p] or {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                           "exp_avg_sq": torch.zeros_like(p)}
            for value in state.values():
                dist.broadcast(value, 0)
            optimizer.state[p] = state


def trim_log(path, step):
    """Drop the lines that a killed run wrote after the checkpoint of that step; all of them where it left none (step
    None). Returns the steps of those kept."""
    rows = []
    if os.path.exists(path):
        with open(path) as file:
            lines = [line for line in file if step is not None and line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with open(path + ".part", "w") as file:
            file.writelines(kept)
        os.replace(path + ".part", path)
        rows = [json.loads(line)["step"] for line in kept]
    return rows


def main():
    args = arguments()
    if args.stage == "finetune":
        keep_freed_memory()
    (finetune if args.stage == "finetune" else train)(args)


if __name__ == "__main__":
    run_command(main)
