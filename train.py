"""Training: a flat loop for one process or many, in three stages.

    python train.py --data corpus.parquet --out out/run                     # pretrain the generator (§2.3), CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py --data corpus.parquet --checkpointing 12 --out out/mistral \\
        --base mistralai/Mistral-7B-Instruct-v0.2                           # the paper's setting: its recipe by default
    python train.py --stage instruct --checkpoint out/run/step-000100 --data qa.parquet --out out/instruct     # Table 3
    python train.py --stage finetune --data qa.parquet --out out/sft        # baseline SFT; with --documents, CPT too

The global batch is --batch for any number of processes. Every out/run/step-* is a checkpoint that evaluate.py reads;
--resume continues from the newest one, on a CPU to weights bit-identical to an unbroken run. Ctrl-C, SIGTERM, SIGHUP
and SIGUSR1 end a run after the step under way, with a checkpoint.

Shapes: B sequences of a batch, b of a micro-batch, C context chunks, N segments of a pass (2C in pretraining), L tokens
of a segment.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import TABLE_3, InstructionData, PretrainingData, cut_into_passes, sequences
from generator import NORMS, GeneratorConfig
from model import DEFAULT_BASE, AdaptedLM, load_base
from support.fast import LEAST_DAMPING
from support.files import (InputError, bad_input, make_directory, read_json, read_safetensors, run_command,
                           save_tensors)
from support.formats import write_generator
from tasks import metaicl

CLIP = 1.0                # largest gradient norm, as in the released code; the paper names none
WEIGHT_DECAY = 0.01       # AdamW's (appendix B, which says Adam)
MAX_SKIPPED = 10          # steps in a row without a finite gradient before the run gives up
KEPT = 2                  # the newest checkpoints that a run keeps
PASS_TOKENS = 16_384      # of a pass, padded, where there is no --micro-batch: as many as a doubled sequence of the
                          # paper's. Issuing the kernels of a pass takes the same time whatever its length
SHAPE = ("d_r", "rank", "scale", "targets")             # of a generator: a --checkpoint decides them
NOT_OF_STAGE = {
    "pretrain": ["documents", "epochs", "cpt_lr"],
    "instruct": ["objective", "init", "cpt_lr"],
    "finetune": ["objective", "init", "checkpoint", "resume", "steps", "chunk", "chunks", "micro_batch", "warmup",
                 "norm", "damping", "eval_every", "save_every", *SHAPE]}
# flags that a resumed run may change: they change no result, but for rounding
FREE = ("out", "resume", "micro_batch", "device", "shard", "checkpointing", "eval_every", "save_every")


def loss_weights(labels, C, objective):
    """Weight (B, N) of each segment's summed nats, from labels (B, N, L) of the whole global batch, so that the
    weighted sum is eq. 5 with token means for its log-likelihoods: one mean over segments C .. N-1 (reconstruction),
    one over 1 .. C-1 (completion). Segment 0 has no adapter and no weight. (Released code: one token mean over all 2C
    segments.) In instruct segment C is a conversation or a text, and each kind has its own mean."""
    targets = (labels[:, :, 1:] != -100).sum(-1)                        # (B, N)
    weights = torch.zeros(targets.shape)
    if objective != "completion":
        texts = labels[:, -1, 0] != -100                        # a conversation opens with an unlabelled question
        for rows in (texts, ~texts):
            weights[rows, C:] = 1 / targets[rows, C:].sum().clamp(min=1)
    if objective != "reconstruction":
        weights[:, 1:C] = 1 / targets[:, 1:C].sum().clamp(min=1)
    return weights


def learning_rate(args, step):
    """Linear warm-up, then linear decay to 0 (WarmupDecayLR)."""
    warmup = (step + 1) / max(args.warmup, 1)
    decay = (args.steps - step) / max(args.steps - args.warmup, 1)
    return args.lr * min(warmup, decay, 1.0)


def micro_batches(mask, size, rank, world):
    """This process's rows of a batch with this mask (B, N, L), cut into passes of so many; where size is None, into
    passes of rows of like length, each of about PASS_TOKENS tokens with padding, but for a row that is longer by
    itself. Every process has as many passes, which a sharded base needs."""
    if size is not None:
        return torch.arange(len(mask))[rank::world].split(size)
    lengths = mask.sum(-1)                                              # (B, N)
    tokens = (lengths > 0).sum(1) * lengths.amax(1)                     # (B,) of a pass of this row alone, padded
    order = tokens.argsort(descending=True, stable=True)
    mine = order[rank::world]
    passes = [mine[part] for part in cut_into_passes(tokens[mine].tolist(), PASS_TOKENS)]
    most = len(cut_into_passes(tokens[order[::world]].tolist(), PASS_TOKENS))   # of the first process, the longest rows
    while len(passes) < most:
        passes.sort(key=len)
        rows = passes.pop()
        passes += [rows[:1], rows[1:]]
    return passes


def train(args):
    rank = int(os.environ.get("RANK", 0))               # torchrun sets these three
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and args.device in (None, "cuda"):
        args.device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    saved = checkpoints(args.out)
    if saved and not args.resume:
        raise InputError("--out already holds checkpoints: add --resume to continue that run, or name another "
                         "directory")

    load = load_base
    if args.shard:
        from support.sharding import load_sharded as load
    base, tokenizer = load(args.base, args.dtype and getattr(torch, args.dtype), args.device)
    device = base.device
    args.dtype = str(base.dtype).removeprefix("torch.")
    if world > 1 and not args.shard:
        dist.init_process_group(timeout=timedelta(minutes=15))          # gloo for CPU tensors, nccl for CUDA's
    if world > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24))

    torch.manual_seed(args.seed)
    model = adapted_model(args, base)
    model.checkpointing = args.checkpointing
    if args.batch % world:
        raise InputError("--batch must be a multiple of the number of processes")
    if args.dtype == "bfloat16":
        if device.type == "cuda":                       # exact for the bf16 factors of S; norm takes float64 instead
            torch.set_float32_matmul_precision("high")  # TF32
        elif args.chunk <= 256:                         # the backward pass of the fused attention is far slower
            base.set_attn_implementation("eager")

    if args.stage == "instruct":
        torch.backends.cuda.enable_cudnn_sdp(False)     # it builds a plan for each new shape, and every batch has one
        data = InstructionData(args, tokenizer)
        for task in metaicl.TASKS:
            if task in data.tasks:
                raise InputError(f"--data: {task} is one of MetaICL's test tasks (Table 4): leave its rows out")
        args.steps = args.steps or math.ceil((args.epochs or 2) * data.steps_per_epoch)
    else:
        data = PretrainingData(args, tokenizer)
    next(data.batches(0))                               # too little text: say so before anything is written
    often = min(200, max(1, args.steps // 4))
    args.eval_every = args.eval_every or often
    args.save_every = args.save_every or often

    parameters = list(model.generator.parameters())
    layers = model.generator.layers
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, args.beta2), weight_decay=WEIGHT_DECAY, fused=True)
    for p in parameters:                                # AdamW's state, made now: a checkpoint or process 0 fills it
        p.grad = torch.zeros_like(p)
        optimizer.state[p] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p)}

    step = 0
    if rank == 0:                                       # it alone may have the directory
        make_directory(args.out)
        lock = FileLock(f"{args.out}/.lock", timeout=0)         # until this process ends
        with bad_input(f"--out: another process trains in {args.out}: wait for it or name another directory", Timeout):
            lock.acquire()
        size = 3 * sum(p.nbytes for p in parameters)            # of a checkpoint: generator and AdamW's two moments
        needed = (KEPT + 1 - len(saved)) * size
        free = shutil.disk_usage(args.out).free
        if free < needed:
            raise InputError(f"--out: the run needs {needed / 1e9:.1f} GB for its checkpoints, and {free / 1e9:.1f} "
                             "are free there: make room or name another directory")
        if saved:
            step = load_checkpoint(saved[-1], args, model, optimizer)
    if world > 1:                                       # one may have packed text for hours
        checksums = [None] * world
        dist.all_gather_object(checksums, data.checksum(), group=patient)
        if len(set(checksums)) > 1:
            raise InputError("--data: the processes have read different text, its checksums differ, so one machine's "
                             "files are not the other's: copy them anew")
        place = torch.tensor(step, device=device)               # process 0's place in the data
        dist.broadcast(place, 0)
        step = place.item()
    if step == 0 and args.init == "aligned" and args.checkpoint is None:
        from extras.aligned import aligned_start        # on every process: a sharded base needs them all
        length = min(128, (len(data.tokens) + 1) // 2)          # a short text has two sequences of these
        texts = itertools.islice(sequences(data.tokens, length, 0, args.seed), 96)
        aligned_start(model, torch.stack(list(texts)).split(16), quiet=rank > 0)
        torch.cuda.empty_cache()
    if rank == 0:
        cut_log(f"{args.out}/log.jsonl", step)
        cut_log(f"{args.out}/validation.jsonl", step - 1)
        print(f"{args.base}, {args.dtype}, {device}; {data.about}; steps of {args.batch} x {args.chunks} x "
              f"{args.chunk} tokens, from step {step}; processes: {world}", flush=True)
    if world > 1:                                       # process 0's weights and moments
        state = model.generator.state_dict() | moments(model, optimizer)
        for t in state.values():
            dist.broadcast(t, 0)

    stopping = []
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):                       # Windows has two of them
            signal.signal(getattr(signal, name), lambda number, frame: stopping.append(number))
    writer = ThreadPoolExecutor(1)                      # writes checkpoints while the training goes on
    writing = None
    stop, skipped = False, 0
    batches = data.batches(step)
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank != 0)
    while True:
        if (step % args.eval_every == 0 or step == args.steps) and not stop:
            losses = validate(args, model, data.validation, rank, world)
            if rank == 0:
                report(args, step, losses)
        if step == args.steps or stop:
            break

        began = time.time()
        batch = next(batches)                                   # (B, N, L), the same on every process
        C = int(batch.visible.max())
        weights = loss_weights(batch.labels, C, args.objective)         # (B, N)
        targets = batch.labels.masked_fill(weights[:, :, None] == 0, -100)      # no lm_head for them
        # summed over processes: loss of completion, whole loss, context tokens read, signals to stop
        sums = torch.zeros(4, device=device)
        for rows in micro_batches(batch.mask, args.micro_batch, rank, world):
            segments = batch.segments[rows].to(device)                  # (b, N, L)
            mask = batch.mask[rows].to(device)
            labels = targets[rows].to(device)
            try:
                nll, _ = model.segment_losses(segments, mask, batch.visible, labels)    # (b, N)
                losses = nll * weights[rows].to(device)     # their sum over the global batch is eq. 5
                losses.sum().backward()
                sums[0] += losses[:, :C].detach().sum()
                sums[1] += losses.detach().sum()
            except torch.linalg.LinAlgError:            # NaN in S
                sums[1] = math.nan                      # every process skips the step below
            sums[2] += mask[:, :C].sum()
        sums[3] = len(stopping)
        if world > 1:
            gradient = parameters_to_vector(p.grad for p in parameters)
            dist.all_reduce(gradient)       # a sum: the weights already divide by the global token counts
            vector_to_parameters(gradient, [p.grad for p in parameters])
            dist.all_reduce(sums)
        completion, loss, read, stop = sums.tolist()

        # each layer by itself, where the released code clips all at once: a jump in one layer's gradient then shrinks
        # that layer's step alone; together they stay within CLIP
        norms = [clip_grad_norm_(layer.parameters(), CLIP / len(layers) ** 0.5) for layer in layers]
        norm = torch.stack(norms).norm().item()
        lr = learning_rate(args, step)
        skip = not math.isfinite(norm + loss)
        if skip:
            skipped += 1
        else:
            skipped = 0
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        step += 1

        speed = read / (time.time() - began)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} context tokens/s", refresh=False)
        bar.update()
        if rank == 0:
            row = {"step": step, "loss": loss, "completion": completion, "lr": lr, "grad_norm": norm,
                   "tokens": int(read), "tokens_per_s": speed, "skipped": skip}
            if device.type == "cuda":
                row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            append(f"{args.out}/log.jsonl", row)
        if skipped == MAX_SKIPPED:
            bar.close()
            raise InputError(f"the loss or its gradient was not finite {MAX_SKIPPED} steps in a row: lower --lr or "
                             "raise --damping; checkpoints already written are good")
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            if writing:
                writing.result()                        # the one before: raises what kept it from being written
            tensors = copies(model.generator.tensors())
            state = copies(moments(model, optimizer))
            writing = writer.submit(save_checkpoint, args, step, model, tensors, state)
    bar.close()
    if writing:
        writing.result()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        command = "evaluate.py --task ask"
        if step < args.steps:
            command = "train.py with the same flags and --resume, or evaluate.py --task ask"
        elif args.stage == "pretrain":
            command = f"train.py --stage instruct --base {args.base} --data QUESTIONS.jsonl --out out/instruct"
        print(f"stopped at step {step} of {args.steps}, with log.jsonl and validation.jsonl in {args.out}. Next: "
              f"python {command} --checkpoint {checkpoints(args.out)[-1]}")


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(args, model, batch, rank, world):
    """Token-mean losses (n, 3) of the n items of a fixed batch. Column 0: the second half (reconstruction, or the
    answers) under the item's own context; 1: the context itself (completion); 2: as 0 under the context of another
    item, the control, which tells memory from a mere shift towards the data's style. NaN where there is no target."""
    n = len(batch.segments)
    C = int(batch.visible.max())
    device = model.base.device
    # as many items for each process, which a sharded base needs: those beyond n are others again and do not count
    losses = torch.zeros(math.ceil(n / world) * world, 3, device=device)
    mine = torch.arange(rank, len(losses), world)
    size = args.micro_batch or max(1, PASS_TOKENS // batch.mask[0].numel())
    for places in tqdm(mine.split(size), desc="validation", leave=False, disable=rank != 0):
        rows = places % n
        controls = (rows + n // 2) % n                              # neighbours may be alike
        for column, contexts in ((2, controls), (0, rows)):
            inputs = []
            for t in (batch.segments, batch.mask, batch.labels):
                inputs.append(torch.cat([t[contexts, :C], t[rows, C:]], dim=1).to(device))      # (b, N, L)
            segments, mask, labels = inputs
            nll, count = model.segment_losses(segments, mask, batch.visible, labels)            # (b, N)
            losses[places, column] = nll[:, C:].sum(1) / count[:, C:].sum(1)
            losses[places, 1] = nll[:, 1:C].sum(1) / count[:, 1:C].sum(1)     # the own context comes last, and stays
    if world > 1:
        dist.all_reduce(losses)
    return losses[:n].cpu()


def report(args, step, losses):
    """Append the means of losses (n, 3) to validation.jsonl and print them, with gap = control - own, which is what
    the memory is worth in nats a token, and its standard error over the items. What is not a number is left out."""
    second = "reconstruction"
    if args.stage == "instruct":
        second = "answer"
    gap = losses[:, 2] - losses[:, 0]
    gap = gap[~gap.isnan()]
    row = {"step": step}
    for name, column in zip((second, "completion", second + "_shuffled"), losses.T):
        if not column.isnan().all():
            row[name] = column.nanmean().item()
    if len(gap) > 0:
        row["gap"] = gap.mean().item()
    if len(gap) > 1:
        row["gap_stderr"] = (gap.std() / len(gap) ** 0.5).item()
    append(f"{args.out}/validation.jsonl", row)
    tqdm.write("   ".join(f"{name} {value:.4g}" for name, value in row.items()))


# ----------------------------------------------------------------------------------------------------------------------
# the directory of a run: logs, and checkpoints written aside


def append(path, row):
    with bad_input(f"{path} cannot be written", OSError), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def cut_log(path, last):
    """Drop the lines of steps after the last one, which a killed run wrote, and what a machine that went down left:
    half a line, a blank one, zeros."""
    if not os.path.exists(path):
        return
    good = []
    for line in Path(path).read_text(errors="replace").split("\n")[:-1]:
        try:
            if json.loads(line)["step"] <= last:
                good.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    Path(path + ".part").write_text("".join(good))
    os.replace(path + ".part", path)


def checkpoints(out):
    """Complete checkpoints of a run, oldest first: directories of the names that save_checkpoint writes. Whatever else
    is there, a copy of one too, is not ours."""
    found = []
    for path in sorted(Path(out).glob("step-*")):
        if re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})", path.name) and path.is_dir():
            found.append(str(path))
    return sorted(found, key=len)                       # step-1000000 comes after step-999800


def moments(model, optimizer):
    """{"<moment>/<parameter>": tensor} of AdamW's state, as a checkpoint file names them."""
    found = {}
    for name, p in model.generator.tensors().items():
        for moment, t in optimizer.state[p].items():
            found[f"{moment}/{name}"] = t
    return found


def copies(tensors):
    """{name: tensor} on the CPU, out of reach of the steps that follow."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def save_checkpoint(args, step, model, tensors, state):
    """out/step-NNNNNN of the generator's tensors and AdamW's state, written aside and renamed: a kill at any moment
    leaves the last complete, and a full disk nothing half-written. Then the oldest go, but for KEPT."""
    part = f"{args.out}/checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_generator(part, model.base.name_or_path, model.config, tensors)
        save_tensors(state, f"{part}/optimizer.safetensors")
        Path(part, "trainer.json").write_text(json.dumps({"step": step, "args": vars(args)}, indent=1))
        os.rename(part, f"{args.out}/step-{step:06d}")
    except (OSError, InputError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"the checkpoint of step {step} cannot be written, those before it are good (make room, then "
                         f"--resume): {error}") from None
    for old in checkpoints(args.out)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(path, args, model, optimizer):
    """Restore generator and optimiser -> step. A run is resumed with the flags it was started with."""
    try:
        facts = read_json(f"{path}/trainer.json")
        step, flags = facts["step"], facts["args"]
        tensors, _ = read_safetensors(f"{path}/generator.safetensors")
        state, _ = read_safetensors(f"{path}/optimizer.safetensors")
    except (InputError, KeyError) as error:
        raise InputError(f"--resume: the newest checkpoint, {path}, is damaged: delete it to go on from the one before "
                         f"({error})") from None
    for name, value in vars(args).items():
        earlier = flags.get(name, value)                    # an older version had other flags
        if name not in FREE and earlier != value:
            raise InputError(f"--resume: the run was trained with {flag(name)} {earlier}, not {value}; repeat its "
                             "flags or choose another --out")
    model.generator.load_tensors(tensors, path)
    for key, moment in moments(model, optimizer).items():
        moment.copy_(state[key])
    return step


# ----------------------------------------------------------------------------------------------------------------------
# flags


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="train.py [--stage STAGE] --data FILE ... --out DIRECTORY [options]",
                                     epilog="A large base is one of width 2,048 or more, a small one any other.")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+",
        help=".parquet, .jsonl(.gz), .txt(.gz) files, a hub data set id, or one packed .bin file; instruct: default "
             "the hub sets of Table 3")
    add("--documents", nargs="+",
        help="instruct: texts to reconstruct and to continue, half of the rows, beside the questions; finetune: texts "
             "to learn first, by log-likelihood (CPT); default none")
    add("--validation", nargs="+",
        help="files of the same kinds; default a part of --data that is kept out of training: --eval-sequences "
             "sequences, in instruct documents, at most a tenth; in finetune a tenth of the contexts")
    add("--eval-sequences", metavar="N", type=int, default=50, help="validation items; default 50")
    add("--chunk", metavar="N", type=int,
        help="tokens of a chunk (L); default small base 16, instruct 128; large base 1024")
    add("--chunks", metavar="N", type=int,
        help="chunks of a sequence (C), the pass holds 2C segments; default small base 1, large 8")
    add = parser.add_argument_group("model").add_argument
    add("--base", default=DEFAULT_BASE, help="frozen base model: hub id, directory or .gguf file; default %(default)s")
    add("--checkpoint", help="start from this trained generator, which decides " + ", ".join(SHAPE) + "; default none")
    add("--init", choices=["random", "aligned"],
        help="without --checkpoint: the paper's random A2, B1, B2, default of a large base; or ones from the base's "
             "own statistics (extras/aligned.py), which learn from fewer tokens, default of a small one")
    add("--d-r", metavar="N", type=int, help="width of the memory S; default small base 192, large 1024")
    add("--rank", metavar="N", type=int, help="of the adapter; default small base 64, large 128")
    add("--scale", type=float, help="of the adapter (s); default small base 1.0, large 0.0625 (llama 0.125)")
    add("--targets", nargs="+", help="linear layers with adapters; default small base down_proj, large o_proj")
    add("--norm", choices=NORMS, help="default svd, or that of --checkpoint")
    add("--damping", type=float, help="lambda / sigma_1 in norm, bounds its gradient; the paper: 0; default 0.01, or "
                                      "that of --checkpoint")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the base; generator and S stay fp32. Default bfloat16 where the hardware has it; finetune float32, "
             "where steps of 1e-5 do not round away")
    add("--device", help="default CUDA where there is one")
    add("--shard", action="store_true",
        help="under torchrun: share the base out among the processes, for one that is larger than a device; finetune "
             "does so by itself; default no")
    add = parser.add_argument_group("training").add_argument
    add("--stage", choices=["pretrain", "instruct", "finetune"], default="pretrain", help="default %(default)s")
    add("--objective", choices=["both", "reconstruction", "completion"],
        help="pretrain: eq. 5, default both, or Table 2's ablations; one chunk has no completion")
    add("--steps", metavar="N", type=int,
        help="optimiser steps; default small base 100; large 15259, instruct: what --epochs makes")
    add("--epochs", metavar="N", type=int,
        help="passes over the data; default instruct of a large base 2, finetune at most 10")
    add("--batch", metavar="N", type=int,
        help="sequences of a step over all processes; default small base 32, instruct 8; large base 8, instruct "
             "32; finetune 64")
    add("--micro-batch", metavar="N", type=int,
        help="sequences of one forward and backward pass; default small base 32, instruct 8; large base 1; "
             "instruct on CUDA: as many as make 16384 tokens with padding")
    add("--lr", type=float,
        help="learning rate; default small base 0.006, instruct 0.002; large base 5e-05 (pretrain llama 0.0001); "
             "finetune 1e-05")
    add("--cpt-lr", type=float, help="finetune: learning rate of --documents; default llama 3e-05, else 1e-05")
    add("--warmup", metavar="N", type=int,
        help="steps of linear warm-up, then linear decay to 0; default small base 15, large 100")
    add("--checkpointing", nargs="?", type=int, const=10_000, default=0,
        help="recompute the activations of so many blocks (without a number: of all) in the backward pass; as few as "
             "memory allows; default %(default)s")
    add("--seed", metavar="N", type=int, default=0, help="default 0")
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, help="directory for checkpoints, log.jsonl and validation.jsonl")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any; default no")
    add("--eval-every", metavar="N", type=int, help="steps; default 200, but at most a quarter of --steps")
    add("--save-every", metavar="N", type=int, help="steps; default 200, but at most a quarter of --steps")
    args = parser.parse_args(argv)
    check(args)
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def check(args):
    """Refuse what can be refused before anything is loaded; fill in --data."""
    for name in ("lr", "cpt_lr"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"{flag(name)} must be positive")
    for name in NOT_OF_STAGE[args.stage]:               # refused, not ignored
        if getattr(args, name) not in (None, False):
            raise InputError(f"{flag(name)} does not belong to --stage {args.stage}: leave it out")
    least = {"chunk": 2, "chunks": 1, "batch": 1, "micro_batch": 1, "steps": 1, "epochs": 1, "eval_every": 1,
             "save_every": 1, "eval_sequences": 2, "seed": 0}
    if args.documents and args.stage == "instruct":
        least["batch"] = 2                              # a question and a text
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise InputError(f"{flag(name)} must be at least {value}")
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise InputError("--shard shares the base out among processes, and here is one: start several with torchrun")
    if args.stage == "instruct":
        args.data = args.data or TABLE_3
        if args.checkpoint is None:
            raise InputError("--stage instruct starts from a pretrained generator: name it with --checkpoint")
    if not args.data and not args.documents:
        raise InputError("--data is missing: name text files, a hub data set id, or a packed .bin file")
    for sources in (args.data, args.documents, args.validation):
        for source in sources or []:
            if source.endswith((".parquet", ".jsonl", ".txt", ".gz", ".bin")) and not os.path.exists(source):
                raise InputError(f"{source}: no such file")
    for name in ("init", *SHAPE):
        if args.checkpoint and getattr(args, name) is not None:
            raise InputError(f"{flag(name)} is decided by --checkpoint: leave it out")


def fill_recipe(args, base):
    """Fill what the command line left open. A base of width 2,048 or more gets the paper's recipe (appendix B; one of
    model_type llama Llama2's, any other Mistral's), but damping 0.01; a smaller one a recipe for minutes on a CPU: one
    chunk, so no completion, and, since it has 100 steps, beta2 0.98 in AdamW (no flag)."""
    instruct = args.stage == "instruct"
    defaults = {"norm": "svd", "damping": 1e-2, "objective": "both"}
    if base.config.get_text_config().hidden_size >= 2048:
        defaults |= {"d_r": 1024, "rank": 128, "scale": 1 / 16, "targets": ["o_proj"], "init": "random",
                     "chunk": 1024, "chunks": 8, "batch": 8, "micro_batch": 1, "warmup": 100, "lr": 5e-5}
        args.beta2 = 0.999
        if base.config.model_type == "llama":
            defaults |= {"scale": 1 / 8, "lr": 1e-4}
        if instruct:
            defaults |= {"batch": 32, "lr": 5e-5}
        else:
            defaults["steps"] = 15_259                                      # x 8 x 8 x 1,024: 1 B tokens
    else:
        defaults |= {"d_r": 192, "rank": 64, "scale": 1.0, "targets": ["down_proj"], "init": "aligned",
                     "chunk": 16, "chunks": 1, "batch": 32, "micro_batch": 32, "warmup": 15, "lr": 6e-3}
        args.beta2 = 0.98
        if instruct:
            defaults |= {"chunk": 128, "batch": 8, "micro_batch": 8, "lr": 2e-3}
        if args.epochs is None:
            defaults["steps"] = 100
    if instruct and base.device.type == "cuda":
        defaults["micro_batch"] = None                                      # by PASS_TOKENS
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def adapted_model(args, base):
    """The model to train: a fresh generator, or that of --checkpoint, whose config then fills flags. The recipe fills
    the others."""
    if args.checkpoint:
        model = AdaptedLM.from_pretrained(base, args.checkpoint)
        for name in (*SHAPE, "norm", "damping"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(model.config, name))
    fill_recipe(args, base)
    if args.objective == "completion" and args.chunks < 2:
        raise InputError("--objective completion needs --chunks of at least 2: the first chunk has no adapter")
    if args.norm == "svd" and args.damping < LEAST_DAMPING:
        raise InputError("norm svd has no gradient at this damping: use --norm svd-exact, or a --damping of at least "
                         f"{LEAST_DAMPING}")
    if args.norm == "svd-exact" and args.shard:         # one process that leaves a pass would leave the others waiting
        raise InputError("norm svd-exact may fail on one process alone, which --shard does not bear: use --norm svd")
    if args.norm == "svd-exact" and (args.stage == "instruct" or args.chunk < args.d_r):
        raise InputError("norm svd-exact has no gradient where a context is shorter than d_r tokens: use --norm svd, "
                         "or in pretraining a longer --chunk")
    if not args.checkpoint:
        model = AdaptedLM(base, GeneratorConfig(args.d_r, args.rank, args.scale, args.norm, args.damping, args.targets))
    model.config.norm = args.norm                       # as damping: may differ from --checkpoint's, it has no shape
    model.config.damping = args.damping
    model.config.chunk = args.chunk                     # evaluate.py reads contexts in chunks of this length
    return model


def keep_freed_memory():
    """Keep freed memory in the process: glibc gives large blocks back to the system, and a step on a CPU then spends a
    fifth of its time on getting them again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                             # M_MMAP_MAX: never by mmap
        libc.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: never trim


def main():
    args = arguments()
    keep_freed_memory()
    if args.stage == "finetune":
        from extras.finetune import finetune
        finetune(args)
    else:
        train(args)


if __name__ == "__main__":
    run_command(main)
