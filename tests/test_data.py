"""Packing, the doubled sequence, chunks and the conversation loader."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

import data
from data import (Example, InstructionData, doubled, instruction_batch, instruction_example,
                  load_instructions, load_tokens, open_tokens, pack, sequences, split_into_chunks)
import train
from conftest import ROOT, make_model
from support.files import InputError, read_rows, run_command
from support.text import document_marks

GOLDEN = json.load(open(os.path.join(os.path.dirname(__file__), "golden", "text_golden.json"), encoding="utf-8"))
TEXTS = ["Eine Zeile.", "naïve — ≠ ascii\n\nsecond paragraph", "x" * 700]


def write_sources(directory):
    """The same three documents as .jsonl, .jsonl.gz, .parquet and .txt.gz files."""
    import pyarrow
    import pyarrow.parquet
    lines = "".join(json.dumps({"text": t, "source": "here"}) + "\n" for t in TEXTS)
    paths = [str(directory / name) for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt.gz")]
    (directory / "a.jsonl").write_text(lines)
    with gzip.open(paths[1], "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), paths[2])
    with gzip.open(paths[3], "wt") as file:
        file.write(TEXTS[1])
    return paths


def test_pack_every_kind_of_file(tmp_path, tokenizer):
    paths = write_sources(tmp_path)
    want = [t for text in TEXTS for t in [257, *text_ids(tokenizer, text), 258]]
    for path in paths[:3]:
        pack([path], tokenizer, str(tmp_path / "t.bin"))
        tokens = load_tokens(str(tmp_path / "t.bin"), tokenizer)
        assert tokens.dtype == np.uint16 and tokens.tolist() == want
        assert tokenizer.decode(tokens[1:len(TEXTS[0]) + 1]) == TEXTS[0]
    pack([paths[3], paths[0]], tokenizer, str(tmp_path / "t.bin"))
    one = [257, *text_ids(tokenizer, TEXTS[1]), 258]
    assert load_tokens(str(tmp_path / "t.bin"), tokenizer).tolist() == one + want
    assert not list(tmp_path.glob("*.part"))


def test_pack_many_rows_and_null_ones(tmp_path, tokenizer, capsys):
    """512 documents are in memory at a time; a row whose text is null is left out and counted."""
    (tmp_path / "many.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "ab"}\n' * 300)
    pack([str(tmp_path / "many.jsonl")], tokenizer, str(tmp_path / "t.bin"))
    want = [257, 258, 257, *text_ids(tokenizer, "ab"), 258] * 300
    assert load_tokens(str(tmp_path / "t.bin"), tokenizer).tolist() == want
    assert json.load(open(tmp_path / "t.bin.json"))["documents"] == 600
    assert "300 rows whose text is null were left out" in capsys.readouterr().out


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_file_belongs_to_its_tokenizer(tmp_path, tokenizer):
    pack([write_sources(tmp_path)[0]], tokenizer, str(tmp_path / "t.bin"))
    tokenizer.eos_token = "<unused>"
    with pytest.raises(InputError, match="another tokenizer"):
        load_tokens(str(tmp_path / "t.bin"), tokenizer)
    with open(tmp_path / "t.bin", "ab") as file:
        file.write(b"12")
    tokenizer.eos_token = "</s>"
    with pytest.raises(InputError, match="cut short"):
        load_tokens(str(tmp_path / "t.bin"), tokenizer)


def test_packed_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))
    path = write_sources(tmp_path)[0]
    first = open_tokens([path], tokenizer).tolist()
    monkeypatch.setattr(data, "pack", lambda *_: pytest.fail("packed twice"))
    assert open_tokens([path], tokenizer).tolist() == first


def test_chat_tokens_do_not_mark_documents(tokenizer):
    """SmolLM2's way: <|endoftext|> between documents, no BOS."""
    assert document_marks(tokenizer) == ([257], [258])
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    assert document_marks(tokenizer) == ([], [260])


def test_sequences_are_an_endless_shuffled_stream():
    tokens, length = np.arange(1003, dtype=np.uint16), 10
    per_epoch = 99  # a fresh offset of up to 9 tokens may cost one
    seen = sequences(tokens, length, 0, 3 * per_epoch, seed=1)
    assert (seen[:, 1:] - seen[:, :-1] == 1).all()                             # each is a run of the text
    epochs = seen[:, 0].view(3, per_epoch)
    assert all(len(set(e.tolist())) == per_epoch for e in epochs)              # each epoch reads a sequence once
    assert len({e[0].item() % length for e in epochs}) > 1                     # and cuts elsewhere
    pieces = torch.cat([sequences(tokens, length, first, 7, seed=1) for first in range(0, 70, 7)])
    assert torch.equal(pieces, seen[:70])                                      # the position alone decides
    assert not torch.equal(sequences(tokens, length, 0, 70, seed=2), pieces)


def test_doubled_copy():
    tokens = torch.arange(24).view(2, 12)
    segments, mask, visible, labels = doubled(tokens, 3)
    assert segments.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2,
                                 [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]] * 2]
    assert visible.tolist() == [0, 1, 2, 1, 2, 3] and mask.all() and torch.equal(labels, segments)


@pytest.mark.parametrize("case", GOLDEN["split_into_chunks"], ids=lambda c: f"{c['n']}-{c['window']}")
def test_chunks_as_the_authors_cut_them(case):
    ids = list(range(1, case["n"] + 1))
    chunks = split_into_chunks(ids, case["window"])
    assert sum(chunks, []) == ids and len(chunks) == case["num_chunks"] and len(chunks[0]) == case["chunk_len"]
    segments, mask, *_ = instruction_batch([Example(ids, [7], [7], frozenset())], 0, case["window"])
    segments, mask = segments[0, :-1], mask[0, :-1]
    assert segments.shape == (case["num_chunks"], case["chunk_len"]) and (mask == 0).sum() == case["pads"]
    assert segments[mask.bool()].tolist() == ids
    if "input_ids" in case:
        assert segments.tolist() == case["input_ids"] and mask.tolist() == case["attention_mask"]


def test_instruction_batch():
    """Contexts of several lengths and their conversations, padded to one shape."""
    examples = [Example([1, 2, 3, 4, 5], [7, 8], [-100, 8], frozenset()), Example([6], [9, 9, 9, 9], [-100] * 4, None)]
    segments, mask, visible, labels = instruction_batch(examples, pad=0, chunk=4)
    assert segments.tolist() == [[[1, 2, 3, 0], [4, 5, 0, 0], [7, 8, 0, 0]], [[6, 0, 0, 0], [0] * 4, [9] * 4]]
    assert mask.tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0] * 4, [1] * 4]]
    assert visible.tolist() == [0, 1, 2] and (labels[:, :2] == -100).all()
    assert labels[:, 2].tolist() == [[-100, 8, -100, -100], [-100] * 4]
    with pytest.raises(InputError, match="at least 1 token"):
        split_into_chunks([])


def test_bad_files(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))
    for name in ("no.parquet", "no.jsonl", "no.txt"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            open_tokens([str(tmp_path / name)], tokenizer)
    for name in ("bad.parquet", "bad.jsonl.gz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(InputError, match=f"{name}.*cannot be read"):
            list(read_rows(str(tmp_path / name)))
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match="f.jsonl line 2: field 'text'"):
        open_tokens([str(tmp_path / "f.jsonl")], tokenizer)
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(InputError, match="no text to pack"):
        open_tokens([str(tmp_path / "e.txt")], tokenizer)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    damaged = gzip.compress(b'{"text": "a"}\n' * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(damaged[:30] + b"????" + damaged[34:])
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "a"}\n' * 89 + b'{"text": "\xff"}\n')
    for name, words in (("bad.jsonl.gz", "cannot be read"), ("cut.jsonl.gz", "cannot be read"),
                        ("bytes.jsonl", "bytes.jsonl line 90")):
        with pytest.raises(InputError, match=words):
            open_tokens([str(tmp_path / name)], tokenizer)
    (tmp_path / "t.bin").write_bytes(b"12345")
    with pytest.raises(InputError, match="t.bin is not a packed token file"):
        open_tokens([str(tmp_path / "t.bin")], tokenizer)
    with pytest.raises(InputError, match="fewer than two sequences"):
        sequences(np.zeros(5, dtype=np.uint16), 10, 0, 1, 0)


def instruction_flags(sources, **flags):
    """The flags of train.py that InstructionData reads."""
    return Namespace(**{"data": sources, "validation": None, "documents": None, "chunk": 64, "chunks": 1, "batch": 2,
                        "seed": 0, "eval_sequences": 30} | flags)


def write_villages(path, count):
    """Documents of some 60 bytes, one question each; the village names its document."""
    rows = [{"context": f"In village{k:02d} the baker is called Name{k:02d}. It rained all day.",
             "qas": [{"question": f"Who bakes in village{k:02d}?", "answers": [f"Name{k:02d}"]}]} for k in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def villages(tokenizer, batch, item):
    """The documents in the context of an item, read back from its tokens."""
    words = tokenizer.decode(batch.segments[item, :-1][batch.mask[item, :-1].bool()]).split()
    return {word for word in words if word.startswith("village")}


@pytest.mark.parametrize("chunks", [2, 12])
def test_the_control_shares_no_document(tmp_path, tokenizer, chunks):
    """Contexts of up to 12 of 30 documents: the context half the set away often holds the right document, the control
    never."""
    sources = write_villages(tmp_path / "qa.jsonl", 60)
    instructions = InstructionData(instruction_flags(sources, chunks=chunks), tokenizer)
    held = [villages(tokenizer, instructions.validation, i) for i in range(30)]
    assert sum(control is not None for control in instructions.controls) >= 27
    for i, control in enumerate(instructions.controls):
        assert held[i] and not held[i] & (held[control] if control is not None else set())
        if control is None:
            assert all(held[i] & other for other in held)
    if chunks == 12:
        assert sum(bool(held[i] & held[(i + 15) % 30]) for i in range(30)) > 2 and max(map(len, held)) >= 9


def test_items_without_a_control_are_counted(tmp_path, tokenizer):
    """A context of all documents has no control: its value is null, and the others keep theirs."""
    sources = write_villages(tmp_path / "qa.jsonl", 6)
    flags = instruction_flags(sources, validation=sources, chunk=500, chunks=2, eval_sequences=6)
    instructions = InstructionData(flags, tokenizer)
    contexts = [villages(tokenizer, instructions.validation, i) for i in range(6)]
    lone = [i for i in range(6) if all(contexts[i] & other for other in contexts)]
    assert lone and [i for i in range(6) if instructions.controls[i] is None] == lone
    assert f"{len(lone)} of 6 validation items without a control" in instructions.about
    args = Namespace(out=str(tmp_path), stage="instruct", micro_batch=3)
    losses = train.validate(args, make_model(), instructions, 0, 1)
    assert [i for i in range(6) if losses[i, 2].isnan()] == lone and not losses[:, 0].isnan().any()
    for step in (0, 5):
        train.report_validation(args, step, losses)
    for row in map(json.loads, open(tmp_path / "validation.jsonl")):
        assert [i for i in range(6) if row["sequences"]["answer_shuffled"][i] is None] == lone


def test_bad_input_is_told_by_the_first_process_of_a_machine(monkeypatch, capsys):
    def main():
        raise InputError("t.txt: no\nsuch file")

    told = []                                           # what had been printed when a process began to wait
    monkeypatch.setattr(time, "sleep", lambda seconds: told.append(capsys.readouterr().err))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for local_rank, waited in ((None, 0), ("0", 0), ("1", 1), ("7", 1)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as caught:
            run_command(main)
        assert caught.value.code == 2 and told == [""] * waited
        assert capsys.readouterr().err == "error: t.txt: no such file\n"
        told.clear()


def test_data_set_libraries_wait_until_they_are_used():
    script = ("import sys, train, evaluate;"
              "print(sorted({'datasets', 'pyarrow', 'matplotlib', 'peft'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_context_lengths_are_log_uniform(tmp_path, tokenizer):
    """From a sentence to all chunks: of the lengths drawn for demonstrations of 20 tokens, each doubling has its share.
    A document that is longer than the length drawn is not cut."""
    tasks = {"t": ("", [("a", ["b"])] * 400)}
    draws = [instruction_example(tokenizer, [], tasks, "t", 64, 16, np.random.default_rng(seed)) for seed in range(600)]
    lengths = np.array([len(example.context) for example in draws])
    shares = [((lengths >= low) & (lengths < 2 * low)).mean() for low in (32, 64, 128, 256, 512)]
    assert all(abs(share - 1 / 6) < 0.06 for share in shares), shares
    documents, _ = load_instructions(write_villages(tmp_path / "qa.jsonl", 12))
    whole = [instruction_example(tokenizer, documents, {}, 3, 64, 1, np.random.default_rng(seed)) for seed in range(80)]
    assert min(len(example.context) for example in whole) == 60


def test_distractors_are_of_one_source(tmp_path, tokenizer):
    """The document is always there, others of its source in any place, and what is asked is about documents there."""
    rows = [{"dataset": "ab"[k % 2], "context": f"Item{k:02d} weighs {k}.", "qas": [
        {"question": f"Item{k:02d}?", "answers": [str(k)]}]} for k in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, _ = load_instructions([str(tmp_path / "qa.jsonl")])
    places, counts = set(), set()
    for seed in range(100):
        example = instruction_example(tokenizer, documents, {}, 6, 64, 4, np.random.default_rng(seed))
        there = [int(text[4:6]) for text in tokenizer.decode(example.context[1:]).split("\n\n")]
        assert len(set(there)) == len(there) and all(k % 2 == 0 for k in there)
        assert int(tokenizer.decode(example.ids)[7:9]) in there
        places.add(there.index(6))
        counts.add(len(there))
    assert places >= {0, 1, 2, 3} and 1 in counts and max(counts) > 9


def test_a_document_of_all_chunks_leaves_room_for_bos(tmp_path, tokenizer):
    """With its BOS a document of 64 bytes, here tokens, is longer than 64 tokens, and one of 63 is not cut."""
    rows = [{"context": str(n) * (64 if n < 4 else 63), "qas": [{"question": "q", "answers": ["a"]}]} for n in range(9)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = instruction_flags([str(tmp_path / "qa.jsonl")], chunk=32, chunks=2, batch=9, eval_sequences=2)
    instructions = InstructionData(flags, tokenizer)
    assert instructions.about.startswith("5 of 9 documents, others are longer than 64 tokens")
    assert sum(instructions.batch(0).mask[0, :2].flatten().tolist()) == 64


def test_units_of_an_epoch(tmp_path, tokenizer):
    """Every document once and a task once for each 20 of its examples; the second epoch comes to each again, in another
    order."""
    write_villages(tmp_path / "qa.jsonl", 9)
    rows = [{"task": "up", "input": str(k), "output": "o", "definition": "Say o."} for k in range(30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = instruction_flags([str(tmp_path / "qa.jsonl"), str(tmp_path / "t.jsonl")], eval_sequences=2)
    instructions = InstructionData(flags, tokenizer)
    assert instructions.units == [0, 1, 2, 3, 4, 5, 6, "up", "up"] and instructions.steps_per_epoch == 4.5
    asked = []
    monkey = instructions.example
    instructions.example = lambda documents, unit, *numbers: asked.append(unit) or monkey(documents, unit, *numbers)
    for step in range(9):
        instructions.batch(step)
    assert sorted(map(str, asked[:9])) == sorted(map(str, asked[9:])) == sorted(map(str, instructions.units))
    assert asked[:9] != asked[9:]
    example = monkey(instructions.documents, "up", 5)
    assert tokenizer.decode(example.context[1:]).startswith("Say o.\n\nInput: ") or len(example.texts) == 1
