"""Files in and out, and the one rule for bad input. Every other file needs it; it needs none of them.

The rule, for every function of the project: bad input from outside raises InputError, one sentence that names the file
or flag and what to do. The commands print it and exit with code 2; nothing is overwritten.
"""

import contextlib
import csv
import functools
import gzip
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import get_session, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CACHE = os.path.expanduser(os.environ.get("GENERATIVE_ADAPTER_CACHE", "~/.cache/generative-adapter"))


class InputError(ValueError):
    """Bad input from outside: one sentence on one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


@contextlib.contextmanager
def bad_input(words, *kinds):
    """Where an exception of these kinds (of any) means bad input: an InputError of these words and its first line."""
    try:
        yield
    except InputError:
        raise
    except kinds or Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{words}: {reason} ({type(error).__name__})") from None


def run_command(main):
    """Run a script's main. On an InputError every process exits with 2, and the first of a machine prints it: torchrun
    ends all of them when one exits, so the others give it ten seconds. What they alone met, they print themselves.
    Ctrl-C ends quietly with 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")           # a console that lacks a character is no reason to end
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)                                  # after the ^C
        sys.exit(130)
    except InputError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # train.py's handler would sleep on
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make_directory(path):
    """Make a directory to save in, where it does not exist."""
    with bad_input(f"{path} cannot be a directory", OSError):
        os.makedirs(path, exist_ok=True)


def read_json(path):
    """The object in a json file."""
    try:
        with open(path, "rb") as file:
            value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError("it holds no json object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as json: {error}") from None


def read_safetensors(path):
    """({name: tensor}, metadata) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except Exception as error:                               # damaged files end in many ways
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None


def save_tensors(tensors, path, metadata=None):
    """Write {name: tensor} to one safetensors file, aside first and then renamed, so that a reader never meets half of
    it. Where that fails, on a full disk for one, nothing is left behind."""
    part = f"{path}.part"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, part, metadata=metadata)
        umask = os.umask(0)                                  # the only way to read it
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)                       # safetensors leaves the file to its owner alone
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        if os.path.exists(part):
            os.remove(part)
        raise InputError(f"{path} cannot be written: {error}") from None


def stamps(path):
    """(name, size, time of change) of each file at a path: whether they are still the same. [] for a hub id."""
    files = [path] if os.path.isfile(path) else sorted(file for file in Path(path).rglob("*") if file.is_file())
    return [(os.path.abspath(file), os.path.getsize(file), os.path.getmtime(file)) for file in files]


@functools.lru_cache(maxsize=1)
def hub_reachable():
    """Whether the Hugging Face hub answers one quick request. Its client retries for the better part of a minute; where
    it is out of reach, only its cache is asked."""
    try:
        get_session().head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10)
    except Exception:                                        # no connection, or none allowed
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def hub_snapshot(name, patterns, **options):
    """Directory to which the files of these patterns of a hub id (owner/name) are downloaded."""
    with bad_input(f"{name}: no such directory, not a hub id (owner/name) or not to be had from the hub"):
        validate_repo_id(name)                               # a path is refused before the hub is asked
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not hub_reachable(),
                                                 **options)


# ---- rows of data files and of the hub's data sets


def read_rows(source, split="train"):
    """Yield (where, row) for every row of a .parquet, .jsonl(.gz), .txt(.gz) or .csv file or a hub data set, streaming,
    at least one; `where` names file and line."""
    where = None
    opened = gzip.open if source.endswith(".gz") else open
    try:
        if source.endswith((".txt", ".txt.gz")):
            where = source
            with opened(source, "rt", encoding="utf-8-sig") as file:        # without the mark that some editors write
                yield where, {"text": file.read()}                          # line ends are \n
        elif source.endswith((".jsonl", ".jsonl.gz")):
            with opened(source, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    where = f"{source} line {number}"
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{where} cannot be read: not a json object")
                    yield where, row
        elif source.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)                  # the module's own limit is 131,072 characters
            with open(source, encoding="utf-8-sig", newline="") as file:            # Excel writes a mark first
                for number, row in enumerate(csv.DictReader(file), 2):
                    where = f"{source} row {number}"
                    if None in row:                          # the csv module puts the fields that are too many there
                        raise InputError(f"{where} has more fields than columns: put a text with commas in quotes")
                    yield where, row
        else:
            if source.endswith(".parquet"):
                import pyarrow.parquet                       # slow to import
                batches = pyarrow.parquet.ParquetFile(source).iter_batches(1000)
                rows = itertools.chain.from_iterable(map(pyarrow.RecordBatch.to_pylist, batches))
            elif os.path.exists(source):
                raise InputError(f"{source}: give a .parquet, .jsonl(.gz) or .txt(.gz) file, or a hub data set id")
            else:
                import datasets                              # slow to import
                datasets.config.HF_HUB_OFFLINE |= not hub_reachable()
                name, _, configuration = source.partition(":")
                rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
            for number, row in enumerate(rows, 1):
                where = f"{source} row {number}"
                yield where, row
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except Exception as error:                               # damaged files and lost connections end in many ways
        raise InputError(f"{where or source} cannot be read, or what follows it: {error}") from None
    if where is None:
        raise InputError(f"{source} is empty: it needs at least one row")


def count_rows(source):
    """Rows that a local .parquet or .jsonl file will yield, for a progress bar; 0 where only reading would tell."""
    import pyarrow.parquet                                   # slow to import
    with contextlib.suppress(OSError, pyarrow.ArrowException):          # read_rows will say what is wrong
        if source.endswith(".parquet"):
            return pyarrow.parquet.ParquetFile(source).metadata.num_rows
        if source.endswith(".jsonl"):
            with open(source, "rb") as file:
                return sum(1 for _ in file)
    return 0


def field(row, key, kind, where, blank=True):
    """row[key], which must be of that type; without `blank` a text with a word in it."""
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise InputError(f"{where}: field {key!r} is missing or is not a {kind.__name__}")
    if not blank and not row[key].strip():
        raise InputError(f"{where}: field {key!r} is empty")
    return row[key]
