"""Metrics against the authors' values, cost against torch's FLOP counter, whole runs on a tiny base, refusals."""

import csv
import json
import math
import os
import random
import re
import shlex
import shutil
import types

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train
from conftest import ROOT, make_base, make_model
from evaluate import exact_match, f1_score, mean_and_stderr, normalize_answer, normalize_text, recall, rouge_l_recall
from extras.finetune import finetune
from generator import Memory
from model import AdaptedLM, load_base
from processes import finish, start
from support import costs, plots
from support.files import InputError
from tasks import metaicl, msc, qa
from tasks.contexts import other_contexts
from tasks.metaicl import FEW_SHOT_PROMPT, SEEDS, ZERO_SHOT_PROMPT
from tasks.qa import IN_CONTEXT_PROMPT

GOLDEN = json.load(open(os.path.join(os.path.dirname(__file__), "golden", "text_golden.json"), encoding="utf-8"))
METRICS = ("f1", "em", "recall", "rougeL_recall")
SQUAD = [("The river Öre runs past seven green stones. " * 4, [("How many stones?", ["seven", "seven green"]),
                                                               ("Which river?", ["Öre", "the river Öre"])]),
         ("A lamp hangs under the old paper mill. " * 5, [("What hangs there?", ["A lamp"])]),
         ("The north wind walks on cold nights. " * 4, [("Who walks?", ["The north wind", "wind"]),
                                                        ("When?", ["on cold nights"]), ("Where?", ["north"])])]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(tmp_path, base, task, *flags):
    """(table, predictions) of an evaluation."""
    evaluate.main(["--task", task, "--base", base, "--device", "cpu", "--dtype", "float32", "--output",
                   str(tmp_path / "out.json"), "--predictions", str(tmp_path / "out.jsonl"), *flags])
    return json.load(open(tmp_path / "out.json")), [json.loads(line) for line in open(tmp_path / "out.jsonl")]


def by_method(result):
    return {row["method"]: row for row in result["rows"]}


def timeless(result):
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in result["rows"]]
    return {**result, "rows": rows, "plot": None}


def load_adapted(base_directory, generator_directory):
    return AdaptedLM.from_pretrained(load_base(base_directory, torch.float32, "cpu")[0], generator_directory)


def ids_of(tokenizer, text):
    """(1, L), after <s>."""
    return torch.tensor([[257, *tokenizer(text)["input_ids"]]])


def greedy(model, tokenizer, prompt, memory=(), new_tokens=20):
    """The answer to a prompt by generate, of a base or, with [memory], of an AdaptedLM."""
    ids = ids_of(tokenizer, prompt)
    out = model.generate(ids, *memory, max_new_tokens=new_tokens, do_sample=False, pad_token_id=259)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).split("\n")[0].strip()


def plain_nats(model, tokenizer, prompt, gold, memory=None):
    """Token-mean nats of a gold after a prompt (ids), one token at a time, in float64."""
    ids, nats = list(prompt), []
    for t in tokenizer(gold)["input_ids"]:
        nats.append(-model(torch.tensor([ids]), memory=memory)[0, -1].double().log_softmax(-1)[t].item())
        ids.append(t)
    return sum(nats) / len(nats)


def streamed(model, tokenizer, text, chunk):
    """Memory of a text, evenly split into chunks of at most so many tokens."""
    ids, memory = ids_of(tokenizer, text), None
    for piece in ids.split(-(-ids.shape[1] // -(-ids.shape[1] // chunk)), 1):
        memory = model.contextualize(piece, memory=memory)
    return memory


def load_qa(path, task="squad"):
    return qa.load(path, types.SimpleNamespace(task=task))


def load_metaicl(path, seeds=SEEDS, shots=16, method="fine-tuned"):
    return metaicl.load(str(path), types.SimpleNamespace(demo_seeds=seeds, shots=[shots], method=[method]))


def drawn_texts(path):
    """The words of an .svg figure, which matplotlib leaves in comments."""
    return " | ".join(re.findall(r"<!-- (.*?) -->", open(path, encoding="utf-8").read()))


@pytest.fixture(scope="module")
def generator_directory(tmp_path_factory, base_directory):
    path = tmp_path_factory.mktemp("generator")
    make_model(base=load_base(base_directory, torch.float32, "cpu")[0]).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def whole_conversations(tmp_path_factory):
    """The built-in sample without its oracle spans, and without naming a span."""
    path = tmp_path_factory.mktemp("msc") / "msc.jsonl"
    rows = [json.loads(line) for line in open(msc.SAMPLE, encoding="utf-8")]
    write_rows(path, [{**row, "span": None} for row in rows if row["span"] == "conversation"])
    return str(path)


@pytest.fixture(scope="module")
def squad_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad") / "squad.jsonl"
    write_rows(path, [{"id": f"{d}-{q}", "title": "t", "context": text, "question": question,
                       "answers": {"text": golds, "answer_start": [0] * len(golds)}}
                      for d, (text, questions) in enumerate(SQUAD) for q, (question, golds) in enumerate(questions)])
    return str(path)


@pytest.fixture(scope="module")
def metaicl_directory(tmp_path_factory):
    """Three tasks in MetaICL's layout, hand-made; a stray directory beside them."""
    path = tmp_path_factory.mktemp("metaicl")
    (path / "not_a_task").mkdir()
    for task in ("poem_sentiment", "quarel", "superglue-copa"):
        (path / task).mkdir()
        for seed in SEEDS:
            for split, count in (("train", 16), ("dev", 16), ("test", 3)):
                rows = [{"task": task, "input": f"{task} {split} {seed} {i} é", "output": "yes" if i % 2 else "no",
                         "options": ["yes", "no"]} for i in range(count)]
                write_rows(path / task / f"{task}_16_{seed}_{split}.jsonl", rows)
    return path


# ---- metrics


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda c: c["prediction"] or "empty")
def test_metrics_equal_the_authors(case):
    prediction, gold = case["prediction"], case["gold"]
    assert [normalize_answer(prediction), normalize_answer(gold)] == case["normalize_answer"]
    assert [normalize_text(prediction), normalize_text(gold)] == case["normalize_text"]
    # an empty side scores 0 there, also where both are empty; SQuAD's em would be 1
    if all(case["normalize_text"]):
        assert exact_match(prediction, gold) == case["em"]
    assert f1_score(prediction, gold) == pytest.approx(case["f1"])
    assert rouge_l_recall(prediction, gold) == pytest.approx(case["rougeL_recall"])
    assert evaluate.accuracy(prediction, gold) == case["icl_acc"]


@pytest.mark.parametrize("metric, cases", [
    (recall, (("It was the Blue Boat, I think", "a blue boat", 1), ("bluebird", "blue", 0), ("", "x", 0),
              ("red or blue", "blue", 1), ("blue big boat", "blue boat", 0), ("the", "a", 0), ("in 1999.", "1999", 1))),
    (evaluate.accuracy,
     (("Positive", "positive", 1), ("Output: no", "No", 1), ("no.", "no", 0), ("", "no", 0), ("É", "é", 1)))])
def test_recall_and_accuracy(metric, cases):
    for prediction, gold, want in cases:
        assert metric(prediction, gold) == want


def test_scores_of_a_hand_computed_case():
    """Two golds; the shortest is one word of the two predicted, the other is the prediction."""
    scores = evaluate.scores("the Paris, France", ["Paris France", "Paris"], qa.METRICS)
    assert scores == {"f1": pytest.approx(2 / 3), "em": 0, "f1_max": 1, "em_max": 1, "recall": 1, "rougeL_recall": 1}
    nothing = evaluate.scores("", ["Ünïcode"], qa.METRICS)
    assert set(nothing.values()) == {0} and evaluate.scores("ÜNÏCODE!", ["Ünïcode"], ["em"]) == {"em": 1}
    row = evaluate.mean_scores([{**scores, "number": 0, "inference_tflops": 2.0, "storage_mfloats": 3.0},
                                {**nothing, "number": 1, "inference_tflops": 4.0}], {"gap": 1.0})
    assert row["f1"] == pytest.approx(100 / 3) and row["f1_stderr"] == pytest.approx(100 / 3)
    assert row["em_max"] == row["em_max_stderr"] == 50
    assert (row["n"], row["inference_tflops"], row["storage_mfloats"]) == (2, 3, 3)       # the mean of what is known


def test_standard_error():
    """Also clustered: copies of a value tell nothing new; unequal clusters against the sum of their deviations."""
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    t = torch.tensor(values, dtype=torch.float64)
    mean, error = mean_and_stderr(values)
    assert mean == pytest.approx(t.mean().item()) and error == pytest.approx(t.std().item() / math.sqrt(5))
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
    assert row["pairs"] == 3
    assert "pairs" not in evaluate.memory_gap(own[:3], others)
    assert evaluate.memory_gap(own, []) == {}
    bare = [{"number": n, "nats": v} for n, v in ((0, 2.0), (1, 3.0), (2, None), (3, 11.0))]          # gains 1, 0, 2
    row = evaluate.memory_gap(own, [], bare)
    assert row == {"gain": pytest.approx(1), "gain_stderr": pytest.approx((2 * (1 + 1)) ** 0.5 / 3)}   # sums -1 and 1


# ---- costs


def test_base_flops_against_the_counter():
    """Reading 6 tokens one at a time with a cache of 5, so that attention over real keys alone is counted."""
    base = make_base(attn_implementation="eager")
    ids = torch.randint(0, 256, (1, 11))
    with torch.no_grad():
        cache = base(ids[:, :5], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            for t in range(5, 11):
                cache = base(ids[:, t:t + 1], past_key_values=cache, use_cache=True).past_key_values
    rotary = 6 * 2 * 16 // 2                      # the rotary frequencies are an outer product, which the counter sees
    assert abs(counter.get_total_flops() - costs.base_flops(base, 6, past=5)) <= 2 * rotary


@pytest.mark.parametrize("norm, rank", [("svd", 8), ("frobenius", 24)])
def test_contextualisation_flops_against_the_counter(norm, rank):
    """Two chunks read and their adapters made. The counter sees full attention, of which the causal half is counted."""
    L = 20
    model = make_model(base=make_base(attn_implementation="eager"), targets=["o_proj", "down_proj"], norm=norm, chunk=L)
    ids = torch.randint(0, 256, (1, 2 * L))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        memory = model.contextualize(ids[:, :L])
        memory = model.contextualize(ids[:, L:], memory=memory)
        model.lora(memory)
    acausal = 2 * 3 * 4 * 4 * 16 * (L * L - L * (L + 1) // 2)           # chunks, blocks, 4 FLOPs, heads, their width
    applied = 3 * 2 * L * rank * (64 + 64 + 96 + 64)                    # the unmerged pairs at work on the second chunk
    rotary = 2 * 2 * L * 8                                              # where it is counted
    want = costs.context_costs(model, 2 * L)["contextualisation_tflops"] * 1e12 + acausal + applied
    assert abs(counter.get_total_flops() - want) <= rotary + 1


def test_storage(tokenizer):
    model = make_model(targets=["o_proj", "down_proj"])
    pairs = model.lora(model.contextualize(torch.randint(0, 256, (1, 9))))
    _, cost = evaluate.read_context(model, tokenizer, "a river", {})
    assert cost["storage_mfloats"] * 1e6 == sum(A.numel() + B.numel() for A, B in pairs.values())
    cache = model.base(torch.randint(0, 256, (1, 9)), use_cache=True).past_key_values
    assert costs.kv_cache_floats(model.base, 9) == sum(layer.keys.numel() + layer.values.numel()
                                                       for layer in cache.layers)


def test_the_released_count_gives_table_1():
    """Mistral-7B's shape: 67 query tokens after 64, 128 and 256 kept ones are UltraGist's rows, 71 after none and after
    2,352 are closed-book and full prompting."""
    with torch.device("meta"):
        base = transformers.MistralForCausalLM(transformers.MistralConfig())
    for tokens, kept, tflops in ((67, 64, 0.514), (67, 128, 0.552), (67, 256, 0.627), (71, 0, 0.505),
                                 (71, 2352, 2.059)):
        assert costs.query_costs(base, tokens, kept)["released_tflops"] == pytest.approx(tflops, abs=5e-4)


def test_a_context_is_read_once_and_its_seconds_include_the_last_norm(tokenizer, monkeypatch):
    """Beyond MEMORY_FLOATS the oldest memory is dropped. The clock waits for the device."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = types.SimpleNamespace(type="cuda")
    assert costs.clock(gpu) > 0 and waited == [gpu] and costs.clock(torch.device("cpu")) > 0 and len(waited) == 1
    model, calls, reads, memories = make_model(chunk=10), [], [], {}
    lora, read = model.lora, model.read
    model.lora = lambda memory: calls.append(memory) or lora(memory)
    model.read = lambda ids: reads.append(ids) or read(ids)
    monkeypatch.setattr(evaluate, "clock", lambda device: len(calls))
    monkeypatch.setattr(evaluate, "MEMORY_FLOATS", 2 * 3 * 24 * 24)     # two contexts, three layers of d_r 24
    for text in ("one" * 9, "two", "one" * 9, "three", "two", "one" * 9):
        memory, cost = evaluate.read_context(model, tokenizer, text, memories)
        want = streamed(model, tokenizer, text, 10)
        assert all(torch.equal(memory.states[name], S) for name, S in want.states.items())
    assert [tokenizer.decode(ids[1:]) for ids in reads] == ["one" * 9, "two", "three", "one" * 9] and len(memories) == 2
    # 28 tokens: an adapter for chunks 2 and 3, and the last one
    assert cost["contextualisation_seconds"] == 3 and cost["context_tokens"] == 28


# ---- contexts and prompts, answers and nats


def test_controls_share_nothing_and_are_as_many_for_all():
    def drawn(keys, controls, first=None):
        args = types.SimpleNamespace(seed=0, controls=controls, method=["adapter-shuffled"])
        return other_contexts(keys, ["ana"] * 9, args, notes, first)

    keys, notes = [{"a", "b"}, {"b", "c"}, {"d"}, {"a"}, {"e"}, {"d", "e", "a"}], []
    others = drawn(keys, 4)
    assert all(not keys[i] & keys[j] for i, some in enumerate(others) for j in some)
    assert {len(some) for some in others} == {1} and others == drawn(keys, 4) == drawn(keys, 1)
    assert len(notes) == 2 and all("under 1, not under 4" in note for note in notes)
    assert all(len(set(some)) == len(some) == 4 for some in drawn([{i} for i in range(9)], 4))
    # those that are read anyway come first
    assert all({0, 1, 2} - {i} <= set(some) for i, some in enumerate(drawn([{i} for i in range(9)], 4, first=3)))
    assert drawn([{"a"}, {"a"}], 1) == [[], []] and "shares a part with ana, ana: left out" in notes[-1]
    assert msc.overlapping(keys) == [0, 0, 0, 0, 0, 0] and len(set(msc.overlapping(keys[:5]))) == 3


def test_prompts_of_figure_7():
    assert IN_CONTEXT_PROMPT.format(context="{Ünï}", question="Who?") == (
        "{Ünï}\n\nInstruction: Answer the question based on the context above. Respond with a short phrase only. "
        "Keep the answer short and concise, without any "
        "explanation or additional words\n\nQuestion: Who?\n\nAnswer:")
    demonstrations = "Input: a\nOutput: b\n\nInput: c\nOutput: d"
    assert FEW_SHOT_PROMPT.format(context=demonstrations, question="Input: e\nOutput:") == (
        "Input: a\nOutput: b\n\nInput: c\nOutput: d\n\nInstruction: Based on the demonstration above, "
        "provide a short and concise answer, without any explanation or "
        "additional words.\n\nInput: e\nOutput:")
    assert ZERO_SHOT_PROMPT.format(question="Input: e\nOutput:") == (
        "Instruction: Provide a short and concise answer, without any explanation or additional words."
        "\n\nInput: e\nOutput:")
    assert qa.PROMPTS["closed-book-instructed"].format(question="Which river?") == (
        "Instruction: Answer the question. Respond with a short phrase only. Keep the answer short and concise, "
        "without any explanation or additional words\n\nQuestion: Which river?\n\nAnswer:")
    assert msc.PROMPTS["closed-book-instructed"] == qa.PROMPTS["closed-book-instructed"]
    assert metaicl.PROMPTS["zero-shot-instructed"] == ZERO_SHOT_PROMPT
    assert metaicl.PROMPTS["few-shot-bare"].format(context=demonstrations, question="Input: e\nOutput:") == (
        "Input: a\nOutput: b\n\nInput: c\nOutput: d\n\nInput: e\nOutput:")


def test_long_context_loses_its_beginning(tokenizer):
    def cut(context, questions, most):
        questions = [{"question": question} for question in questions]
        return evaluate.in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, context, questions, most)

    context, window = "alpha " * 200 + "omega", 400
    (ids, longer), lost = cut(context, ["Which?", "Which one?"], window)
    prompt = tokenizer.decode(ids)
    assert len(ids) < len(longer) == window
    whole = ids_of(tokenizer, IN_CONTEXT_PROMPT.format(context=context, question="Which one?"))
    assert lost == whole.shape[1] - window
    assert "omega\n\nInstruction: Answer" in prompt and prompt.endswith("Question: Which?\n\nAnswer:")
    with pytest.raises(InputError, match="window"):
        cut("x", ["q" * 500], window)
    for text in ("日本語の文章" * 40, "😀" * 60):         # a cut through a character must not grow it again
        (ids,), lost = cut(text, ["q"], 221)
        assert len(ids) <= 221 and lost


@pytest.mark.parametrize("own", [{"use_cache": False}, {"num_beams": 4}, {"repetition_penalty": 1.5},
                                 {"return_dict_in_generate": True}, {"cache_implementation": "static"},
                                 {"no_repeat_ngram_size": 2}, {"forced_eos_token_id": 65}, {"stop_strings": ["a"]},
                                 {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_answers_are_greedy_whatever_the_base_says_of_generation(tmp_path, base_directory, own):
    """A generation_config that many bases bring along has no part in an answer."""
    base, tokenizer = load_base(base_directory, torch.float32, "cpu")
    prompts = [tokenizer(text)["input_ids"] for text in ("Who sings?", "Why does it rain so much in the north?")]
    want = [base.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False)[0, len(p):].tolist() for p in prompts]
    shutil.copytree(base_directory, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**config, **own}))
    args = evaluate.arguments(["--task", "msc", "--base", str(tmp_path / "base"), "--device", "cpu", "--dtype", "float32"])
    model, tokenizer = evaluate.load_model(args)
    answers, _ = evaluate.greedy_answers(model, tokenizer, prompts, 20)
    texts = tokenizer.batch_decode(want, skip_special_tokens=True)
    assert answers == [text.split("\n")[0].strip() for text in texts]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cached_prefix_answers_like_whole_prompts(tokenizer, kind, monkeypatch):
    """Questions of different lengths on one context, in one batch and in parts, against transformers' generate on each
    prompt and nats one token at a time."""
    model, context = make_model(base=make_base(kind)), "A cold river, seven green stones."
    model.base.generation_config.pad_token_id = 259
    questions = {"Who sings?": "Ana Maria", "Why does it rain so much in the north?": "x", "Ö": " in Nîmes ", "Who?": "y"}
    items = [{"question": question, "golds": [gold]} for question, gold in questions.items()]
    prompts = [ids_of(tokenizer, IN_CONTEXT_PROMPT.format(context=context, question=q))[0].tolist() for q in questions]
    new = [model.base.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False)[0, len(p):] for p in prompts]
    with torch.no_grad():
        nats = [plain_nats(model, tokenizer, p, gold.strip()) for p, gold in zip(prompts, questions.values())]
    shared, caches, copies = len(os.path.commonprefix(prompts)), [], evaluate.copies
    monkeypatch.setattr(evaluate, "copies", lambda cache, rows: caches.append((cache, rows)) or copies(cache, rows))
    for most, sizes in ((evaluate.KV_FLOATS, [4, 4]), (2.5 * costs.kv_cache_floats(model.base, shared), [2] * 4)):
        monkeypatch.setattr(evaluate, "KV_FLOATS", most)                # of the copies at once
        caches.clear()
        records = evaluate.in_context(model, tokenizer, qa, IN_CONTEXT_PROMPT, context, items, 4)
        assert [rows for _, rows in caches] == sizes
        for cache, _ in caches:                                         # not used up by a batch
            assert cache is caches[0][0] and cache.get_seq_length() == shared
        for record, prompt, out, want in zip(records, prompts, new, nats):
            assert record["prediction"] == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
            assert record["nats"] == pytest.approx(want, rel=1e-4)
            past = len(prompts[0]) - len("Who sings?") - 1
            assert record["past"] == past and record["storage_mfloats"] == costs.kv_cache_floats(model.base, past) / 1e6
            assert record["inference_tflops"] * 1e12 == pytest.approx(
                costs.base_flops(model.base, len(prompt) - past + len(out), past))
    items[0]["golds"] = ["y" * 90, "x" * 60]                          # the window has room for what is scored
    seen = []
    monkeypatch.setattr(evaluate, "answer", lambda *args, **kwargs: seen.append(args) or [])
    evaluate.in_context(model, tokenizer, qa, IN_CONTEXT_PROMPT, "A cold river. " * 40, items[:1], 4)
    ((_, _, _, _, (prompt,), (cost, *_)),) = seen
    assert len(prompt) == 512 - 60 and cost["lost"]


@torch.no_grad()
def test_nats_of_golds_one_token_at_a_time(tokenizer):
    """A batch of prompts and golds of different lengths: without a memory, under one a row and under one for all."""
    model = make_model()
    questions, golds = ["Who?", "Where does it stand, and why?", "Ö"], ["Ana Maria", "x", " in Nîmes "]
    prompts = [ids_of(tokenizer, q)[0].tolist() for q in questions]
    rows = [model.contextualize(torch.randint(0, 256, (1, 20))) for _ in range(3)]
    for given, each in ((None, [None] * 3), (Memory.stack(rows), rows), (rows[0], rows[:1] * 3)):
        got = evaluate.gold_nats(model, tokenizer, prompts, golds, given)
        want = [plain_nats(model, tokenizer, p, g.strip(), m) for p, g, m in zip(prompts, golds, each)]
        assert got == pytest.approx(want, rel=1e-4)
    assert evaluate.gold_nats(model, tokenizer, prompts[:2], ["x", " "])[1] is None


# ---- conversations


def conversation(*sessions, answer="blue"):
    return {"previous_dialogs": [{"dialog": [{"text": t} for t in s], "personas": [["SECRET"]]} for s in sessions],
            "summary_speaker_1": ["SECRET"], "personas": [["SECRET"]],
            "self_instruct": {"B": "Which?", "A": answer}, "metadata": {"initial_data_id": "x1"}}


def test_msc_loader(tmp_path):
    """Names before turns, where they have none; the row's own dialog as the last session; never what holds the answer."""
    rows = [conversation(["Hi: there", "hello"], ["a", "b", "c"]), conversation(["Ann: hi", "Dr. O'Neil: hello"]),
            {**conversation(["hi"]), "dialog": [{"text": "last"}], "span": "all"}]
    write_rows(tmp_path / "c.jsonl", rows)
    first, second, third = msc.load(str(tmp_path / "c.jsonl"))
    assert first == {"id": "x1", "span": None, "question": "Which?", "answer": "blue",
                     "sessions": ["Speaker 1: Hi: there\nSpeaker 2: hello", "Speaker 1: a\nSpeaker 2: b\nSpeaker 1: c"]}
    assert second["sessions"] == ["Ann: hi\nDr. O'Neil: hello"]
    assert third["sessions"] == ["Speaker 1: hi", "Speaker 1: last"] and third["span"] == "all"
    assert "SECRET" not in json.dumps([first, second, third])


@pytest.mark.parametrize("text, words", [
    ("", "is empty"), ("\n\n", "is empty"), ('{"a": 1}\n{"b": \n', "line 1: field 'previous_dialogs'"),
    ("[1]", "line 1 cannot be read: not a json object"),
    (json.dumps(conversation(["hi"])) + "\n{broken", "line 2 cannot be read"),
    (json.dumps({**conversation(["hi"]), "self_instruct": {"B": "Q"}}), "line 1: field 'A'"),
    (json.dumps(conversation([])), "no turn"), (json.dumps({**conversation(["hi"]), "span": 3}), "line 1: span"),
    (json.dumps({**conversation(["hi"]), "previous_dialogs": [["hi"]]}), "field 'dialog'"),
    ("\x00\udcff\x00", "cannot be read")])
def test_bad_conversations(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=words) as caught:
        msc.load(str(path))
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_msc_untrained_adapter_is_closed_book(tmp_path, base_directory, capsys):
    result, predictions = run(tmp_path, base_directory, "msc", "--checkpoint", "none", "--limit", "3", "--batch-size",
                              "2")
    assert "NOT the paper's benchmark" in result["note"] and len(result["rows"]) == 1 + 4 * 3
    rows = by_method(result)                                            # the last span, the whole conversation
    predictions = [p for p in predictions if p["span"] in ("none", "conversation")]
    assert list(rows) == ["closed-book", "full-conversation", "adapter", "adapter-shuffled"]
    answers = {m: [p["prediction"] for p in predictions if p["method"] == m] for m in rows}
    assert answers["adapter"] == answers["adapter-shuffled"] == answers["closed-book"] != answers["full-conversation"]
    for row in rows.values():
        assert set(METRICS) <= set(row) and all(m + "_stderr" in row for m in METRICS) and row["n"] == 3
    assert abs(rows["adapter"]["gap"]) < 1e-5 and rows["adapter"]["chance"] == 20       # four controls by default
    assert rows["adapter"]["nats"] == pytest.approx(rows["closed-book"]["nats"], rel=1e-5)
    tflops, released = ({method: row[key] for method, row in rows.items()}
                        for key in ("inference_tflops", "released_tflops"))
    assert tflops["adapter"] == tflops["closed-book"] < tflops["full-conversation"]
    base, _ = load_base(base_directory, torch.float32, "cpu")
    weights = sum(p.numel() for name, p in base.named_parameters() if "norm" not in name and "embed" not in name)
    tokens = predictions[0]["released_tflops"] * 1e12 / weights                # closed-book: no attention to a context
    assert tokens == pytest.approx(round(tokens)) and released["full-conversation"] > released["closed-book"]
    assert [result[key] for key in ("task", "n", "seed", "checkpoint", "base")] == ["msc", 3, 0, "none", base_directory]
    assert set(result["versions"]) == {"python", "torch", "transformers"}
    assert "Question: {question}" in result["prompts"]["full-conversation"]
    out = " ".join(capsys.readouterr().out.split())
    assert "| adapter-shuffled |" in out and "untrained" in out


def test_msc_scores_nats_gap_and_reading_once(tmp_path, base_directory, tokenizer, whole_conversations, monkeypatch,
                                              capsys):
    """A trained-looking generator of chunks of 300 tokens; answers, nats and gap recomputed from the model, the table
    from the JSONL. Every conversation is read once for its question, its nats and all questions whose control it is."""
    base, _ = load_base(base_directory, torch.float32, "cpu")
    make_model(base=base, chunk=300).save_pretrained(tmp_path / "generator")
    reads, read = [], AdaptedLM.read
    monkeypatch.setattr(AdaptedLM, "read", lambda self, ids: reads.append(ids) or read(self, ids))
    flags = ["--data", whole_conversations, "--checkpoint", str(tmp_path / "generator"), "--limit", "4", "--batch-size", "3",
             "--controls", "2"]
    result, predictions = run(tmp_path, base_directory, "msc", *flags)
    assert len(reads) == 4                                              # the others are drawn from those evaluated
    rows, items = by_method(result), msc.load(whole_conversations)[:4]
    model = AdaptedLM.from_pretrained(base, tmp_path / "generator")
    prompts = [ids_of(tokenizer, item["question"])[0].tolist() for item in items]
    memories = [streamed(model, tokenizer, "\n\n".join(item["sessions"]), 300) for item in items]
    with torch.no_grad():
        table = [[plain_nats(model, tokenizer, prompt, item["answer"], memory) for memory in (*memories, None)]
                 for prompt, item in zip(prompts, items)]
    args = types.SimpleNamespace(seed=0, controls=2, method=[])
    others = other_contexts([{i} for i in range(24)], ["?"] * 24, args, [], 4)
    own, other = [row[i] for i, row in enumerate(table)], [[row[j] for j in some] for row, some in zip(table, others)]
    gap = mean_and_stderr([sum(o) / 2 - n for o, n in zip(other, own)])
    assert rows["adapter"]["nats"] == pytest.approx(sum(own) / 4, rel=1e-4)
    assert rows["closed-book"]["nats"] == pytest.approx(sum(row[-1] for row in table) / 4, rel=1e-4)
    assert (rows["adapter"]["gap"], rows["adapter"]["gap_stderr"]) == pytest.approx(gap, abs=1e-4)
    assert rows["adapter"]["best-of-3"] == pytest.approx(25 * sum(n < min(o) for n, o in zip(own, other)))
    for method, row in rows.items():
        mine = [p for p in predictions if p["method"] == method]
        assert row["nats"] == pytest.approx(sum(p["nats"] for p in mine) / 4) and row["nats_stderr"] > 0
        assert row["f1"] == pytest.approx(100 * sum(f1_score(p["prediction"], p["gold"]) for p in mine) / 4)
    shuffled = [p for p in predictions if p["method"] == "adapter-shuffled"]
    assert [p["control_nats"] for p in shuffled] == [pytest.approx(o, rel=1e-4) for o in other]
    assert [p["nats"] for p in shuffled] == pytest.approx([sum(o) / 2 for o in other], rel=1e-4)
    first = [memories[some[0]] for some in others]                      # whose answers F1 scores
    for method, under in (("adapter", memories), ("adapter-shuffled", first)):
        want = [greedy(model, tokenizer, item["question"], [memory]) for item, memory in zip(items, under)]
        assert [p["prediction"] for p in predictions if p["method"] == method] == want
    assert want != [greedy(model, tokenizer, item["question"], [memory]) for item, memory in zip(items, memories)]
    assert "| method | n | nats | gain | gap | best-of-3 | chance | f1 |" in " ".join(capsys.readouterr().out.split())


def test_msc_by_span(tmp_path, base_directory, generator_directory, tokenizer):
    """A row a method and span on the same questions, closed-book asked once; --limit counts the rows of a span."""
    rows = [json.loads(line) for line in open(msc.SAMPLE, encoding="utf-8")]
    spans = list(dict.fromkeys(row["span"] for row in rows))
    rows = [row for row in rows if row["metadata"]["initial_data_id"] not in ("sample_01", "sample_02")
            or row["span"] == "conversation"]                           # these two have no turn with the answer
    write_rows(tmp_path / "c.jsonl", rows)
    result, predictions = run(tmp_path, base_directory, "msc", "--data", str(tmp_path / "c.jsonl"), "--checkpoint",
                              generator_directory, "--controls", "2", "--limit", "3", "--plot", str(tmp_path / "p.svg"))
    table = {(row["method"], row["span"]): row for row in result["rows"]}
    assert list(table) == [("closed-book", "none")] + [
        (method, span) for span in spans for method in ("full-conversation", "adapter", "adapter-shuffled")]
    assert [row["n"] for row in table.values()] == [5] + [3] * 12       # three of a span, two of the whole besides
    lengths = [table["adapter", span]["context_tokens"] for span in spans[:3]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert all("gap" in table["adapter", span] for span in spans)
    nats = {p["id"]: p["nats"] for p in predictions if p["method"] == "closed-book"}
    own = {p["id"]: p["nats"] for p in predictions if (p["method"], p["span"]) == ("adapter", "conversation")}
    assert table["adapter", "conversation"]["gain"] == pytest.approx(sum(nats[i] - own[i] for i in own) / 3)
    model = load_adapted(base_directory, generator_directory)
    item = next(row for row in msc.load(str(tmp_path / "c.jsonl")) if row["span"] == "oracle turn ± 2")
    assert item["id"] == "sample_03" and len(item["sessions"]) == 1
    memory = model.contextualize(ids_of(tokenizer, item["sessions"][0]))
    with torch.no_grad():
        want = plain_nats(model, tokenizer, ids_of(tokenizer, item["question"])[0].tolist(), item["answer"], memory)
    (got,) = [p for p in predictions if (p["method"], p["span"], p["question"])
              == ("adapter", "oracle turn ± 2", item["question"])]
    assert got["nats"] == pytest.approx(want, rel=1e-4)
    for words in ("gap to other contexts", "answer, nats", "F1", "context, tokens"):
        assert words in drawn_texts(tmp_path / "p.svg")


def test_built_in_sample():
    """24 conversations of four sessions; each answer is said exactly once and its question does not give it away. The
    oracle spans are cut round the turn that says it."""
    rows = msc.load()
    whole = {row["id"]: row for row in rows if row["span"] == "conversation"}
    assert len(whole) == 24 and len({s for row in whole.values() for s in row["sessions"]}) == 96
    for row in whole.values():
        assert len(row["sessions"]) == 4
        assert "\n".join(row["sessions"]).lower().count(row["answer"].lower()) == 1
        assert row["answer"].lower() not in row["sessions"][3].lower()
        assert row["answer"].lower() not in row["question"].lower()
    cuts = [row for row in rows if row["span"] != "conversation"]
    assert len(rows) == 4 * 24 and len({(row["id"], row["span"]) for row in cuts}) == 3 * 24
    for row in cuts:
        (text,) = row["sessions"]
        (session,) = [s for s in whole[row["id"]]["sessions"] if text in s]
        turns, all_turns = text.split("\n"), session.split("\n")
        (at,) = [i for i, turn in enumerate(all_turns) if row["answer"].lower() in turn.lower()]
        assert turns == {"oracle turn": all_turns[at:at + 1], "oracle turn ± 2": all_turns[max(0, at - 2):at + 3],
                         "oracle session": all_turns}[row["span"]]


def test_a_conversation_without_another_is_named(tmp_path, base_directory, generator_directory):
    """It keeps its place in the adapter's own row, and leaves the control and the pair."""
    write_rows(tmp_path / "c.jsonl", [
        {"previous_dialogs": [{"dialog": [{"text": s}]} for s in sessions.split()],
         "self_instruct": {"B": "Who?", "A": "Bo"}, "metadata": {"initial_data_id": name}}
        for name, sessions in (("ana", "one two three"), ("bo", "one"), ("cy", "two"), ("di", "three"))])
    result, _ = run(tmp_path, base_directory, "msc", "--data", str(tmp_path / "c.jsonl"), "--checkpoint",
                    generator_directory)
    table = by_method(result)
    assert "shares a part with ana: left out of the control and of the gap" in result["note"]
    assert (table["adapter"]["n"], table["adapter-shuffled"]["n"], table["adapter"]["pairs"]) == (4, 3, 3)
    assert "best-of-3" in table["adapter"]


# ---- document question answering


def test_qa_loaders(tmp_path, squad_file):
    """.jsonl, .parquet and StreamingQA's .csv give the same documents."""
    def plain(documents):
        return [(d["text"], [(q["question"], q["golds"]) for q in d["questions"]]) for d in documents]

    documents = load_qa(squad_file)
    assert plain(documents) == SQUAD
    datasets.load_dataset("json", data_files=squad_file, split="train").to_parquet(tmp_path / "s.parquet")
    assert load_qa(str(tmp_path / "s.parquet")) == documents
    with open(tmp_path / "s.csv", "w", encoding="utf-8-sig", newline="") as file:                # as Excel writes it
        csv.writer(file).writerows([["text", "question", "answers"], *(
            [text, question, "\\".join(golds)] for text, questions in SQUAD for question, golds in questions)])
    assert plain(load_qa(str(tmp_path / "s.csv"), "streamingqa")) == SQUAD


def test_long_articles_in_a_csv(tmp_path):
    # 200,000 characters, beyond the csv module's own limit
    text = "word " * 40_000
    with open(tmp_path / "s.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "question", "answers"], [text, "Which?", "word"]])
    csv.field_size_limit(131_072)
    assert load_qa(str(tmp_path / "s.csv"), "streamingqa")[0]["text"] == text


@pytest.mark.parametrize("name, text, words", [
    ("no.csv", None, "no.csv.*[nN]o such file"),
    ("head.csv", "text,question,answers\n", "head.csv is empty"),
    ("short.csv", "text,question,answers\na,b\n", "row 2: field 'answers'"),
    ("none.csv", "text,question,answers\na,b,\\\n", "row 2: answers holds no text"),
    ("bytes.csv", b"text,question,answers\na,b,\xff\n", "cannot be read"),
    ("a.jsonl", '{"text": "a", "question": "b", "answers": 3}\n', "a.jsonl line 1: field 'answers'"),
    ("blank.csv", "text,question,answers\n ,b,c\n", "empty text")])
def test_streamingqa_refusals(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        load_qa(str(tmp_path / name), "streamingqa")


def test_qa_rows_groups_and_answers(tmp_path, base_directory, squad_file, generator_directory, tokenizer, monkeypatch):
    """Rows and groups of each length, every context read once; an answer of the group of two documents redone."""
    reads, read, prompted, prompts = [], AdaptedLM.read, [], evaluate.in_context_prompts
    monkeypatch.setattr(AdaptedLM, "read", lambda self, ids: reads.append(ids) or read(self, ids))
    monkeypatch.setattr(evaluate, "in_context_prompts", lambda *args: prompted.append(args[2]) or prompts(*args))
    result, predictions = run(tmp_path, base_directory, "squad", "--data", squad_file, "--checkpoint",
                              generator_directory, "--context-lengths", "100", "300", "5000", "--batch-size", "1",
                              "--plot", str(tmp_path / "p.png"))
    rows = [(row["method"], row["context_length"], row["groups"]) for row in result["rows"]]
    counts = {100: 3, 300: 2, 5000: 1}
    assert rows == [("closed-book", 0, 1)] + [(method, k, n) for k, n in counts.items()
                                              for method in ("in-context", "adapter", "adapter-shuffled")
                                              if (method, k) != ("adapter-shuffled", 5000)]
    assert len(reads) == 5 and len(prompted) == 6             # three documents, two of them, all; the third twice
    assert "the only group of 5000 tokens: left out" in result["note"]
    assert "Question: {question}" in result["prompts"]["in-context"]
    for row in result["rows"]:
        assert row["n"] == 6
        assert all(key in row and key + "_stderr" in row for key in (*METRICS, "f1_max", "em_max"))
        assert all(key in row for key in ("inference_tflops", "contextualisation_tflops", "contextualisation_seconds",
                                          "storage_mfloats"))
    model = load_adapted(base_directory, generator_directory)
    texts = ["\n\n".join(text for text, _ in SQUAD[:2]), SQUAD[2][0]]
    for method, text in (("adapter", texts[0]), ("adapter-shuffled", texts[1])):
        want = greedy(model, tokenizer, "Which river?", [model.contextualize(ids_of(tokenizer, text))])
        (got,) = [p for p in predictions
                  if (p["method"], p["question"], p["groups"]) == (method, "Which river?", 2)]
        assert got["prediction"] == want and got["golds"] == ["Öre", "the river Öre"]
        assert got["f1"] == f1_score(want, "Öre")
    memory = model.contextualize(ids_of(tokenizer, SQUAD[2][0]))
    with torch.no_grad():                                            # "wind", the shortest of two golds
        want = plain_nats(model, tokenizer, ids_of(tokenizer, "Who walks?")[0].tolist(), "wind", memory)
    assert [p["nats"] for p in predictions if (p["method"], p["question"], p["groups"]) == ("adapter", "Who walks?", 3)
            ] == [pytest.approx(want, rel=1e-4)]
    assert len({p["key"] for p in predictions}) == len(predictions) == 6 * (1 + 3 + 3 + 2)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_long_groups_are_cut_from_the_left_and_say_so(tmp_path, base_directory):
    rows = [{"context": f"fact {i} " * 700, "question": "Which?", "answers": {"text": ["fact"]}} for i in range(2)]
    write_rows(tmp_path / "long.jsonl", rows)
    flags = ["--data", str(tmp_path / "long.jsonl"), "--checkpoint", "none", "--method", "in-context",
             "--context-lengths", "32768"]
    first, predictions = run(tmp_path, base_directory, "squad", *flags)
    # from the file: the note is the same
    again, _ = run(tmp_path, base_directory, "squad", *flags)
    assert "in-context: 2 of 2 prompts do not fit the base's window" in first["note"]
    assert timeless(again) == timeless(first)
    assert all(p["lost"] > 0 for p in predictions)


# ---- predictions files


def test_killed_run_continues_to_the_same_table(tmp_path, base_directory, squad_file, generator_directory, monkeypatch):
    """Killed inside a batch and inside a line; only what is missing is computed again; the file is only appended to."""
    flags = ["--data", squad_file, "--checkpoint", generator_directory, "--context-lengths", "100", "300",
             "--batch-size", "2"]
    whole, _ = run(tmp_path, base_directory, "squad", *flags)
    lines = (tmp_path / "out.jsonl").read_bytes()
    again, _ = run(tmp_path, base_directory, "squad", *flags)
    assert timeless(again) == timeless(whole) and (tmp_path / "out.jsonl").read_bytes() == lines
    cut = lines[:len(lines) * 2 // 5]
    (tmp_path / "out.jsonl").write_bytes(cut)
    calls, answer = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *args, **kwargs: calls.append(args[3]) or answer(*args, **kwargs))
    resumed, predictions = run(tmp_path, base_directory, "squad", *flags)
    after = (tmp_path / "out.jsonl").read_bytes()
    assert timeless(resumed) == timeless(whole) and after.startswith(cut[:cut.rindex(b"\n") + 1])

    def answers(text):
        return {record["key"]: record["prediction"] for record in map(json.loads, text.splitlines())}

    assert answers(after) == answers(lines) and 0 < sum(map(len, calls)) < len(predictions)
    calls.clear()
    # another command shares nothing but the file
    _, more = run(tmp_path, base_directory, "squad", *flags, "--limit", "2")
    assert calls and len(more) > len(predictions) and (tmp_path / "out.jsonl").read_bytes().startswith(after)
    calls.clear()
    # no generator has a part in it
    run(tmp_path, base_directory, "squad", *flags[:2], *flags[4:], "--checkpoint", "none", "--method", "closed-book")
    assert not calls


@pytest.mark.parametrize("content", ['{"a": 1}\n', "notes of mine", "[1]\n", '"key"\n', '{"key": "x"}\nnotes\n',
                                     b"\xff\xfe\n"])
def test_foreign_predictions_file_is_refused(tmp_path, base_directory, squad_file, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(InputError, match="mine.jsonl line . is not a prediction"):
        evaluate.main(["--task", "squad", "--base", base_directory, "--data", squad_file, "--predictions", str(path)])
    assert path.read_bytes() == before


# ---- MetaICL


def test_metaicl_loader(metaicl_directory):
    classification, other = metaicl.KINDS.values()
    assert len(set(classification)) == 16 and len(set(other)) == 10 and not set(classification) & set(other)
    tasks = load_metaicl(metaicl_directory)
    assert list(tasks) == ["poem_sentiment", "quarel", "superglue-copa"]
    assert tasks["quarel"]["test"][1] == {"number": 1, "id": "quarel 1",
                                          "question": "Input: quarel test 100 1 é\nOutput:", "golds": ["yes"]}
    assert len(tasks["quarel"]["test"]) == 3
    training, dev = tasks["superglue-copa"][21]
    assert len(training) == len(dev) == 16
    assert training[0]["question"] == "Input: superglue-copa train 21 0 é\nOutput:" and dev[15]["golds"] == ["yes"]


def test_metaicl_refusals(tmp_path, metaicl_directory):
    for seeds, shots, directory, words in (
            ([100], 17, metaicl_directory, "16 training examples, fewer than --shots 17"),
            ([100], 1, tmp_path, "none of MetaICL's 26"),
            ([99], 1, metaicl_directory, "poem_sentiment_16_99_train.jsonl: no such file")):
        with pytest.raises(InputError, match=words):
            load_metaicl(directory, seeds, shots)


def test_metaicl_from_the_hub(tmp_path, metaicl_directory, monkeypatch):
    """A hub id is asked for the files of the test tasks alone, and read as a directory."""
    asked = []
    monkeypatch.setattr(metaicl, "hub_reachable", lambda: True)
    monkeypatch.setattr(metaicl.huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.append((name, options)) or str(tmp_path))
    shutil.copytree(metaicl_directory, tmp_path / "data")
    tasks = load_metaicl("allenai/metaicl-data", [100, 13])
    assert tasks == load_metaicl(metaicl_directory, [100, 13])
    (name, options), = asked
    assert name == "allenai/metaicl-data" and options["repo_type"] == "dataset"
    assert len(options["allow_patterns"]) == 26 and "data/quarel/quarel_16_*.jsonl" in options["allow_patterns"]
    monkeypatch.setattr(metaicl.huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(InputError, match="no/where: no such directory, and not to be had"):
        load_metaicl("no/where", [100], 1)


def test_metaicl_rows_answers_and_resumption(tmp_path, base_directory, metaicl_directory, generator_directory,
                                             tokenizer):
    flags = ["--data", str(metaicl_directory), "--checkpoint", generator_directory, "--shots", "1", "2", "--demo-seeds",
             "100", "13", "--limit", "2", "--controls", "2"]
    for method in (*metaicl.METHODS, "fine-tuned"):
        flags += ["--method", method]
    result, predictions = run(tmp_path, base_directory, "metaicl", *flags, "--plot", str(tmp_path / "p.png"))
    table = {(row["method"], row["task"], row["shots"]): row for row in result["rows"]}
    tasks = ("poem_sentiment", "quarel", "superglue-copa")
    shots = {"zero-shot": [0], "fine-tuned": [0],
             **dict.fromkeys(("few-shot", "few-shot-bare", "adapter", "adapter-shuffled"), [1, 2])}
    assert set(table) == {(method, task, k) for method in shots for k in shots[method]
                          for task in (*tasks, "classification", "non-classification", "all")}
    for (method, task, k), row in table.items():
        assert 0 <= row["accuracy"] <= 100 and "accuracy_stderr" in row
        assert "inference_tflops" in row and "storage_mfloats" in row
        assert ("contextualisation_tflops" in row) == ("contextualisation_seconds" in row) == (method != "fine-tuned")
        own = {"classification": tasks[:1], "non-classification": tasks[1:], "all": tasks}.get(task)
        if own:
            assert row["accuracy"] == pytest.approx(sum(table[method, t, k]["accuracy"] for t in own) / len(own))
    assert "glue-rte" in result["note"] and "3 of MetaICL's 26" in result["note"]
    assert len(predictions) == 3 * 2 * (1 + 2 + 4 * 4)
    # answers by hand, of the second demonstration seed; the base is itself again after fine-tuning
    model = load_adapted(base_directory, generator_directory)
    drawn = random.Random(0).sample(range(16), 16)[:2]
    context = "\n\n".join(f"Input: quarel train 13 {i} é\nOutput: {'yes' if i % 2 else 'no'}" for i in drawn)
    question = "Input: quarel test 100 1 é\nOutput:"
    found = {}
    for p in predictions:
        found.setdefault((p["method"], p["task"], p["shots"]), []).append(p)
    for method, prompt, memory in (("few-shot", FEW_SHOT_PROMPT.format(context=context, question=question), ()),
                                   ("few-shot-bare", f"{context}\n\n{question}", ()),
                                   ("adapter", question, [model.contextualize(ids_of(tokenizer, context))])):
        got = [p for p in found[method, "quarel", 2] if p["question"] == question]
        assert len(got) == 2 and got[1]["prediction"] == greedy(model, tokenizer, prompt, memory, 10)
    # the gap's error is clustered by demonstrations
    own, other = found["adapter", "quarel", 2], found["adapter-shuffled", "quarel", 2]
    gaps = [sum(o["control_nats"]) / 2 - p["nats"] for p, o in zip(own, other)]
    assert [p["cluster"] for p in own] == [100, 100, 13, 13] and [p["id"] for p in own] == [p["id"] for p in other]
    row, each = table["adapter", "quarel", 2], [table["adapter", name, 2] for name in tasks]
    assert (row["gap"], row["gap_stderr"]) == pytest.approx(mean_and_stderr(gaps, [100, 100, 13, 13])) and row["n"] == 2
    assert table["adapter", "all", 2]["gap"] == pytest.approx(sum(r["gap"] for r in each) / 3)
    assert table["adapter", "all", 2]["gap_stderr"] == pytest.approx(sum(r["gap_stderr"]**2 for r in each) ** 0.5 / 3)
    bare = {p["number"]: p["nats"] for p in found["zero-shot", "quarel", 0]}
    assert row["gain"] == pytest.approx(sum(bare[p["number"]] - p["nats"] for p in own) / 4)
    # another task's demonstrations of the same seed
    other_context = "\n\n".join(f"Input: poem_sentiment train 13 {i} é\nOutput: {'yes' if i % 2 else 'no'}"
                                for i in drawn)
    memory = model.contextualize(ids_of(tokenizer, other_context))
    with torch.no_grad():
        want = plain_nats(model, tokenizer, ids_of(tokenizer, other[2]["question"])[0].tolist(), other[2]["gold"], memory)
    assert any(nats == pytest.approx(want, rel=1e-4) for nats in other[2]["control_nats"])
    lines = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(lines[:len(lines) // 2])
    again, _ = run(tmp_path, base_directory, "metaicl", *flags)
    assert timeless(again) == timeless(result)


def test_one_metaicl_task_has_no_control(tmp_path, base_directory, metaicl_directory):
    shutil.copytree(metaicl_directory / "quarel", tmp_path / "one" / "quarel")
    one, _ = run(tmp_path, base_directory, "metaicl", "--data", str(tmp_path / "one"), "--checkpoint", "none",
                 "--limit", "1", "--shots", "1", "--demo-seeds", "100", "--method", "zero-shot", "--method",
                 "adapter-shuffled")
    assert "no other context but shares a part with quarel" in one["note"] and {row["method"] for row in one["rows"]} == {"zero-shot"}


# ---- perplexity


@pytest.mark.parametrize("L, chunk, flags", [(1024, 1024, []), (40, 16, ["--context-lengths", "40"])])
def test_ppl_against_plain_cross_entropy(tmp_path, base_directory, L, chunk, flags):
    """Documents of 2 L tokens or more; the adapter's context is streamed in the chunks of its config, evenly split."""
    base, tokenizer = load_base(base_directory, torch.float32, "cpu")
    model = make_model(base=base, chunk=chunk)
    model.save_pretrained(tmp_path / "generator")
    texts = [("%d rivers " % i) * 240 for i in range(3)]
    write_rows(tmp_path / "d.jsonl", [{"text": text} for text in ("too short", *texts)])
    flags = ["--data", str(tmp_path / "d.jsonl"), "--checkpoint", str(tmp_path / "generator"), *flags]
    result, _ = run(tmp_path, base_directory, "ppl", *flags)
    rows = by_method(result)

    def nats(logits, target):
        return F.cross_entropy(logits[0, -target.shape[1]:-1], target[0, 1:]).item()

    want = {m: ([], []) for m in ("closed-book", "in-context", "adapter")}
    with torch.no_grad():
        for text in texts:
            ids = ids_of(tokenizer, text)
            context, target = ids[:, :L], ids[:, L:2 * L]
            memory = streamed(model, tokenizer, text[:L - 1], chunk)                        # <s> and L - 1 bytes
            for k, piece in enumerate((context, target)):
                want["closed-book"][k].append(nats(base(piece).logits, piece))
                want["in-context"][k].append(nats(base(torch.cat([context, piece], 1)).logits, piece))
                want["adapter"][k].append(nats(model(piece, memory=memory), piece))
    for method, (reconstruction, completion) in want.items():
        assert len(reconstruction) == len(completion) == rows[method]["n"] == 3
        for key, values in (("ppl_reconstruction", reconstruction), ("ppl_completion", completion)):
            mean, error = mean_and_stderr(values)
            assert rows[method][key] == pytest.approx(math.exp(mean), rel=1e-4)
            assert rows[method][key + "_stderr"] == pytest.approx(math.exp(mean) * error, rel=1e-2)
    assert rows["adapter-shuffled"]["ppl_reconstruction"] != pytest.approx(rows["adapter"]["ppl_reconstruction"],
                                                                           rel=1e-3)
    with pytest.raises(InputError, match="--context-lengths 9000"):
        evaluate.main(["--task", "ppl", "--base", base_directory, *flags[:4], "--context-lengths", "9000"])


def test_ppl_of_several_lengths(tmp_path, base_directory, generator_directory):
    """The longest decides which documents count, so that answers of another choice are not reused."""
    write_rows(tmp_path / "d.jsonl", [{"text": text * 60} for text in ("short ", "%d rivers ", "a stone ", "a lamp ")])
    flags = ["--data", str(tmp_path / "d.jsonl"), "--checkpoint", generator_directory, "--method", "closed-book",
             "--method", "adapter", "--context-lengths", "40"]
    once, _ = run(tmp_path, base_directory, "ppl", *flags)
    result, _ = run(tmp_path, base_directory, "ppl", *flags, "200", "--plot", str(tmp_path / "p.svg"))
    assert [(row["method"], row["context_length"], row["n"]) for row in result["rows"]] == [
        ("closed-book", 40, 3), ("adapter", 40, 3), ("closed-book", 200, 3), ("adapter", 200, 3)]
    assert once["n"] == 4 and once["rows"][0]["ppl_completion"] != result["rows"][0]["ppl_completion"]


# ---- other systems' rows, figures


# ---- the reader's own text


def test_ask(tmp_path, base_directory, capsys, monkeypatch):
    """Two calls with a memory file equal one that streams both texts; the answers are those of the model; questions may
    be typed in."""
    base, tokenizer = load_base(base_directory, torch.float32, "cpu")
    model = make_model(base=base)
    model.save_pretrained(tmp_path / "generator")
    (tmp_path / "a.txt").write_text("Ana keeps bees. " * 90)                     # 1,440 bytes: two chunks
    (tmp_path / "b.txt").write_text("Bo sold twelve jars, à Nîmes.")
    common = ["--task", "ask", "--base", base_directory, "--device", "cpu", "--dtype", "float32", "--checkpoint",
              str(tmp_path / "generator")]
    memory = str(tmp_path / "ana.safetensors")
    evaluate.main([*common, "--context", str(tmp_path / "a.txt"), "--memory", memory, "--question", "Who?",
                   "--compare"])
    first = capsys.readouterr().out
    assert "1441 tokens read" in first
    assert all(f"\n{name}: " in first for name in ("adapter", "closed-book", "in-context"))
    evaluate.main([*common, "--context", str(tmp_path / "b.txt"), "--memory", memory, "--question", "Who?",
                   "--question", "Where?", "--export", str(tmp_path / "lora")])
    out = capsys.readouterr().out.split("\n")
    want = streamed(model, tokenizer, (tmp_path / "a.txt").read_text(encoding="utf-8"), 1024)
    want = model.contextualize(ids_of(tokenizer, (tmp_path / "b.txt").read_text(encoding="utf-8")), memory=want)
    kept = Memory.load(memory)
    for name, S in want.states.items():
        torch.testing.assert_close(kept.states[name], S, rtol=1e-4, atol=1e-4 * S.abs().max().item())
    assert out[-3:-1] == [greedy(model, tokenizer, question, [kept], 60) for question in ("Who?", "Where?")]
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    typed = iter(["Who?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    evaluate.main([*common, "--memory", memory])
    assert capsys.readouterr().out.split("\n")[-2] == out[-3]


def test_ask_refusals(tmp_path, base_directory):
    """One sentence each, and the memory stays what it was."""
    base, _ = load_base(base_directory, torch.float32, "cpu")
    for seed in (0, 1):
        make_model(base=base, seed=seed).save_pretrained(tmp_path / f"g{seed}")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "a.txt").write_text("text")
    start = ["--task", "ask", "--base", base_directory, "--device", "cpu", "--question", "q"]
    memory, text = tmp_path / "m.safetensors", ["--context", str(tmp_path / "a.txt")]
    evaluate.main([*start, "--checkpoint", str(tmp_path / "g0"), *text, "--memory", str(memory)])
    before = memory.read_bytes()
    for flags, words in ((["--checkpoint", str(tmp_path / "g1"), "--memory", str(memory), *text],
                          "written by another generator"), ([], "nothing to read"),
                         (["--memory", str(tmp_path / "no")], "nothing to read"),
                         (["--context", str(tmp_path / "empty.txt")], "is empty"),
                         (["--context", str(tmp_path / "latin.txt")], "UTF-8"),
                         (["--context", str(tmp_path / "no.txt")], "no.txt"),
                         ([*text, "--export", str(tmp_path)], "exists already"),
                         ([*text, "--memory", str(tmp_path)], "--memory"),
                         ([*text, "--memory", text[1]], "different files"),
                         ([*text, "--task", "msc"], "belongs to --task ask"),
                         ([*text, "--output", str(tmp_path / "o.json")], "--output belongs to the other tasks")):
        with pytest.raises(InputError, match=words):
            evaluate.main([*start, *flags])
    assert memory.read_bytes() == before


# ---- the command line, and the shipped generator


@pytest.mark.parametrize("flags, words", [
    (["--task", "msc", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--task", "msc", "--data", msc.SAMPLE, "--base", "missing.gguf"], "missing.gguf: no such file"),
    (["--task", "msc", "--data", msc.SAMPLE, "--checkpoint", "missing"], "missing: no such directory"),
    (["--task", "msc", "--method", "magic"], "--method magic"),
    (["--task", "msc", "--output", "tests"], "--output tests cannot be written"),
    (["--task", "msc", "--predictions", "no/such/dir.jsonl"], "cannot be written"),
    (["--task", "msc", "--limit", "0"], "--limit"),
    (["--task", "msc", "--data", "x.jsonl", "--predictions", "./x.jsonl"], "different files"),
    (["--task", "ppl"], "SlimPajama-627B.*cannot be read"),
    (["--task", "msc", "--context-lengths", "512"], "--context-lengths belongs to --task squad"),
    (["--task", "squad", "--shots", "4"], "--shots belongs to --task metaicl"),
    (["--task", "ppl", "--data", "x.jsonl", "--limit", "1"], "--limit of --task ppl must be at least 2"),
    (["--task", "streamingqa"], "streamingqa has no data set on the hub"),
    (["--task", "msc", "--data", "no/hub-id"], "no/hub-id.*cannot be read")])
def test_refusals(base_directory, flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(["--base", base_directory, *flags])
    assert "\n" not in str(caught.value)


def test_exit_codes(tmp_path):
    process = start(["evaluate.py", "--task", "msc", "--data", str(tmp_path / "no.jsonl")], tmp_path / "printed")
    assert finish(process) == [2]
    printed = (tmp_path / "printed").read_text()
    assert "no.jsonl: no such file" in printed and "Traceback" not in printed


def test_commands_of_the_documentation_parse(tmp_path, monkeypatch):
    """Every command of README, of docs/evaluation.md and of evaluate.py's own help; README and docs/evaluation.md have
    the block for a GPU and the hub."""
    readme, docs = (open(os.path.join(ROOT, path), encoding="utf-8").read() for path in ("README.md",
                                                                                         "docs/evaluation.md"))
    for text in (readme, docs):
        block = text[text.index("hf auth login"):]
        C = re.search(r"^C=(\S+)", block, re.M)[1]
        assert all(f"--task {task} --checkpoint $C" in block for task in ("msc", "squad")) and "/" in C
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ *python evaluate.py (.*)", readme + docs + evaluate.__doc__, re.M)
    assert len(commands) > 20
    for command in commands:
        evaluate.arguments(shlex.split(command.replace("$C", C), comments=True))


@torch.no_grad()
def test_the_shipped_generator_remembers():
    """The default generator is the shipped one. Turns of the built-in conversations cost far fewer nats a token under
    their own adapter than without one, and more under the adapter of another turn."""
    model, tokenizer = evaluate.load_model(evaluate.arguments(["--task", "msc", "--device", "cpu"]))
    turns = [text for row in msc.load()[-4:] for session in row["sessions"][:1] for text in session.split("\n")
             if len(text) > 60][:8]
    ids = [tokenizer(text)["input_ids"][:48] for text in turns]
    memories = [model.read(context) for context in ids]

    def nats(i, memory):
        target = torch.tensor([ids[i]])
        return F.cross_entropy(model(target, memory=memory)[0, :-1].float(), target[0, 1:]).item()

    own, none, other = ([nats(i, memory) for i, memory in enumerate(memories)]
                        for memories in (memories, [None] * len(ids), memories[1:] + memories[:1]))
    assert len(ids) == 8 and sum(o < n for o, n in zip(own, none)) >= 7
    assert sum(own) / 8 < sum(none) / 8 - 1 and sum(own) / 8 < sum(other) / 8 - 1
