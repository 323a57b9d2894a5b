"""The directory of a training run, for train.py: checkpoints written aside, logs cut back to them, and process 0's
state on every process, since it alone may have the directory."""

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from support.files import InputError, read_json, read_safetensors

KEPT = 2                  # the newest checkpoints that a run keeps
MOMENTS = ("step", "exp_avg", "exp_avg_sq")                 # AdamW's state of a parameter
# flags that a resumed run may change: they change no result, but for rounding
FREE = ("out", "resume", "micro_batch", "device", "checkpointing", "eval_every", "save_every")


def checkpoints(out):
    """Complete checkpoints of a run, oldest first: directories of the names that save_checkpoint writes. Whatever else
    is there, a copy of one too, is not ours."""
    found = {}
    for path in Path(out).glob("step-*"):
        digits = path.name.removeprefix("step-")
        if digits.isdecimal() and digits == f"{int(digits):06d}" and path.is_dir():
            found[int(digits)] = str(path)
    return [found[step] for step in sorted(found)]


def save_checkpoint(args, step, tokens, model, optimizer):
    """out/step-NNNNNN, written aside, flushed to disk and renamed: a kill at any moment leaves the last complete."""
    part = os.path.join(args.out, "checkpoint.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    state = {}
    for name, p in model.generator.tensors().items():
        for moment in MOMENTS:
            state[f"{moment}/{name}"] = optimizer.state[p][moment]
    save_file(state, os.path.join(part, "optimizer.safetensors"))
    facts = {"step": step, "tokens": tokens, "args": vars(args)}
    Path(part, "trainer.json").write_text(json.dumps(facts, indent=1))
    for name in os.listdir(part):
        with open(os.path.join(part, name), "rb+") as file:
            os.fsync(file.fileno())
    os.rename(part, os.path.join(args.out, f"step-{step:06d}"))
    for old in checkpoints(args.out)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(path, args, model, optimizer):
    """Restore generator and optimiser -> (step, tokens read). A run is resumed with the flags it was started with."""
    facts = read_json(os.path.join(path, "trainer.json"))
    for name, value in vars(args).items():
        earlier = facts["args"].get(name, value)            # an older version had other flags
        if name not in FREE and earlier != value:
            raise InputError(f"--resume: {args.out} was trained with --{name.replace('_', '-')} {earlier}, not {value}; "
                             "repeat its flags or choose another --out")
    tensors, _ = read_safetensors(os.path.join(path, "generator.safetensors"))
    model.generator.load_tensors(tensors, path)
    state, _ = read_safetensors(os.path.join(path, "optimizer.safetensors"))
    for name, p in model.generator.tensors().items():
        for moment in MOMENTS:
            if state:                                       # an older version wrote none before the first good step
                optimizer.state[p][moment].copy_(state[f"{moment}/{name}"])
    return facts["step"], facts["tokens"]


def cut_log(path, last):
    """Drop the lines of steps after the last one, which a killed run wrote, and what it left of half a line."""
    if not os.path.exists(path):
        return
    lines = Path(path).read_text().split("\n")[:-1]
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= last]
    Path(path + ".part").write_text("".join(kept))
    os.replace(path + ".part", path)


def share_state(optimizer, values):
    """Process 0's weights, optimiser state and values (a list) on every process -> values."""
    for p in optimizer.param_groups[0]["params"]:
        dist.broadcast(p.data, 0)
        for moment in optimizer.state[p].values():
            dist.broadcast(moment, 0)
    dist.broadcast_object_list(values)
    return values
