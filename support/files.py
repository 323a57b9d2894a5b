"""Files in and out, and the one rule for bad input. Every other file needs it; it needs none of them.

The rule, for every function of the project: bad input from outside raises InputError, one sentence that names the file
or flag and what to do. The commands print it and exit with code 2; nothing is overwritten.
"""

import contextlib
import csv
import functools
import gzip
import json
import os
import signal
import sys
import time
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import safe_open

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
    ends all of them when one exits, so the others give it ten seconds. What they alone met, they print themselves."""
    try:
        main()
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


def json_object(content, where):
    """The object in json (bytes); where names it in errors."""
    with bad_input(f"{where} cannot be read as json"):
        value = json.loads(content)
        if b"\\ud" in content.lower():                       # perhaps an escaped surrogate without its other half
            value = json.loads(without_surrogates(json.dumps(value, ensure_ascii=False)))
    if not isinstance(value, dict):
        raise InputError(f"{where} cannot be read: not a json object")
    return value


def without_surrogates(text):
    return text.encode("utf-8", "replace").decode()


def read_json(path):
    """The object in a json file."""
    with bad_input(f"{path} cannot be read as json"), open(path, "rb") as file:
        return json_object(file.read(), path)


def read_safetensors(path):
    """({name: tensor}, metadata) of a safetensors file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with bad_input(f"{path} cannot be read as safetensors"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


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


# ---- rows of data files and of the hub's data sets


def open_bytes(path):
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def is_file_source(source):
    return source.endswith((".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz"))


def read_rows(source, split="train"):
    """Yield (where, row) for every row of a .parquet, .jsonl(.gz), .txt(.gz) or .csv file or a hub data set, streaming,
    at least one; `where` names file and line."""
    where = None
    with bad_input(f"{source} cannot be read"):              # damaged files and lost connections end in many ways
        for where, row in _rows(source, split):
            yield where, row
    if where is None:
        raise InputError(f"{source} is empty: it needs at least one row")


def _rows(source, split):
    if is_file_source(source) and not os.path.isfile(source):
        raise InputError(f"{source}: no such file")
    if source.endswith((".txt", ".txt.gz")):
        with open_bytes(source) as file:
            yield source, {"text": file.read().decode("utf-8")}
    elif source.endswith((".jsonl", ".jsonl.gz")):
        with open_bytes(source) as file:
            for number, line in enumerate(file, 1):
                where = f"{source} line {number}"
                if line.strip():
                    yield where, json_object(line, where)
    elif source.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)                      # the module's own limit is 131,072 characters
        with open(source, encoding="utf-8-sig", newline="") as file:                # Excel writes a mark first
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"{source} row {number}", row
    else:
        import datasets                                      # slow to import
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
        elif os.path.exists(source):
            raise InputError(f"{source}: give a .parquet, .jsonl(.gz) or .txt(.gz) file, or a hub data set id")
        else:
            datasets.config.HF_HUB_OFFLINE |= not hub_reachable()
            name, _, configuration = source.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source} row {number}", row


def field(row, key, kind, where):
    """row[key], which must be of that type."""
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise InputError(f"{where}: field {key!r} is missing or is not a {kind.__name__}")
    return row[key]


def count_rows(source):
    """Rows that a local file will yield, for a progress bar; None where only reading would tell."""
    with contextlib.suppress(Exception):                     # read_rows will say what is wrong
        if source.endswith(".parquet"):
            import pyarrow.parquet
            return pyarrow.parquet.ParquetFile(source).metadata.num_rows
        if source.endswith((".jsonl", ".jsonl.gz")):
            with open_bytes(source) as file:
                return sum(1 for _ in file)
    return 1 if source.endswith((".txt", ".txt.gz")) else None
