"""Files in and out, and the one rule for bad input. Every other file needs it; it needs none of them.

The rule, for every function of the project: bad input from outside raises InputError, one sentence that names the file
or flag and what to do. The commands print it and exit with code 2; nothing is overwritten.
"""

import csv
import functools
import gzip
import json
import os
import sys
import urllib.error
import urllib.request

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

CACHE = os.path.expanduser(os.environ.get("GENERATIVE_ADAPTER_CACHE", "~/.cache/generative-adapter"))


class InputError(ValueError):
    """Bad input from outside: one sentence on one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


def run_command(main):
    """Run a script's main. On an InputError every process exits with 2, and the first of a machine prints it."""
    try:
        main()
    except InputError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make_directory(path):
    """Make a directory to save in, where it does not exist."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be a directory: {error.strerror}") from None


def read_json(path):
    """The object in a json file."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as json: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a json object")
    return value


def read_safetensors(path):
    """({name: tensor}, metadata) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None


def stamps(path):
    """(name, size, time of change) of each file at a path: whether they are still the same. [] for a hub id."""
    files = [path] if os.path.isfile(path) else sorted(os.path.join(where, name)
                                                       for where, _, names in os.walk(path) for name in names)
    return [(os.path.abspath(name), os.path.getsize(name), os.path.getmtime(name)) for name in files]


@functools.lru_cache(maxsize=1)
def hub_reachable():
    """Whether the Hugging Face hub answers one quick request. Its client retries for the better part of a minute; where
    it is out of reach, only its cache is asked."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        if not constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        pass                                                 # it answered
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


# ---- rows of data files and of the hub's data sets; datasets and pyarrow are slow to import: only where they are used


def open_bytes(path):
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def is_file_source(source):
    return source.endswith((".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz"))


def without_surrogates(text):
    return text.encode("utf-8", "replace").decode()


def read_rows(source, split="train"):
    """Yield (where, row) for every row of a .parquet, .jsonl(.gz) or .txt(.gz) file or a hub data set, streaming, at
    least one; `where` names file and line."""
    where, empty = source, True
    try:
        for where, row in _rows(source, split):
            if isinstance(row, bytes):
                line, row = row, json.loads(row)
                if b"\\ud" in line or b"\\uD" in line:       # perhaps an escaped surrogate without its other half
                    row = json.loads(without_surrogates(json.dumps(row, ensure_ascii=False)))
            if not isinstance(row, dict):
                raise ValueError("not a json object")
            empty = False
            yield where, row
    except InputError:
        raise
    except Exception as error:                # damaged files and lost connections end in many kinds of exception
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{where} cannot be read: {reason}") from None
    if empty:
        raise InputError(f"{source} is empty: it needs at least one row")


def _rows(source, split):
    """(where, row) for each row; a line of a .jsonl file comes as bytes, so that a bad one is known by its number."""
    if is_file_source(source) and not os.path.isfile(source):
        raise InputError(f"{source}: no such file")
    if source.endswith((".txt", ".txt.gz")):
        with open_bytes(source) as file:
            yield source, {"text": file.read().decode("utf-8")}
    elif source.endswith((".jsonl", ".jsonl.gz")):
        with open_bytes(source) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{source} line {number}", line
    elif source.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)                      # the module's own limit is 131,072 characters
        with open(source, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"{source} row {number}", row
    else:
        import datasets
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
    """Rows a local file will yield, for a progress bar; None when only reading would tell."""
    try:
        if source.endswith(".parquet"):
            import pyarrow.parquet
            return pyarrow.parquet.ParquetFile(source).metadata.num_rows
        if source.endswith((".jsonl", ".jsonl.gz")):
            with open_bytes(source) as file:
                return sum(1 for _ in file)
    except Exception:                                        # read_rows will say what is wrong
        return None
    return 1 if source.endswith((".txt", ".txt.gz")) else None


# ---- predictions, a line of json each: a killed evaluation continues where it was


def open_predictions(path):
    """({key: record} of earlier runs, function that appends a record); a half-written last line is dropped. A file that
    holds anything but predictions is left as it is."""
    done, log = {}, None
    if path and os.path.exists(path):
        with open(path, "rb") as file:
            *lines, half = file.read().split(b"\n")
        if half[:8] != b'{"key": '[:len(half)]:
            lines.append(half)                               # not the beginning of a line of ours
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                done[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{path} line {number} is not a prediction of this script: name another file with "
                                 "--predictions; nothing was written") from None
        os.truncate(path, os.path.getsize(path) - len(half))
    if path:
        log = open(path, "a", encoding="utf-8")

    def write(record):
        if record["key"] not in done:
            done[record["key"]] = json.loads(json.dumps(record))
            if log:
                log.write(json.dumps(record, ensure_ascii=False) + "\n")
                log.flush()

    return done, write
