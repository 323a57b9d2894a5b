"""Packing, the doubled sequence, chunks and the conversation loader."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import data
from data import (doubled, instruction_batches, instruction_example, load_tokens, open_tokens, pack, sequences,
                  split_into_chunks)
import train
from conftest import ROOT, make_model
from support.benchmarks import load_msc
from support.files import InputError, read_rows, run_command
from support.instructions import excerpt, instruction_units, load_instructions
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
    pack([paths[3], paths[0]], tokenizer, str(tmp_path / "t.bin"), max_tokens=100)
    one = [257, *text_ids(tokenizer, TEXTS[1]), 258]
    assert load_tokens(str(tmp_path / "t.bin"), tokenizer).tolist() == (one + want)[:100]
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "many.jsonl").write_text('{"text": ""}\n{"text": "ab"}\n' * 300)       # read 512 at a time
    pack([str(tmp_path / "many.jsonl")], tokenizer, str(tmp_path / "t.bin"), max_tokens=7)
    want = [257, 258, 257, *text_ids(tokenizer, "ab"), 258, 257]
    assert load_tokens(str(tmp_path / "t.bin"), tokenizer).tolist() == want


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
    segments, mask, visible, labels = doubled(tokens, 3, pad=99)
    assert segments.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2,
                                 [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]] * 2]
    assert visible.tolist() == [0, 1, 2, 1, 2, 3] and mask.all() and torch.equal(labels, segments)


def test_doubled_windows():
    """Each is a run of tokens inside the chunks its adapter has read, padded to the right; the draw depends on the seed
    alone."""
    C, L = 4, 8
    tokens = torch.arange(2 * C * L).view(2, -1)
    starts = set()
    for seed in range(200):
        segments, mask, *_ = doubled(tokens, C, pad=99, windows_seed=(seed, 3))
        assert torch.equal(segments[:, :C].reshape(2, -1), tokens)
        for b in range(2):
            for j in range(C):
                n = mask[b, C + j].sum().item()
                window = segments[b, C + j]
                assert mask[b, C + j].tolist() == [1] * n + [0] * (L - n) and (window[n:] == 99).all()
                start, end = window[0].item() - b * C * L, window[n - 1].item() - b * C * L + 1
                assert window[:n].tolist() == list(range(window[0], window[0] + n)) and 0 <= start
                assert end == min(start + L, (j + 1) * L)
                starts.add(start)
    assert len(starts) == C * L
    assert torch.equal(doubled(tokens, C, 99, (7, 3))[0], doubled(tokens, C, 99, (7, 3))[0])


@pytest.mark.parametrize("case", GOLDEN["split_into_chunks"], ids=lambda c: f"{c['n']}-{c['window']}")
def test_chunks_as_the_authors_cut_them(case):
    ids, mask = split_into_chunks([list(range(1, case["n"] + 1))], pad=0, chunk=case["window"])
    assert ids.shape == (1, case["num_chunks"], case["chunk_len"]) and (mask == 0).sum() == case["pads"]
    assert ids[mask.bool()].tolist() == list(range(1, case["n"] + 1))
    if "input_ids" in case:
        assert ids[0].tolist() == case["input_ids"] and mask[0].tolist() == case["attention_mask"]


def test_chunks_of_a_batch():
    ids, mask = split_into_chunks([[1, 2, 3, 4, 5], [6]], pad=0, chunk=4)
    assert ids.tolist() == [[[1, 2, 3], [4, 5, 0]], [[6, 0, 0], [0, 0, 0]]]
    assert mask.tolist() == [[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [0, 0, 0]]]
    with pytest.raises(InputError, match="at least 1 token"):
        split_into_chunks([[1], []], pad=0)


def conversation(*sessions, answer="blue"):
    return {"previous_dialogs": [{"dialog": [{"text": t} for t in s], "personas": [["SECRET"]]} for s in sessions],
            "summary_speaker_1": ["SECRET"],
            "personas": [["SECRET"]], "self_instruct": {"B": "Which?", "A": answer},
            "metadata": {"initial_data_id": "x1"}}


def test_msc_loader(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = conversation(["Hi: there", "hello"], ["a", "b", "c"]), conversation(["Ann: hi", "Dr. O'Neil: hello"])
    path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]) + "\n")
    first, second = load_msc(str(path))
    assert first == {"id": "x1",
                     "sessions": ["Speaker 1: Hi: there\nSpeaker 2: hello", "Speaker 1: a\nSpeaker 2: b\nSpeaker 1: c"],
                     "question": "Which?", "answer": "blue"}
    assert second["sessions"] == ["Ann: hi\nDr. O'Neil: hello"]
    assert "SECRET" not in json.dumps([first, second])


def test_built_in_sample():
    """24 conversations of four sessions; each answer is said exactly once and its question does not give it away."""
    rows = load_msc()
    assert len(rows) == 24 and len({r["id"] for r in rows}) == 24
    assert len({s for r in rows for s in r["sessions"]}) == 96
    for row in rows:
        assert len(row["sessions"]) == 4
        assert "\n".join(row["sessions"]).lower().count(row["answer"].lower()) == 1
        assert row["answer"].lower() not in row["sessions"][3].lower()
        assert row["answer"].lower() not in row["question"].lower()


@pytest.mark.parametrize("text, words", [
    ("", "is empty"), ("\n\n", "is empty"), ('{"a": 1}\n{"b": \n', "line 1: field 'previous_dialogs'"),
    ("[1]", "line 1 cannot be read: not a json object"),
    (json.dumps(conversation(["hi"])) + "\n{broken", "line 2 cannot be read"),
    (json.dumps({**conversation(["hi"]), "self_instruct": {"B": "Q"}}), "line 1: field 'A'"),
    (json.dumps(conversation([])), "no turn"),
    (json.dumps({**conversation(["hi"]), "previous_dialogs": [["hi"]]}), "field 'dialog'"),
    ("\x00\udcff\x00", "cannot be read")])
def test_bad_conversations(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=words) as caught:
        load_msc(str(path))
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


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
    assert not list((tmp_path / "cache").iterdir())
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


@pytest.mark.parametrize("chunks", [2, 10])
def test_the_control_shares_no_document(tmp_path, tokenizer, chunks):
    """Contexts of up to 10 of 30 documents: the context half the set away often holds the right document, the control
    never."""
    sources = write_villages(tmp_path / "qa.jsonl", 60)
    batches = instruction_batches(tokenizer, sources, None, chunk=64, chunks=chunks, batch_size=2, seed=0,
                                  eval_sequences=30)
    held = [villages(tokenizer, batches.validation, i) for i in range(30)]
    assert sum(control is not None for control in batches.controls) >= 27
    for i, control in enumerate(batches.controls):
        assert held[i] and not held[i] & (held[control] if control is not None else set())
        if control is None:
            assert all(held[i] & other for other in held)
    if chunks == 10:
        assert sum(bool(held[i] & held[(i + 15) % 30]) for i in range(30)) > 2 and max(map(len, held)) >= 9


def test_items_without_a_control_are_counted(tmp_path, tokenizer):
    """A context of all documents has no control: its value is null, and the others keep theirs."""
    sources = write_villages(tmp_path / "qa.jsonl", 6)
    batches = instruction_batches(tokenizer, sources[:1], sources, chunk=500, chunks=2, batch_size=2, seed=0,
                                  eval_sequences=6)
    contexts = [villages(tokenizer, batches.validation, i) for i in range(6)]
    lone = [i for i in range(6) if all(contexts[i] & other for other in contexts)]
    assert lone and [i for i in range(6) if batches.controls[i] is None] == lone
    assert f"{len(lone)} of 6 validation items without a control" in batches.about
    args = types.SimpleNamespace(out=str(tmp_path), stage="instruct", micro_batch=3)
    losses = train.validate(args, make_model(), batches, 0, 1)
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


def sentences_of(text):
    """Plain reference: a sentence ends at a full stop and a space."""
    parts = text.split(". ")
    return [part + "." for part in parts[:-1]] + parts[-1:]


def test_an_excerpt_holds_the_answers_it_asks_for(tokenizer):
    """A run of whole sentences, as long as the room allows, round an answer that is said once; other questions are not
    asked."""
    places = "Rome Oslo Bern Lima Cork Nice Bath Graz Linz Ghent".split()
    text = " ".join(f"Guest {k} came {'a long way ' * (k % 3)}from {place}." for k, place in enumerate(places))
    pairs = [(f"Where did guest {k} come from?", ["Nowhere", place.upper()]) for k, place in enumerate(places)]
    pairs += [("Who came?", ["guest"]), ("Far?", ["yes"]), ("Why?", ["for the food"])]  # said often, no fact, not said
    plain, seen = sentences_of(text), set()
    for seed in range(60):
        for room in (1, 60, 150, 400):
            got, asked = excerpt(tokenizer, text, pairs, room, np.random.default_rng(seed))
            window = sentences_of(got)
            first = plain.index(window[0])
            assert window == plain[first:first + len(window)] and got in text
            assert asked == [pair for pair in pairs[:10] if pair[1][1].title() in got] and asked
            longer = [" ".join(plain[a:b]) for a,
                      b in ((first - 1, first + len(window)), (first, first + len(window) + 1)) if a >= 0 and b <= 10]
            assert (len(window) == 1 or len(got) <= room) and all(len(other) + 1 > room for other in longer)
            seen.add((room, first))
    assert {first for room, first in seen if room == 1} == set(range(10)) and len(seen) > 20
    assert excerpt(tokenizer, text, pairs[10:], 50, np.random.default_rng(0)) == (text, pairs[10:])


def test_an_excerpt_of_a_dialogue_keeps_its_speakers(tokenizer):
    text = "Ann: Hello! Who is it?\nBo: Me. I bring pears. Are you well?\n\nAnn: Yes! Come in."
    got, _ = excerpt(tokenizer, text, [("What does Bo bring?", ["pears"])], 5, np.random.default_rng(0))
    assert got == "Bo: Me. I bring pears. Are you well?"
    got, _ = excerpt(tokenizer, text[5:], [("What does Bo bring?", ["pears"])], 5, np.random.default_rng(0))
    assert got == "I bring pears."


def test_context_lengths_are_log_uniform(tmp_path, tokenizer):
    """From a sentence to all chunks: of the rooms drawn for demonstrations of 20 tokens, each doubling has its share.
    And a document longer than its room is cut only where excerpts are asked for."""
    tasks = {"t": ("f", "", [("a", ["b"])] * 400)}
    draws = [instruction_example(tokenizer, [], tasks, "t", 64, 16, np.random.default_rng(seed)) for seed in range(600)]
    lengths = np.array([len(example.context) for example in draws])
    shares = [((lengths >= low) & (lengths < 2 * low)).mean() for low in (32, 64, 128, 256, 512)]
    assert all(abs(share - 1 / 6) < 0.06 for share in shares), shares
    documents, _ = load_instructions(write_villages(tmp_path / "qa.jsonl", 12))
    whole, cut = [[len(instruction_example(tokenizer, documents, {}, 3, 64, 1, np.random.default_rng(seed),
                                           share).context) for seed in range(80)] for share in (0.0, 1.0)]
    assert min(whole) == 60 and min(cut) < 50 and sum(n < 50 for n in cut) > 40


def test_a_document_of_all_chunks_leaves_room_for_bos(tmp_path, tokenizer):
    """With its BOS a document of 64 bytes, here tokens, is longer than 64 tokens, and one of 63 is not cut."""
    rows = [{"context": str(n) * (64 if n < 4 else 63), "qas": [{"question": "q", "answers": ["a"]}]} for n in range(9)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = instruction_batches(tokenizer, [str(tmp_path / "qa.jsonl")], None, chunk=32, chunks=2, batch_size=9,
                                  seed=0, eval_sequences=2)
    assert batches.about.startswith("3 documents (4 longer than 64 tokens left out)")
    assert sum(batches.training(0).mask[0, :2].flatten().tolist()) == 64


def test_weights_of_sources(tmp_path):
    rows = [{"dataset": name, "context": f"{name} {k}", "qas": [{"question": "q", "answers": ["a"]}]} for name,
            n in (("x", 3), ("y", 2), ("z", 4)) for k in range(n)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"task": "up", "input": str(k), "output": "o"}) + "\n"
                                              for k in range(30)))
    documents, tasks = load_instructions([str(tmp_path / "qa.jsonl"), str(tmp_path / "t.jsonl")])
    assert instruction_units(documents, tasks) == [*range(9), "up", "up"]
    units = instruction_units(documents, tasks, ["y=3", "z=0", f"{tmp_path / 't.jsonl'}=2"])
    assert units == [0, 1, 2, 3, 3, 3, 4, 4, 4, "up", "up", "up", "up"]
    for bad in ("w=1", "x", "x=", "x=0.5", "x=-1", "=3"):
        with pytest.raises(InputError, match="--weights"):
            instruction_units(documents, tasks, [bad])


def test_synthetic_conversations(tmp_path):
    """The same for the same seed; every answer stands once in the text; turns alternate; no slot is left."""
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, seed in zip(paths, "112"):
        command = [sys.executable, "-m", "support.conversations", "--count", "12", "--seed", seed, "--out", path]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    texts = [open(path, encoding="utf-8").read() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and paths[2] in refused.stderr and "new file" in refused.stderr
    documents, tasks = load_instructions(paths[1:])
    assert len(documents) == 24 and not tasks
    for source, text, pairs in documents:
        assert source == "conversations" and len(pairs) >= 10 and 450 <= len(text.split()) <= 1000
        sessions = [session.split("\n") for session in text.split("\n\n")]
        assert 3 <= len(sessions) <= 5 and not set("{}@|()\0") & set(text)
        for turns in sessions:
            speakers = [turn.split(": ")[0] for turn in turns]
            assert len(set(speakers)) == 2 and all(a != b for a, b in zip(speakers, speakers[1:]))
        for question, (answer,) in pairs:
            said = [len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", part, re.I)) for part in (text, question)]
            assert said == [1, 0] and "@" not in question
