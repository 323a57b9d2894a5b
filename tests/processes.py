"""Commands in processes forked from one that has done the imports, which take longer than most of the runs."""

import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from unittest import mock

import torch
import torch._dynamo  # noqa: F401   the first step of an optimiser would import it

import data
import extras.finetune  # noqa: F401   FSDP2 is slow to import
import support.bases
import train
from conftest import ROOT, make_base, make_tokenizer
from model import load_base
from support.files import run_command

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["processes", "pytest"])

with tempfile.TemporaryDirectory() as directory:                # what transformers builds at the first load of a model
    make_base().save_pretrained(directory), make_tokenizer().save_pretrained(directory)
    load_base(directory, torch.float32, "cpu")


def start(line, printed, cwd=ROOT, cache=None, life=0, kept=2, **environment):
    """A multiprocessing.Process that runs python with the command line `line`, train.py or -c, in cwd; what it prints
    goes to the file `printed`. cache: the project's, by default beside that file; life: see kill_at."""
    cache = str(cache or os.path.join(os.path.dirname(printed), "cache"))
    process = context.Process(target=child, args=(line, printed, cwd, cache, life, kept, environment))
    # the server that forks, started with the first process, looks for its preload here and nowhere else
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.join(ROOT, "tests"), ROOT])):
        process.start()
    return process


def child(line, printed, cwd, cache, life, kept, environment):
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    data.CACHE = support.bases.CACHE = cache
    train.KEPT = kept
    sys.argv = line if line[0] != "-c" else ["-c", *line[2:]]
    if life:
        kill_at(life)
    if line[0] == "-c":
        exec(line[1], {"__name__": "__main__"})
    else:
        run_command(train.main)


def kill_at(life):
    """SIGKILL this process at the life-th of its optimiser steps, renames and removals."""
    events = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(events) == life:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for owner, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree"), (torch.optim.AdamW, "step")):
        setattr(owner, name, counted(getattr(owner, name)))


def finish(*processes):
    """Their exit codes, once all have ended."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def start_group(line, printed, directories, machines=False, life=0, kept=2):
    """A process in each of these directories, as torchrun would start them: on one machine, or each on its own. life:
    of the first one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(len(directories)), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [start(line, f"{printed}-{rank}", directory, os.path.join(directory, "cache") if machines else None,
                  life=life * (rank == 0), kept=kept, RANK=str(rank), LOCAL_RANK=str(0 if machines else rank), **group)
            for rank, directory in enumerate(directories)]
