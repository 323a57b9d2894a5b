"""Packing, the doubled sequence, chunks, instruction rows and the contexts and conversations made of them."""

import gzip
import json
import os
import re
from argparse import Namespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import data
from data import (Example, InstructionData, conversation, doubled, instruction_batch, instruction_example,
                  load_instructions, open_tokens, sequences, split_into_chunks)
from support.files import InputError
from support.text import user_turn

GOLDEN = json.load(open(os.path.join(os.path.dirname(__file__), "golden", "text_golden.json"), encoding="utf-8"))
CHATML = ("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant: {% endif %}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pack_every_kind_of_file(tmp_path, tokenizer, monkeypatch):
    """Documents between <s> and </s>, PACKED of them at a time; rows without a text are left out. Packed once."""
    texts = ["Eine Zeile.", "naïve — ≠ ascii\n\nsecond paragraph", "x" * 700, " y"]
    packed = [[257, *tokenizer(text, add_special_tokens=False)["input_ids"], 258] for text in texts]
    monkeypatch.setattr(data, "PACKED", 3)
    jsonl = write_rows(tmp_path / "a.jsonl", [{"text": text, "source": "here"} for text in (*texts, None, " \n")])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    for path in (jsonl, jsonl + ".gz", str(tmp_path / "a.parquet")):
        tokens = open_tokens([path], tokenizer)
        assert tokens.dtype == np.uint16 and tokens.tolist() == sum(packed, [])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    mine = str(tmp_path / "t.bin")
    for files in ([str(tmp_path / "b.txt.gz"), jsonl, mine], [mine]):
        assert open_tokens(files[:2], tokenizer, *files[2:]).tolist() == sum([packed[1], *packed], [])
    monkeypatch.setattr(data, "pack", lambda *_: pytest.fail("packed twice"))
    assert open_tokens([jsonl], tokenizer).tolist() == sum(packed, [])


def test_bad_token_files(tmp_path, tokenizer, monkeypatch):
    """Of another tokenizer, cut short, or none; sources that are missing or damaged leave nothing behind."""
    damaged = gzip.compress(b'{"text": "a"}\n' * 2000)
    files = {"a.txt": b"Some words.", "x.bin": b"12345",
             "cut.jsonl.gz": damaged[:30] + b"????" + damaged[34:], "f.jsonl": b'{"text": "a"}\n{"txt": "b"}\n',
             "bytes.jsonl": b'{"text": "a"}\n' * 89 + b'{"text": "\xff"}\n', "blank.txt": b" \n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("t.bin", "cut.bin"):
        open_tokens([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / name))
    with open(tmp_path / "cut.bin", "ab") as file:
        file.write(b"12")
    for name, words in (("cut.bin", "cut short"), ("x.bin", "x.bin is not a packed token file"),
                        ("no.parquet", "no.parquet: no such file"), ("cut.jsonl.gz", "cannot be read"),
                        ("f.jsonl", "f.jsonl line 2: field 'text'"), ("bytes.jsonl", "bytes.jsonl line 90"),
                        ("blank.txt", "there is no text")):
        with pytest.raises(InputError, match=words):
            open_tokens([str(tmp_path / name)], tokenizer)
    tokenizer.eos_token = "<unused>"
    with pytest.raises(InputError, match="another tokenizer"):
        open_tokens([str(tmp_path / "t.bin")], tokenizer)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(InputError, match="cache cannot be written.*GENERATIVE_ADAPTER_CACHE.*No space"):
        open_tokens([str(tmp_path / "a.txt")], tokenizer)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_sequences_are_an_endless_shuffled_stream():
    def take(first, count, seed=1):
        stream = sequences(np.arange(1003, dtype=np.uint16), 10, first, seed)
        return torch.stack([next(stream) for _ in range(count)])

    seen = take(0, 3 * 99)                              # an epoch: a fresh offset of up to 9 tokens may cost one of 100
    assert (seen[:, 1:] - seen[:, :-1] == 1).all()                             # each is a run of the text
    epochs = seen[:, 0].view(3, 99)
    assert all(len(set(e.tolist())) == 99 for e in epochs)                     # each epoch reads a sequence once
    assert len({e[0].item() % 10 for e in epochs}) > 1                         # and cuts elsewhere
    assert torch.equal(torch.cat([take(first, 7) for first in range(0, 280, 7)]), seen[:280])
    assert not torch.equal(take(0, 70, seed=2), seen[:70])                     # position and seed alone decide


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
    segments, mask, *_ = instruction_batch([Example(ids, [7], [7])], 0, case["window"])
    segments, mask = segments[0, :-1], mask[0, :-1]
    assert segments.shape == (case["num_chunks"], case["chunk_len"]) and (mask == 0).sum() == case["pads"]
    assert segments[mask.bool()].tolist() == ids
    assert segments.tolist() == case.get("input_ids", segments.tolist())
    assert mask.tolist() == case.get("attention_mask", mask.tolist())


def test_instruction_batch():
    """Contexts of several lengths and their conversations, padded to one shape."""
    examples = [Example([1, 2, 3, 4, 5], [7, 8], [-100, 8]), Example([6], [9, 9, 9, 9], [-100] * 4)]
    segments, mask, visible, labels = instruction_batch(examples, pad=0, chunk=4)
    assert segments.tolist() == [[[1, 2, 3, 0], [4, 5, 0, 0], [7, 8, 0, 0]], [[6, 0, 0, 0], [0] * 4, [9] * 4]]
    assert mask.tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0] * 4, [1] * 4]]
    assert visible.tolist() == [0, 1, 2] and (labels[:, :2] == -100).all()
    assert labels[:, 2].tolist() == [[-100, 8, -100, -100], [-100] * 4]


def test_conversation_labels(tokenizer):
    """Only the answers and the token that ends each are targets; the first question is the prompt of evaluation."""
    def check(template, pairs, text, answers):
        tokenizer.chat_template = template
        ids, labels = conversation(tokenizer, pairs, limit=100)
        assert tokenizer.decode([t for t in labels if t != -100]) == answers
        assert text is None or tokenizer.decode(ids) == text
        assert all(t in (-100, i) for t, i in zip(labels, ids))
        prompt = user_turn(tokenizer, pairs[0][0])
        assert ids[:len(prompt)] == prompt
        return tokenizer.decode(prompt)

    two, long = [("Who?", "Ana."), ("b", "c")], ("x" * 200, "y")
    check(CHATML, [two[0], long, ("Où?", "Nîmes")], "<s>user: Who?</s>\n<s>assistant: Ana.</s>\n"
          "<s>user: Où?</s>\n<s>assistant: Nîmes</s>\n", "Ana.</s>Nîmes</s>")
    # too long first and last: the other is kept
    assert conversation(tokenizer, [long, two[1], long], limit=100) == conversation(tokenizer, two[1:], limit=100)
    # a template that writes the last turn in its own way (Qwen3's thinking): one question, its labels in place
    last = CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}~{% endif %}{{ m['content'] }}")
    check(last, two, "<s>user: Who?</s>\n<s>assistant: ~Ana.</s>\n", "Ana.</s>")
    # Qwen3's template asks for thinking unless it is told not to: the prompt then ends with the empty thought
    thinking = last.replace("<s>assistant: {%", "<s>assistant: {% if enable_thinking is false %}~{% endif %}{%")
    assert check(thinking, two[:1], None, "Ana.</s>") == "<s>user: Who?</s>\n<s>assistant: ~"
    # a prompt that ends with a space, which joins the answer's first token: both stand as they do at test time
    tokenizer.add_tokens([" Ana"])
    spaced = CHATML.replace("{{ m['content'] }}", " {{ m['content'] }}").replace("t: {%", "t:  {%")
    check(spaced, two, None, "Ana.</s>")
    check(None, [("Who? ", "Ana"), two[1]], "<s>Who? Ana</s>", "Ana</s>")


@pytest.mark.parametrize("opening, reply", [
    ("### Answer: ", "### Answer: {}</s>\n"),                                           # the prompt ends with a space
    ("<s>assistant<think>\n", "<s>assistant{}</s>"),                                    # DeepSeek R1
    ("<s>assistant\n<think>\n\n</think>\n\n", "<s>assistant\n<think>\n\n</think>\n\n{}</s>\n"),             # Qwen3
    ("<s>assistant\n<think>\n", "<s>assistant\n<think>\n\n</think>\n\n{}</s>\n"),       # Qwen3, the thinking one
    ("<s>assistant", "<s>assistant<channel>final<message>{}</s>"),                      # Harmony: gpt-oss
    ("[/INST]", "[/INST] {}</s>")])                                                     # Mistral, Llama 2
def test_labels_in_templates_that_write_more_than_the_answer(tokenizer, opening, reply):
    """Neither a thought nor a channel is a target. At test time the prompt is what stands before the answer here, or
    the base writes what lies between."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<channel>", "<message>"]})
    tokenizer.add_tokens([" Ana", "<think>", "</think>"])
    before, after = reply.split("{}")
    tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'user' %}<s>user {{ m['content'] }}</s>"
                               f"{{% else %}}{before}{{{{ m['content'] }}}}{after}{{% endif %}}{{% endfor %}}"
                               f"{{% if add_generation_prompt %}}{opening}{{% endif %}}").replace("\n", "{{ '\n' }}")
    ids, labels = conversation(tokenizer, [("Who?", "Ana Lee ")], limit=100)
    assert tokenizer.decode([t for t in labels if t != -100]).strip() == "Ana Lee</s>"
    assert ids[:len(user_turn(tokenizer, "Who?"))] == user_turn(tokenizer, "Who?")
    assert tokenizer.decode(ids).startswith("<s>user Who?</s>" + max(opening, before, key=len) + "Ana Lee</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="chat template of --base"):
        conversation(tokenizer, [("Who?", "Ana")], limit=100)


SCHEMAS = [
    {"story": "S", "questions": ["q1", "q2"], "answers": {"input_text": ["a1", "a2"]}},                       # CoQA
    {"passage": "S", "question": "q1", "answers_spans": {"spans": ["a1", "b"], "types": ["span", "span"]}},     # DROP
    {"document": {"summary": {"text": "S"}}, "question": {"text": "q1"}, "answers": [{"text": "a1"}, {"text": "b"}]},
    {"question": "q1", "context": {"contexts": ["S", "T"]}, "long_answer": "a1", "final_decision": "yes"},    # PubMedQA
    {"context": "S", "question": "q1", "answers": ["x", "a1"], "correct_answer_id": 1},                         # QuAIL
    {"query": "q1", "passages": {"is_selected": [0, 1], "passage_text": ["T", "S"]}, "answers": ["a1"]},      # MS MARCO
    {"chapter": "S", "summary_text": "a1"},                                                                   # BookSum
    {"input": "S", "prompt": "q1", "answer": "a1"},                                                             # PwC
    {"context": "S", "question": "q1", "answers": {"text": ["a1"], "answer_start": [0]}},                       # SQuAD
    {"context": "S", "qas": [{"question": "q1", "answers": "a1"}, {"question": " ", "answers": "no question"}]},
    {"context": "S", "qas": [{"question": "q1", "answer": "a1"}, {"question": "q2", "answers": []}]},
    {"context": "S", "question": "q1", "answer": "a1"}, {"context": "S", "question": "q1", "response": ["a1", None]},
    {"context": "S", "question": "q1", "answers": ["a1", ""]}]


@pytest.mark.parametrize("row", SCHEMAS)
def test_instruction_schemas(tmp_path, row):
    """A row of each set of Table 3 and of other forms; two rows of one context are one document."""
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    (source, context, pairs), = load_instructions([path])[0]
    assert source == path and context in ("S", "S\nT") and len(pairs) in (2, 4)
    assert pairs[0][0] in ("q1", "Write a summary of the text.") and "" not in pairs[0][1]
    assert pairs[0][1][0] == ("Yes. a1" if "final_decision" in row else "a1")


@pytest.mark.parametrize("row, count, pairs", [
    ({"context": "S", "question": 7, "answer": 12}, 0, [("7", ["12"])]),
    ({"context": "S", "question": "q", "answers": [1.5, float("nan")]}, 0, [("q", ["1.5"])]),
    ({"context": "S", "question": "q", "answers": {"text": []}}, 1, []), ({"text": None}, 1, None),
    ({"query": "q", "passages": {"is_selected": [0], "passage_text": ["T"]}, "answers": ["a"]}, 1, None),
    ({"context": "S", "question": "q", "answers": ["a", "not enough information"], "correct_answer_id": 1}, 0, [])])
def test_rows_without_an_answer_are_left_out(tmp_path, capsys, row, count, pairs):
    """And counted; a number is an answer."""
    documents, _ = load_instructions([write_rows(tmp_path / "rows.jsonl", [row])])
    assert [document[2] for document in documents] == ([] if pairs is None else [pairs])
    assert (f"{count} rows or questions of" in capsys.readouterr().out) == (count > 0)


@pytest.mark.parametrize("row, words", [
    ({"line": "x"}, "known instruction set"),
    ({"context": "S", "qas": [{"question": "q"}]}, "without a field 'answers'"),
    ({"task": "t", "input": "x"}, "'output'"), ({"task": "t", "input": {"a": 1}, "output": "x"}, "input is a dict"),
    ({"context": "S", "question": "q", "answers": [{"a": 1}]}, "a number or a list of them.*: answer is a dict")])
def test_malformed_instructions(tmp_path, row, words):
    with pytest.raises(InputError, match=f"rows.jsonl line 1.*{words}"):
        load_instructions([write_rows(tmp_path / "rows.jsonl", [row])])


def instruction_flags(sources, **flags):
    """The flags of train.py that InstructionData reads."""
    return Namespace(**{"data": sources, "validation": None, "documents": None, "chunk": 64, "chunks": 1, "batch": 2,
                        "seed": 0, "eval_sequences": 30} | flags)


def write_villages(path, count):
    """Documents of some 60 bytes, one question each; the village names its document."""
    numbers = [f"{k:02d}" for k in range(count)]
    return write_rows(path, [{"context": f"In village{k} the baker is called Name{k}. It rained all day.", "qas": [
        {"question": f"Who bakes in village{k}?", "answers": [f"Name{k}"]}]} for k in numbers])


def test_the_control_shares_no_document(tmp_path, tokenizer):
    """Contexts of up to 12 of 30 documents: that of the item half the set away holds others."""
    source = write_villages(tmp_path / "qa.jsonl", 60)
    flags = instruction_flags([source], chunks=12, validation=[source], eval_sequences=30)
    validation = InstructionData(flags, tokenizer).validation
    texts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in
             zip(validation.segments[:, :-1], validation.mask[:, :-1])]
    held = [set(re.findall(r"village\d+", text)) for text in texts]
    assert len(held) == 30 and all(held[i] and not held[i] & held[(i + 15) % 30] for i in range(30))
    assert max(map(len, held)) >= 9


def test_context_lengths_are_log_uniform(tmp_path, tokenizer):
    """From a sentence to all chunks: of the lengths drawn for demonstrations of 20 tokens, each doubling has its share.
    A document longer than the length drawn is not cut; one that with its BOS is longer than all chunks is left out."""
    args, tasks = instruction_flags([], chunks=16), {"t": ("", [("a", ["b"])] * 400)}
    draws = [instruction_example(tokenizer, [], {}, tasks, "t", args, number) for number in range(600)]
    lengths = np.array([len(example.context) for example in draws])
    shares = [((lengths >= low) & (lengths < 2 * low)).mean() for low in (32, 64, 128, 256, 512)]
    assert all(abs(share - 1 / 6) < 0.06 for share in shares), shares
    rows = [{"context": str(n) * (64 if n < 4 else 63), "qas": [{"question": "q", "answers": ["a"]}]} for n in range(9)]
    flags = instruction_flags([write_rows(tmp_path / "qa.jsonl", rows)], chunk=32, chunks=2, eval_sequences=2)
    documents = InstructionData(flags, tokenizer).documents
    assert len(documents) == 5 - 2
    by_source = data.index_by_source(documents)
    whole = [instruction_example(tokenizer, documents, by_source, {}, 1, flags, number) for number in range(80)]
    assert {len(example.context) for example in whole} == {64}


def test_distractors_are_of_one_source(tmp_path, tokenizer):
    """The document is always there, others of its source in any place, and what is asked is about documents there."""
    rows = [{"dataset": "ab"[k % 2], "context": f"Item{k:02d} weighs {k}.", "qas": [
        {"question": f"Item{k:02d}?", "answers": [str(k)]}]} for k in range(40)]
    documents, _ = load_instructions([write_rows(tmp_path / "qa.jsonl", rows)])
    places, counts = set(), set()
    for number in range(100):
        by_source = data.index_by_source(documents)
        example = instruction_example(tokenizer, documents, by_source, {}, 6, instruction_flags([], chunks=4), number)
        there = [int(text[4:6]) for text in tokenizer.decode(example.context[1:]).split("\n\n")]
        assert len(set(there)) == len(there) and all(k % 2 == 0 for k in there)
        assert int(tokenizer.decode(example.ids)[7:9]) in there
        places.add(there.index(6))
        counts.add(len(there))
    assert places >= {0, 1, 2, 3} and 1 in counts and max(counts) > 9


def test_units_of_an_epoch(tmp_path, tokenizer, monkeypatch):
    """Every document once and a task once for each 20 of its examples; the second epoch comes to each again, in another
    order. A tenth of the documents is held out, at least two."""
    tasks = [{"task": "up", "input": str(k), "output": "o", "definition": "Say o."} for k in range(30)]
    sources = [write_villages(tmp_path / "qa.jsonl", 9), write_rows(tmp_path / "t.jsonl", tasks)]
    flags = instruction_flags(sources, eval_sequences=30)
    instructions = InstructionData(flags, tokenizer)
    assert instructions.units == [0, 1, 2, 3, 4, 5, 6, "up", "up"] and instructions.steps_per_epoch == 4.5
    asked = []
    monkeypatch.setattr(data, "instruction_example", lambda *args: asked.append(args[4]) or instruction_example(*args))
    for _ in zip(range(9), instructions.batches(0)):
        pass
    first, second = asked[:9], asked[9:18]
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(map(str, instructions.units))
    assert first != second
