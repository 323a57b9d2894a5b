"""Metrics against the authors' values, cost against torch's FLOP counter, whole runs on a tiny base, refusals."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from conftest import ROOT, make_base, make_model
from data import IN_CONTEXT_PROMPT, MSC_SAMPLE, in_context_prompts, load_msc
from evaluate import exact_match, f1_score, mean_and_stderr, normalize_answer, normalize_text, recall, rouge_l_recall
from generator import InputError
from model import AdaptedLM, load_base

GOLDEN = json.load(open(os.path.join(os.path.dirname(__file__), "golden", "text_golden.json"), encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda c: c["prediction"] or "empty")
def test_metrics_equal_the_authors(case):
    prediction, gold = case["prediction"], case["gold"]
    assert [normalize_answer(prediction), normalize_answer(gold)] == case["normalize_answer"]
    assert [normalize_text(prediction), normalize_text(gold)] == case["normalize_text"]
    if all(case["normalize_text"]):               # an empty side scores 0 there, also where both are empty; SQuAD's em would be 1
        assert exact_match(prediction, gold) == case["em"]
    assert f1_score(prediction, gold) == pytest.approx(case["f1"])
    assert rouge_l_recall(prediction, gold) == pytest.approx(case["rougeL_recall"])


def test_recall():
    for prediction, gold, want in (("It was the Blue Boat, I think", "a blue boat", 1), ("bluebird", "blue", 0), ("blue big boat", "blue boat", 0), ("", "x", 0), ("the", "a", 0),
                                   ("in 1999.", "1999", 1)):
        assert recall(prediction, gold) == want


def test_standard_error():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    t = torch.tensor(values, dtype=torch.float64)
    mean, error = mean_and_stderr(values)
    assert mean == pytest.approx(t.mean().item()) and error == pytest.approx(t.std().item() / math.sqrt(5))
    assert mean_and_stderr([3.0]) == (3.0, None)


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
    assert abs(counter.get_total_flops() - evaluate.base_flops(base, 6, past=5)) <= 2 * rotary


def test_generator_flops_against_the_counter():
    model = make_model(targets=["o_proj", "down_proj"])
    g = model.generator
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for layer in g.layers:
            layer.adapter(sum(layer.update(torch.randn(20, 64)) for _ in range(3)))
            layer.adapter(torch.randn(24, 24))
            layer.adapter(torch.randn(24, 24))
    small = 3 * len(g.layers) * 2 * 24 * 8 * 8    # Q times the (r, r) factor of the small SVD, inside norm
    assert counter.get_total_flops() == evaluate.generator_flops(model, 60, 3) + small


def test_storage():
    model = make_model(targets=["o_proj", "down_proj"])
    pairs = model.lora(model.contextualize(torch.randint(0, 256, (1, 9))))
    assert evaluate.adapter_floats(model) == sum(A.numel() + B.numel() for A, B in pairs.values())
    cache = model.base(torch.randint(0, 256, (1, 9)), use_cache=True).past_key_values
    assert evaluate.kv_cache_floats(model.base, 9) == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_the_control_reads_another_conversation():
    keys = [{"a", "b"}, {"b", "c"}, {"d"}, {"a"}, {"e"}]
    others = evaluate.other_contexts(keys, seed=0)
    assert all(not keys[i] & keys[j] for i, j in enumerate(others))
    assert others == evaluate.other_contexts(keys, seed=0)
    assert evaluate.other_contexts([{"a"}, {"a"}], 0) == [None, None]


def run(tmp_path, base, task, *flags):
    evaluate.main(["--task", task, "--base", base, "--device", "cpu", "--output", str(tmp_path / "out.json"), "--predictions", str(tmp_path / "out.jsonl"), *flags])
    return json.load(open(tmp_path / "out.json")), [json.loads(line) for line in open(tmp_path / "out.jsonl")]


METRICS = ("f1", "em", "recall", "rougeL_recall")


def test_msc_untrained_adapter_is_closed_book(tmp_path, base_directory, capsys):
    result, predictions = run(tmp_path, base_directory, "msc", "--data", MSC_SAMPLE, "--checkpoint", "none", "--limit", "3", "--batch-size", "2")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["closed-book", "full-conversation", "adapter", "adapter-shuffled"]
    answers = {m: [p["prediction"] for p in predictions if p["method"] == m] for m in rows}
    assert answers["adapter"] == answers["adapter-shuffled"] == answers["closed-book"] != answers["full-conversation"]
    for row in rows.values():
        assert set(METRICS) <= set(row) and all(m + "_stderr" in row for m in METRICS) and row["n"] == 3
    assert rows["adapter"]["inference_tflops"] == rows["closed-book"]["inference_tflops"] < rows["full-conversation"]["inference_tflops"]
    assert (result["task"], result["n"], result["seed"], result["checkpoint"], result["base"]) == ("msc", 3, 0, "none", base_directory)
    assert set(result["versions"]) == {"python", "torch", "transformers"} and "Question: {question}" in result["prompts"]["full-conversation"]
    out = capsys.readouterr().out
    assert "| adapter-shuffled |" in out and "untrained" in out


def test_msc_scores_follow_from_the_predictions(tmp_path, base_directory):
    """A trained-looking generator; each row of the table recomputed from the JSONL, each answer from the model."""
    base, tokenizer = load_base(base_directory, device="cpu")
    make_model(base=base).save_pretrained(tmp_path / "generator")
    result, predictions = run(tmp_path, base_directory, "msc", "--data", MSC_SAMPLE, "--checkpoint", str(tmp_path / "generator"), "--limit", "2", "--method", "adapter",
                              "--method", "adapter-shuffled")
    for row in result["rows"]:
        mine = [p for p in predictions if p["method"] == row["method"]]
        assert row["f1"] == pytest.approx(100 * sum(f1_score(p["prediction"], p["gold"]) for p in mine) / 2)
    model, item = AdaptedLM.from_pretrained(base, tmp_path / "generator"), load_msc()[1]
    ids, memory = [257] + list(tokenizer("\n\n".join(item["sessions"]))["input_ids"]), None
    n = -(-len(ids) // 1024)
    size = -(-len(ids) // n)
    for at in range(0, len(ids), size):
        memory = model.contextualize(torch.tensor([ids[at:at + size]]), memory=memory)
    prompt = torch.tensor([[257] + list(tokenizer(item["question"])["input_ids"])])
    out = model.generate(prompt, memory, max_new_tokens=20, do_sample=False)[0, prompt.shape[1]:]
    assert predictions[1]["prediction"] == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
    assert predictions[1]["prediction"] != predictions[3]["prediction"]


def test_long_context_loses_its_beginning(tokenizer):
    context, window = "alpha " * 200 + "omega", 400
    (ids, longer), lost = in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, context, ["Which?", "Which one?"], window)
    prompt = tokenizer.decode(ids)
    assert len(ids) < len(longer) == window and lost == len(tokenizer(IN_CONTEXT_PROMPT.format(context=context, question="Which one?"))["input_ids"]) + 1 - window
    assert "omega\n\nInstruction: Answer" in prompt and prompt.endswith("Question: Which?\n\nAnswer:")
    with pytest.raises(InputError, match="window"):
        in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, "x", ["q" * 500], window)


def test_ppl_against_plain_cross_entropy(tmp_path, base_directory, text_file):
    base, tokenizer = load_base(base_directory, device="cpu")
    model = make_model(base=base)
    model.save_pretrained(tmp_path / "generator")
    texts = [("%d " % i) * 900 for i in range(3)] + ["short text " * 60]                     # the last has no completion
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    result, _ = run(tmp_path, base_directory, "ppl", "--data", str(tmp_path / "d.jsonl"), "--checkpoint", str(tmp_path / "generator"))
    rows = {row["method"]: row for row in result["rows"]}
    documents = [torch.tensor([257] + list(tokenizer(t)["input_ids"]))[None, :2048] for t in texts]

    def nats(logits, target):
        return F.cross_entropy(logits[0, -target.shape[1]:-1], target[0, 1:]).item()

    want = {m: ([], []) for m in ("closed-book", "in-context", "adapter")}
    with torch.no_grad():
        for ids in documents:
            context, target = ids[:, :1024], ids[:, 1024:]
            memory = model.contextualize(context)
            for k, piece in enumerate((context, target)):
                if piece.shape[1]:
                    want["closed-book"][k].append(nats(base(piece).logits, piece))
                    want["in-context"][k].append(nats(base(torch.cat([context, piece], 1)).logits, piece))
                    want["adapter"][k].append(nats(model(piece, memory=memory), piece))
    for method, (reconstruction, completion) in want.items():
        assert len(reconstruction) == 4 and len(completion) == 3
        for key, values in (("ppl_reconstruction", reconstruction), ("ppl_completion", completion)):
            mean, error = mean_and_stderr(values)
            assert rows[method][key] == pytest.approx(math.exp(mean), rel=1e-3) and rows[method][key + "_stderr"] == pytest.approx(math.exp(mean) * error, rel=1e-2)
    assert rows["adapter-shuffled"]["ppl_reconstruction"] != pytest.approx(rows["adapter"]["ppl_reconstruction"], rel=1e-3)


@pytest.mark.parametrize("flags, words", [
    (["--task", "msc", "--data", "missing.jsonl"], "missing.jsonl: no such file"), (["--task", "msc", "--data", MSC_SAMPLE, "--base", "missing.gguf"], "missing.gguf: no such file"),
    (["--task", "msc", "--data", MSC_SAMPLE, "--checkpoint", "missing"], "missing: no such directory"), (["--task", "msc", "--method", "magic"], "--method magic"),
    (["--task", "msc", "--output", "tests"], "tests cannot be written"), (["--task", "msc", "--predictions", "no/such/dir.jsonl"], "cannot be written"),
    (["--task", "msc", "--limit", "0"], "--limit"), (["--task", "msc", "--data", "x.jsonl", "--predictions", "./x.jsonl"], "different files"), (["--task", "ppl"], "SlimPajama-627B.*cannot be read"), (["--task", "msc", "--data", "no/hub-id"], "no/hub-id.*cannot be read")])
def test_refusals(base_directory, flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")                    # nothing listens there: the hub is out of reach
    evaluate.hub_reachable.cache_clear()
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(["--base", base_directory, *flags])
    assert "\n" not in str(caught.value)


def test_exit_codes(tmp_path):
    for flags, words in ((["--task", "dance"], "invalid choice: 'dance'"), (["--task", "msc", "--data", str(tmp_path / "no.jsonl")], "no.jsonl: no such file")):
        done = subprocess.run([sys.executable, "evaluate.py", *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
