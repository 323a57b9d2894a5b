"""The directory of a training run, for train.py: checkpoints written aside, logs cut back to them, and process 0's
state on every process, since it alone may have the directory."""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from support.files import InputError, read_safetensors


def save_checkpoint(args, step, tokens, model, optimizer):
    """out/step-NNNNNN, written aside, flushed to disk and renamed: a kill at any moment leaves the last complete."""
    part = os.path.join(args.out, "checkpoint.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    state = {f"{key}/{name}": value for name, p in model.generator.tensors().items()
             for key, value in optimizer.state[p].items()}
    save_file(state, os.path.join(part, "optimizer.safetensors"))
    facts = {"step": step, "tokens": tokens, "args": vars(args)}
    Path(part, "trainer.json").write_text(json.dumps(facts, indent=1))
    for name in os.listdir(part):
        with open(os.path.join(part, name), "rb+") as file:
            os.fsync(file.fileno())
    os.rename(part, os.path.join(args.out, f"step-{step:06d}"))
    for old in checkpoints(args.out)[:-args.keep]:
        shutil.rmtree(old)


def checkpoints(out):
    """Complete checkpoints of a run, oldest first."""
    return sorted(map(str, Path(out).glob("step-*")), key=lambda path: (len(path), path))      # step-1000000 is last


def check_stage_flags(args):
    """A flag that belongs to other stages is refused, not ignored (but for those whose default is a number)."""
    pretrain, instruct, tune = "pretrain", "instruct", "finetune"
    stages = {"windows": [pretrain], "max_tokens": [pretrain], "objective": [pretrain], "weights": [instruct],
              "excerpts": [instruct], "epochs": [instruct, tune], "documents": [instruct, tune]}
    stages |= dict.fromkeys("checkpoint steps resume max_minutes chunk chunks micro_batch warmup beta2 d_r rank scale "
                            "damping norm targets blocks".split(), [pretrain, instruct])
    for name, own in stages.items():
        if args.stage not in own and getattr(args, name) is not None and getattr(args, name) is not False:
            raise InputError(f"--{name.replace('_', '-')} belongs to --stage {' and '.join(own)}, not to {args.stage}")


def check_same_flags(args, earlier):
    """A run is resumed with the flags it was started with, but for those that change no result but rounding."""
    free = "out resume micro_batch device checkpointing eval_every save_every keep max_minutes".split()
    for name, value in vars(args).items():
        if name not in free and earlier.get(name) != value:
            raise InputError(f"--resume: {args.out} was trained with --{name.replace('_', '-')} {earlier.get(name)}, "
                             f"not {value}; repeat its flags or choose another --out")


def load_checkpoint(path, model, optimizer):
    """Restore generator and optimiser."""
    model.generator.load_tensors(read_safetensors(os.path.join(path, "generator.safetensors"))[0], path)
    state, _ = read_safetensors(os.path.join(path, "optimizer.safetensors"))
    for name, p in model.generator.tensors().items() if state else ():        # no state: every step so far was skipped
        optimizer.state[p] = {key: state[f"{key}/{name}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")}


def trim_log(path, step):
    """Drop the lines that a killed run wrote after the checkpoint of that step, all of them where it left none (step
    None), and return the steps of the others."""
    kept = []
    if os.path.exists(path):
        *lines, _ = Path(path).read_text().split("\n")                # after the last line end: nothing, or half a line
        kept = [line for line in lines if step is not None and json.loads(line)["step"] <= step]
        Path(path + ".part").write_text("".join(line + "\n" for line in kept))
        os.replace(path + ".part", path)
    return [json.loads(line)["step"] for line in kept]


def share(value):
    """Process 0's value on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def share_state(parameters, optimizer, resumed):
    """Process 0's weights and, of a resumed run, its optimiser state, on every process."""
    known = share(resumed and len(optimizer.state) > 0)
    for p in parameters if dist.is_initialized() else ():
        if known and not optimizer.state[p]:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        for value in (p.data, *(optimizer.state[p].values() if known else ())):
            dist.broadcast(value, 0)
