"""Training: a flat loop for one process or many, in three stages.

    python train.py --data corpus.parquet --out out/run                     # pretrain the generator (§2.3), CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py --data corpus.parquet --checkpointing 12 --out out/mistral \\
        --base mistralai/Mistral-7B-Instruct-v0.2                           # the paper's setting: its recipe by default
    python train.py --stage instruct --checkpoint out/run/step-000100 --data qa.parquet --out out/instruct     # Table 3
    python train.py --stage finetune --data qa.parquet --out out/sft        # baseline SFT; with --documents, CPT too

The global batch is --batch for any number of processes. Every out/run/step-* is a checkpoint that evaluate.py reads;
--resume continues from the newest one, on a CPU to weights bit-identical to an unbroken run.

Shapes: B sequences of a batch, C context chunks, N segments of a pass (2C in pretraining), L tokens of a segment.
"""

import argparse
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import instruction_batches, pretraining_batches, sequences, trim
from generator import NORMS, GeneratorConfig
from model import DEFAULT_BASE, AdaptedLM, load_base, locate_base
from support.aligned import aligned_start
from support.checkpoints import (check_same_flags, check_stage_flags, checkpoints, load_checkpoint, save_checkpoint,
                                 share, share_state, trim_log)
from support.files import InputError, is_file_source, make_directory, read_json, run_command
from support.finetune import finetune
from support.instructions import TABLE_3
from support.machine import balanced_rows, choose_attention, keep_freed_memory, peak_memory

SHAPE = ("d_r", "rank", "scale", "norm", "damping", "targets", "blocks")   # of a generator; a --checkpoint decides them
MAX_SKIPPED = 10          # steps in a row without a finite gradient before the run gives up


def loss_weights(labels, C, objective):
    """Weight (B, N) of each segment's nats, from labels (B, N, L) of the whole global batch: eq. 5, its log-likelihoods
    as token means: reconstruction over segments C .. N-1, completion over 1 .. C-1; segment 0 has no adapter. (Released
    code: one token mean over all 2C segments.) Rows that begin with a question, unlabelled, have their own mean."""
    targets = (labels[:, :, 1:] != -100).sum(-1)                            # (B, N)
    weights = torch.zeros(targets.shape)
    if objective != "completion":
        text = labels[:, -1, 0] != -100
        for rows in (text, ~text):
            weights[rows, C:] = 1 / targets[rows, C:].sum().clamp(min=1)
    if objective != "reconstruction":
        weights[:, 1:C] = 1 / targets[:, 1:C].sum().clamp(min=1)
    return weights


def learning_rate(args, step):
    """Linear warm-up, then linear decay to 0 (WarmupDecayLR)."""
    decay = (args.steps - step) / max(args.steps - args.warmup, 1)
    return args.lr * min((step + 1) / max(args.warmup, 1), decay, 1.0)


def train(args):
    check_sources(args)
    process, world, local = (int(os.environ.get(name, value))
                             for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if torch.cuda.is_available() and args.device in (None, "cuda"):
        args.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:
        locate_base(args.base)                          # a .gguf file is converted now: in a group only rank 0 can
        cuda = str(args.device).startswith("cuda")
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=15),
                                device_id=torch.device(args.device) if cuda else None)
        packing = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    newest = checkpoints(args.out)[-1:] if args.resume and process == 0 else []     # process 0 alone may have them
    resumed = share(read_json(os.path.join(newest[0], "trainer.json")) if newest else None)
    if resumed and args.dtype is None:                  # a resumed run keeps the dtype it was started with
        args.dtype = resumed["args"]["dtype"]

    base, tokenizer = load_base(args.base, args.dtype and getattr(torch, args.dtype), args.device)
    device, args.dtype = base.device, str(base.dtype).split(".")[-1]
    torch.manual_seed(args.seed)
    model = adapted_model(args, base)
    model.checkpointing = args.checkpointing
    if args.batch % world:
        raise InputError(f"--batch {args.batch} must be a multiple of the {world} processes")
    choose_attention(base, args.chunk)
    parameters, layers = list(model.generator.parameters()), model.generator.layers
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay,
                                  fused=True)
    # gradients are views of one buffer, which is reduced whole, with a step's totals at its end:
    # nats of the second half (the answers), of completion (of texts), context tokens, stop?, failed?
    flat = torch.zeros(sum(p.numel() for p in parameters) + 5, device=device)
    for p, grad in zip(parameters, flat[:-5].split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    totals = flat[-5:]

    instruct = args.stage == "instruct"
    packs = not instruct or args.documents is not None  # else each process reads the questions at once
    if world > 1 and local > 0 and packs:               # the first process of a machine packs, the others find the file
        dist.barrier(packing)
    objective = "reconstruction" if instruct else args.objective           # instruct: of segments C on, the answers
    common = {k: getattr(args, k) for k in ("chunk", "chunks", "seed", "eval_sequences")} | {"batch_size": args.batch}
    if instruct:
        batches = instruction_batches(tokenizer, args.data, args.validation, **common, weights=args.weights or (),
                                      excerpts=args.excerpts or 0.0, texts=args.documents)
        args.steps = args.steps or max(1, int((args.epochs or 2) * batches.epoch))
    else:
        batches = pretraining_batches(tokenizer, args.data, args.validation, **common, max_tokens=args.max_tokens,
                                      windows=args.windows)
    if world > 1 and (local == 0 or not packs):
        dist.barrier(packing)

    step, tokens, validated = 0, 0, []
    if resumed:
        check_same_flags(args, resumed["args"])
        step, tokens = resumed["step"], resumed["tokens"]
    if process == 0:
        make_directory(args.out)
        if resumed:
            load_checkpoint(newest[0], model, optimizer)
        elif args.start == "aligned" and args.checkpoint is None:
            length = min(128, (len(batches.text) + 1) // 2)                 # of a text that has two sequences of them
            aligned_start(model, sequences(batches.text, length, 0, 96, args.seed).split(16))
        _, validated = (trim_log(os.path.join(args.out, name), step if resumed else None)
                        for name in ("log.jsonl", "validation.jsonl"))
        print(f"generator of {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters on {args.base}, {args.dtype}, "
              f"{device}; {batches.about}; {args.batch} x {args.chunks} chunks of {args.chunk} tokens a step; "
              f"{args.steps} steps from step {step}; {world} process{'es' if world > 1 else ''}")
    validated = share(validated)
    share_state(parameters, optimizer, step > 0)
    if device.type == "cuda" and args.dtype == "bfloat16":
        torch.backends.cuda.matmul.fp32_precision = "tf32"      # holds the bf16 factors of S exactly; norm avoids it

    def prepare(step):
        """The micro-batches of this process, as (segments, mask, labels, weights), visible. Every process cuts the
        whole global batch, so that the token counts need no communication, and keeps its own rows."""
        segments, mask, visible, labels = batches.training(step)                            # (B, N, L); visible (N,)
        weights = loss_weights(labels, int(visible.max()), objective)                       # (B, N)
        labels = labels.masked_fill((weights == 0)[:, :, None], -100)      # no lm_head for what has no weight
        if objective == "completion":
            mask[:, int(visible.max()):] = 0            # trim then drops the second half, which trains nothing
        parts, cost = [], (mask.sum(-1) * (1 + 2 * (visible > 0))).sum(1)       # (B,): a backward pass is two forward
        for rows in balanced_rows(cost.tolist(), world)[process].split(args.micro_batch):
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
            C = int(visible.max()) + (objective == "completion")            # trim dropped the segments that see all C
            try:
                nats, _ = model.segment_losses(segments, mask, visible, labels)
                losses = nats * weights                                     # (B, N), whose sum is eq. 5
                losses.sum().backward()
                text = (labels[:, -1, 0] != -100) & instruct
                totals[:2] += torch.stack([losses[~text, C:].sum(), losses[:, 1:C].sum() + losses[text].sum()]).detach()
            except torch.linalg.LinAlgError:            # NaN in S: the step is lost, and skipped below by every process
                totals[4] += 1
            totals[2] += segments[:, :C].numel() if mask is None else mask[:, :C].sum()
        totals[3] = bool(stopping) or bool(args.max_minutes and time.time() - began > 60 * args.max_minutes)
        if world > 1:
            dist.all_reduce(flat)                       # the loss is already divided by the global token counts

        second, completion, read, stop, failed = totals.tolist()
        # layer by layer: one layer's weak directions of S can make its gradient jump, and should not cost all the step
        norms = [torch.nn.utils.clip_grad_norm_(layer.parameters(), args.clip / len(layers) ** 0.5) for layer in layers]
        norm = torch.stack(norms).norm().item()
        finite = math.isfinite(norm + second + completion) and not failed
        lr = learning_rate(args, step)
        if finite:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        flat.zero_()
        skipped = 0 if finite else skipped + 1
        step, tokens = step + 1, tokens + int(read)

        if process == 0:
            nats = dict(zip(("answer", "text") if instruct else ("reconstruction", "completion"), (second, completion)))
            row = {"step": step, "loss": second + completion, **nats, "lr": lr, "grad_norm": norm, "tokens": tokens,
                   "skipped": not finite, "tokens_per_s": read / (time.time() - t0), "memory_gb": peak_memory(device)}
            append(os.path.join(args.out, "log.jsonl"), row)
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
    NaN where there is none; the second half under the adapter of a control context, which tells memory from a mere
    change of style, NaN where an item has none."""
    segments, mask, visible, labels = batches.validation
    C, n, device = int(visible.max()), len(segments), model.base.device
    losses = torch.zeros(n, 3, dtype=torch.float64)
    mine = torch.arange(process, n, world).split(args.micro_batch) if process < n else []
    for rows in tqdm(mine, desc="validation", leave=False, disable=process != 0):
        control = torch.tensor([i if batches.controls[i] is None else batches.controls[i] for i in rows.tolist()])
        for context, is_control in ((rows, False), (control, True)):
            m, s = (torch.cat([t[context, :C], t[rows, C:]], 1) for t in (mask, segments))          # (rows, N, L)
            targets = labels[rows].index_fill(1, torch.arange(C), -100) if is_control else labels[rows]
            (m, s, targets), v = trim(m, visible, s, targets)
            nats, count = model.segment_losses(s.to(device), None if m.all() else m.to(device), v, targets.to(device))
            end = int(v.max())
            second, completion = ((nats[:, part].sum(1) / count[:, part].sum(1)).double().cpu()     # (rows,)
                                  for part in (slice(end, None), slice(1, end)))
            if is_control:
                losses[rows, 2] = second.masked_fill(control == rows, math.nan)
            else:
                losses[rows, 0], losses[rows, 1] = second, completion
    if world > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    return losses.cpu()


def report_validation(args, step, losses):
    """Append to validation.jsonl (null where an item has no value) and print, with the paired difference to step 0 and
    its standard error over items; then how much better the own context is than the control."""
    path = os.path.join(args.out, "validation.jsonl")
    second = "answer" if args.stage == "instruct" else "reconstruction"
    columns = zip((second, "completion", second + "_shuffled"), losses.T)
    columns = {name: column for name, column in columns if not column.isnan().all()}
    means = {name: column.nanmean().item() for name, column in columns.items()}
    items = {name: [None if math.isnan(v) else v for v in column.tolist()] for name, column in columns.items()}
    append(path, {"step": step, **means, "sequences": items})
    with open(path) as file:
        start = json.loads(file.readline())["sequences"]

    def difference(a, b):
        d = (a - b)[~(a - b).isnan()]
        return f"{d.mean():+.4f} +- {d.std() / len(d) ** 0.5:.4f}" if len(d) > 1 else "unknown"

    for name, column in columns.items():
        change = difference(column, torch.tensor([math.nan if v is None else v for v in start[name]]))
        tqdm.write(f"step {step:6d}  {name:24s} {means[name]:.4f} nats  perplexity {math.exp(means[name]):9.2f}  "
                   f"since step 0 {change}")
    tqdm.write(f"step {step:6d}  {'control - own context':24s} {difference(losses[:, 2], losses[:, 0])} nats")


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# flags


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["pretrain", "instruct", "finetune"], default="pretrain")
    add("--base", default=DEFAULT_BASE, help="frozen base model: hub id, directory or .gguf file")
    add("--checkpoint", help="start from this trained generator; its config decides " + ", ".join(SHAPE))
    # torchrun stops at --start, which abbreviates two options of its own
    add("--start", "--init", choices=["aligned", "random"], default="aligned", help="without --checkpoint: A2, B1, B2 "
        "from the base's own statistics (support/aligned.py), or the paper's random ones; under torchrun: --init")
    add("--data", nargs="+", help=".parquet, .jsonl(.gz), .txt(.gz) files, a hub data set id, or one packed .bin file; "
        "instruct: default the hub sets of Table 3")
    add("--documents", nargs="+", help="instruct: texts to reconstruct, in 3 rows of 8, beside the questions; "
        "finetune: texts to learn first, by log-likelihood (CPT)")
    add("--validation", nargs="+", help="files of the same kinds; default: a part of --data kept out of training: "
        "the last --eval-sequences sequences, in instruct as many documents, in finetune a tenth of the contexts")
    add("--weights", nargs="+", metavar="SOURCE=N", help="instruct: how often an epoch goes through a source, which is "
        "a row's \"dataset\" or a file of --data; default 1")
    add("--excerpts", type=float, help="instruct: probability that a document longer than the length drawn for its "
        "context is cut to the sentences around an answer; default 0")
    add("--max-tokens", type=int, help="pack at most this many tokens of --data")
    add("--out", required=True, help="directory for checkpoints, log.jsonl and validation.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, or start if there is none")
    # None: chosen for the size of the base in recipe()
    add("--steps", type=int, help="optimiser steps"), add("--chunk", type=int, help="tokens of a chunk (L)")
    add("--chunks", type=int, help="chunks of a sequence (C); the pass holds 2C segments")
    add("--batch", type=int, help="sequences of a step over all processes")
    add("--micro-batch", type=int, help="sequences of one forward and backward pass")
    add("--epochs", type=int, help="passes over the data; default: instruct 2 (unless --steps), finetune at most 10")
    add("--patience", type=int, default=3, help="finetune: stop after this many epochs in a row without a better loss")
    add("--warmup", type=int, help="steps of linear warm-up; then linear decay to 0")
    add("--lr", type=float), add("--beta2", type=float, help="AdamW's"), add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest gradient norm; each of n layers is clipped to clip / sqrt(n)")
    add("--objective", choices=["both", "reconstruction", "completion"], help="pretrain: eq. 5 (default) or Table 2's "
        "ablations; one chunk has no completion")
    add("--windows", action="store_true", help="reconstruct random windows of the prefix, as the released code does")
    for flag, kind in (("--d-r", int), ("--rank", int), ("--scale", float), ("--damping", float)):
        add(flag, type=kind)
    add("--norm", choices=NORMS), add("--targets", nargs="+")
    add("--blocks", type=int, nargs=2, metavar=("FIRST", "LAST"), help="blocks with adapters; default: all")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; generator and S stay fp32. Default bfloat16 "
        "where the hardware has it; finetune float32, where steps of 1e-5 do not round away")
    add("--device", help="default: CUDA where there is one")
    add("--checkpointing", nargs="?", type=int, const=10_000, default=0, metavar="N", help="recompute the activations "
        "of the first N blocks (without a number: of all) in the backward pass; as few as memory allows")
    add("--eval-every", type=int, default=200), add("--eval-sequences", type=int, default=50)
    add("--save-every", type=int, default=200), add("--keep", type=int, default=2, help="checkpoints kept")
    add("--max-minutes", type=float, help="stop with a checkpoint after this long"), add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def check_sources(args):
    """Refuse what can be refused before anything is loaded; fill in --data."""
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


def recipe(args, base):
    """Fill what the command line left open. A base of width 2,048 or more gets the paper's recipe (appendix B;
    model_type llama stands for Llama2); a smaller one a recipe for minutes on a CPU: one chunk, so no completion."""
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
    for name, value in {**defaults, "norm": "svd", "damping": 1e-2, "objective": "both"}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"chunk": 2, "eval_sequences": 2, "seed": 0, "warmup": 0, "weight_decay": 0, **dict.fromkeys(
        "chunks micro_batch eval_every save_every keep steps epochs".split(), 1), "batch": 1 + bool(args.documents)}
    for name, low in least.items():                     # the first token of a segment is never a target
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}")
    if args.objective == "completion" and args.chunks < 2:
        raise InputError("--objective completion needs --chunks of at least 2: the first chunk has no adapter")
    if not min(args.lr, args.clip) > 0 or not 0 <= args.beta2 < 1 or not 0 <= (args.excerpts or 0) <= 1:
        raise InputError("--lr and --clip must be positive, --beta2 from 0 to below 1, --excerpts is a probability")


def adapted_model(args, base):
    """The model to train: a fresh generator, or that of --checkpoint, whose config then fills the flags."""
    model = AdaptedLM.from_pretrained(base, args.checkpoint) if args.checkpoint else None
    for name in SHAPE if model else ():
        given, trained = getattr(args, name), getattr(model.config, name)
        if given not in (None, trained):
            raise InputError(f"--{name.replace('_', '-')} {given} is not what --checkpoint {args.checkpoint} was "
                             f"trained with ({trained}); leave the flag out")
        setattr(args, name, trained)
    recipe(args, base)
    model = model or AdaptedLM(base, GeneratorConfig(**{name: getattr(args, name) for name in SHAPE}))
    model.config.chunk = args.chunk                     # evaluate.py reads contexts in chunks of this length
    return model


def main():
    args = arguments()
    check_stage_flags(args)
    if not torch.cuda.is_available() or args.device == "cpu":
        keep_freed_memory()
    (finetune if args.stage == "finetune" else train)(args)


if __name__ == "__main__":
    run_command(main)
