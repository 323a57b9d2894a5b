"""The paper's evaluation (§4, §5): one table, one JSON, one plot, each method beside its controls.

    python evaluate.py --task msc                          # Table 1: memory of conversations; default base, built-in sample
    python evaluate.py --task squad --limit 20 --context-lengths 512 1024 2048 --plot squad.png     # Fig. 2, 3, Table 5
    python evaluate.py --task streamingqa --data streamingqa.csv --base out/sft --method closed-book   # a baseline
    python evaluate.py --task metaicl --data metaicl --predictions metaicl.jsonl    # Fig. 4; after a kill: continues
    python evaluate.py --task ppl --data validation.parquet --checkpoint out/a/step-000280         # Table 2
    python evaluate.py --task ask --context notes.txt --question "Who owns the boat?" --compare    # your own text

Methods: closed-book (bare question), full-conversation / in-context / few-shot (context in the prompt), adapter (bare
question, context in the weights) and adapter-shuffled, the control: the adapters of OTHER contexts. What a generator
remembers is the gap between the last two, in answer nats: one that has only learnt an answer style has none.
"""

import argparse
import collections
import functools
import hashlib
import itertools
import json
import os
import platform
import random
import re
import statistics
import string
import time
import types

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from data import (context_ids, conversation, demonstration, hub_reachable, open_predictions, read_rows, run_command,
                  stamps, tokenize, user_turn)
from generator import GeneratorConfig, InputError
from model import DEFAULT_BASE, AdaptedLM, checkpoint_base, load_base, locate_checkpoint
from support.answers import answer, answer_nats, encode
from support.ask import ask, check_flags
from support.benchmarks import (IN_CONTEXT_PROMPT, METAICL_CLASSIFICATION, METAICL_OTHER, METAICL_PROMPT, METAICL_SEEDS,
                                MSC_HUB_ID, MSC_SAMPLE, first_ids, in_context_prompts, load_metaicl, load_msc, load_qa)
from support.costs import adapter_floats, base_flops, clock, context_flops, kv_cache_floats
from support.finetune import fit_base
from support.plots import COSTS, plot

QA_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
PPL_TOKENS = 1024         # of a context, and of the text that follows it
NEW_TOKENS = 20           # greedy, cut at the first newline; MetaICL 10
PAIR_FLOATS = 1e9         # of the LoRA pairs of contexts that are kept for later questions
KV_FLOATS = 4e9           # of the copies of a KV cache that stand in memory at once
DEFAULT_CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "smollm2-135m")
QA_METHODS = ["closed-book", "in-context", "adapter", "adapter-shuffled"]
METHODS = {"msc": ["closed-book", "full-conversation", "adapter", "adapter-shuffled"],
           "squad": QA_METHODS, "streamingqa": QA_METHODS, "ppl": QA_METHODS,
           "metaicl": ["zero-shot", "few-shot", "fine-tuned", "adapter", "adapter-shuffled"]}
IN_CONTEXT = ("in-context", "full-conversation", "few-shot")
METRICS = ("f1", "em", "f1_max", "em_max", "recall", "rougeL_recall", "accuracy")
HUB_IDS = {"msc": MSC_HUB_ID, "squad": "rajpurkar/squad", "ppl": "cerebras/SlimPajama-627B"}


# --------------------------------------------------------------------------------------------------------------------
# metrics, 0 to 1; and nats


def normalize_text(text):
    """Lower case, no ASCII punctuation, single spaces."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def normalize_answer(text):
    """SQuAD's normalisation: normalize_text without the articles."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", normalize_text(text)).split())


def f1_score(prediction, gold):
    """SQuAD F1 over normalised words; 0 where they share none, also when both are empty."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


def exact_match(prediction, gold):
    return float(normalize_answer(prediction) == normalize_answer(gold))


def recall(prediction, gold):
    """Does the answer contain the gold, word for word after SQuAD's normalisation? An answer that lists games it."""
    words = f" {normalize_answer(gold)} "
    return float(bool(words.strip()) and words in f" {normalize_answer(prediction)} ")


def rouge_l_recall(prediction, gold):
    """Longest common subsequence of words over the distinct words of the gold, as the package the authors used counts;
    0 if a side is empty."""
    predicted, wanted = normalize_text(prediction).split(), normalize_text(gold).split()
    if not predicted or not wanted:
        return 0.0
    above = [()] * (len(wanted) + 1)           # the longest common subsequence of the words so far, by part of the gold
    for word in predicted:
        row = [()]
        for j, w in enumerate(wanted):
            longer = above[j + 1] if len(above[j + 1]) > len(row[j]) else row[j]
            row.append(above[j] + (w,) if w == word else longer)
        above = row
    return len(set(above[-1])) / len(set(wanted))


def qa_scores(prediction, golds):
    """Against the shortest gold, as the authors score (f1, em, rougeL_recall); the best over the golds, as SQuAD does
    (_max); recall of any."""
    gold = min(golds, key=len)
    return {"f1": f1_score(prediction, gold), "em": exact_match(prediction, gold),
            "f1_max": max(f1_score(prediction, g) for g in golds), "em_max": max(exact_match(prediction, g) for g in golds),
            "recall": max(recall(prediction, g) for g in golds), "rougeL_recall": rouge_l_recall(prediction, gold)}


def icl_scores(prediction, golds):
    """Exact match but for case, of a prediction without the "Output:" it may repeat, as the authors count."""
    return {"accuracy": float(prediction.replace("Output:", "").strip().lower() == golds[0].strip().lower())}


def mean_and_stderr(values, clusters=None):
    """(mean, standard error) of a list. Values with one label in clusters may depend on each other: the error is that
    of their sums; without labels each stands alone. The error of fewer than two clusters is None."""
    mean, sums = statistics.fmean(values), collections.defaultdict(float)
    for value, label in zip(values, clusters or range(len(values))):
        sums[label] += value - mean
    G = len(sums)
    return mean, (G / (G - 1) * sum(s * s for s in sums.values())) ** 0.5 / len(values) if G > 1 else None


def memory_gap(own, controls):
    """What an adapter knows of ITS context, from the records of adapter and adapter-shuffled, paired by question:
    gap: nats of the gold under the others (their mean) minus under its own, standard error clustered by context;
    best-of-K+1: share of questions whose own memory gives the fewest nats (ties are shared), and chance, 100 / (K+1)."""
    mine = {(record["cluster"], record["number"]): record["nats"] for record in own}
    pairs = [(mine[key], record["control_nats"], record["cluster"]) for record in controls
             if mine.get(key := (record["cluster"], record["number"])) is not None]
    if not pairs:
        return {}
    K, labels = len(pairs[0][1]), [label for _, _, label in pairs]
    gap, error = mean_and_stderr([statistics.fmean(others) - nats for nats, others, _ in pairs], labels)
    first = [(nats <= min(others)) / (1 + others.count(nats)) for nats, others, _ in pairs]
    best, best_error = mean_and_stderr(first, labels)
    name = f"best-of-{K + 1}"
    return {"gap": gap, "gap_stderr": error, name: 100 * best, "chance": 100 / (K + 1),
            name + "_stderr": None if best_error is None else 100 * best_error,
            **({"pairs": len(pairs)} if len(pairs) < len(own) else {})}


# --------------------------------------------------------------------------------------------------------------------
# contexts: which is whose control, and what each method makes of them


def control_contexts(keys, seed, count, first=None):
    """For each item the indices of `count` others that share no part of its context, drawn at random, the same number
    for all: fewer where some item has fewer, an empty list where there is none. keys: a set an item. The first `first`
    are drawn before the rest: those are read anyway."""
    draw, order, others = random.Random(seed), list(range(len(keys))), []
    for own in keys:
        draw.shuffle(order)
        near = sorted(order, key=lambda j: first is not None and j >= first)
        others.append(list(itertools.islice((j for j in near if not own & keys[j]), count)))
    count = min((len(some) for some in others if some), default=0)
    return [some[:count] for some in others]


def other_contexts(keys, seed):
    """The first of control_contexts, or None."""
    return [some[0] if some else None for some in control_contexts(keys, seed, 1)]


def context_clusters(keys):
    """A label for each item: equal where contexts overlap, also by way of others. keys: a set an item."""
    groups = []
    for own in keys:
        touching = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own] + [set(own).union(*touching)]
    return [next(n for n, group in enumerate(groups) if group >= own) for own in keys]


def read_adapter(model, tokenizer, text):
    """(LoRA pairs of a context in the base's dtype, its costs)."""
    ids, began, dtype = context_ids(tokenizer, text), clock(model.base.device), model.base.dtype
    pairs = model.lora(encode(model, [ids], tokenizer.pad_token_id))
    pairs = {name: tuple(m.to(dtype) for m in pair) for name, pair in pairs.items()}
    return pairs, {"contextualisation_tflops": context_flops(model, len(ids)) / 1e12,
                   "storage_mfloats": adapter_floats(model) / 1e6, "context_tokens": len(ids),
                   "contextualisation_seconds": clock(model.base.device) - began}


def adapted(run, contexts):
    """contexts: texts; for the control tuples of texts, of which the first answers. (keyword arguments of solve, costs)."""
    read = [[run.read(text) for text in ([context] if isinstance(context, str) else context)] for context in contexts]
    stacked = []
    for column in zip(*read):                                                # the K-th memory of each context
        parts = [pairs for pairs, _ in column]
        stacked.append({name: tuple(map(torch.cat, zip(*(pairs[name] for pairs in parts)))) for name in parts[0]}
                       if len(parts) > 1 else parts[0])
    return {"memory": stacked[0], "controls": stacked[1:]}, [row[0][1] for row in read]


def in_context(run, context, items, template):
    """A context before its questions: (prompts, the KV cache of what they share, costs)."""
    tokenizer, base = run.tokenizer, run.model.base
    room = base.config.get_text_config().max_position_embeddings - NEW_TOKENS
    prompts, lost = in_context_prompts(tokenizer, template, context, [item["question"] for item in items], room)
    past = len(prompts[0]) - len(user_turn(tokenizer, items[0]["question"]))
    same, began = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*(prompt[:-1] for prompt in prompts))), clock(base.device)
    prefix = [column[0] for column in same]
    with torch.no_grad():
        ids = torch.tensor([prefix], device=base.device)                                           # (1, P)
        cache = base.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    costs = {"contextualisation_tflops": base_flops(base, past, head=False) / 1e12, "past": past, "lost": lost,
             "storage_mfloats": kv_cache_floats(base, past) / 1e6, "context_tokens": past,
             "contextualisation_seconds": clock(base.device) - began}
    return prompts, {"prefix": prefix, "cache": cache}, costs


def fine_tuned(run, examples):
    """Fine-tune the base on (training, validation) rows: (costs, the weights to put back)."""
    tokenizer, base, began = run.tokenizer, run.model.base, clock(run.model.base.device)
    window, weights = base.config.get_text_config().max_position_embeddings, [p.data for p in base.parameters()]
    train, dev = ([conversation(tokenizer, [(row["question"], row["golds"][0])], window) for row in rows]
                  for rows in examples)
    for p in base.parameters():                                              # steps of 1e-5 would be lost in bfloat16
        p.data = p.data.to(torch.float32, copy=True)
    losses = fit_base(base, train, dev, lr=1e-5, batch_size=16, epochs=40, patience=3, seed=run.args.seed,
                      pad=tokenizer.pad_token_id)
    forward, validation = (sum(base_flops(base, len(ids)) for ids, _ in part) for part in (train, dev))
    flops = (len(losses) - 1) * 3 * forward + len(losses) * validation       # a backward pass costs two forward passes
    return {"contextualisation_tflops": flops / 1e12, "storage_mfloats": sum(p.numel() for p in base.parameters()) / 1e6,
            "contextualisation_seconds": clock(base.device) - began}, weights


def read_contexts(run, method, contexts, items, template):
    """What a method makes of contexts before the questions are asked: (prompts, keyword arguments of solve, costs of
    each item's context, base weights to put back). contexts: one for all items or, for adapters, one each."""
    prompts = [user_turn(run.tokenizer, item["question"]) for item in items]
    kept, weights, costs = {}, (), [dict.fromkeys(COSTS[1:], 0.0)]
    if method.startswith("adapter"):
        kept, costs = adapted(run, contexts)
    elif method in IN_CONTEXT:
        prompts, kept, cost = in_context(run, contexts[0], items, template)
        costs = [cost]
    elif method == "fine-tuned":
        cost, weights = fine_tuned(run, contexts[0])
        costs = [cost]
    return prompts, kept, costs * (len(items) // len(costs)), weights


# --------------------------------------------------------------------------------------------------------------------
# answers


def solve(run, prompts, items, memory=None, controls=(), prefix=(), cache=None):
    """[(greedy answer, tokens generated, (nats of the shortest gold under memory, under each of controls))] of a batch;
    a KV cache that is too large to copy for all of it serves a part at a time."""
    model, tokenizer, solved = run.model, run.tokenizer, []
    fit = max(1, int(KV_FLOATS / kv_cache_floats(model.base, len(prefix)))) if cache else len(prompts)
    new_tokens = 10 if run.args.task == "metaicl" else NEW_TOKENS
    for at in range(0, len(prompts), fit):
        part, golds = prompts[at:at + fit], [min(item["golds"], key=len) for item in items[at:at + fit]]
        texts, counts = answer(model, tokenizer, part, memory, prefix, cache, new_tokens)
        nats = [answer_nats(model, tokenizer, part, golds, m, prefix, cache) for m in (memory, *controls)]
        solved += zip(texts, counts, zip(*nats))
    return solved


def predict(run, method, groups, score, template=IN_CONTEXT_PROMPT, **where):
    """Records of the answers to groups, scores included; from the predictions file where it has them. A group is
    (contexts, items): one context for all its items or one each; an item has number, id, question, golds and cluster
    (label of its context); where is the condition, part of a record's key.

    A batch is computed whole if one of its answers is missing: padded as in an unbroken run, it gives the same answers
    to the last bit."""
    args, model, name, records = run.args, run.model, " ".join([method, *map(str, where.values())]), []
    digest, size = fingerprint(run, method, template), args.batch_size
    with tqdm(total=sum(len(items) for _, items in groups), desc=name, unit="question", leave=None) as bar:
        for group, (contexts, items) in enumerate(groups):
            read = None
            for at in range(0, len(items), size):
                batch, part = items[at:at + size], slice(at, at + size)
                keys = [f"{args.task} {name} group {group} item {item['number']} {digest}" for item in batch]
                if not all(key in run.done for key in keys):
                    prompts, kept, costs, weights = read = read or read_contexts(run, method, contexts, items, template)
                    solved = solve(run, prompts[part], batch, **kept)
                    for key, item, prompt, cost, (text, new, nats) in zip(keys, batch, prompts[part], costs[part], solved):
                        # the KV cache of the context is reused, as in Table 1; the adapter is merged and costs nothing
                        past = cost.get("past", 0)
                        flops = base_flops(model.base, len(prompt) - past + new, past)
                        scores = {**score(text, item["golds"]), "nats": None if None in nats else statistics.fmean(nats)}
                        if method == "adapter-shuffled":
                            scores["control_nats"] = nats
                        run.write({"key": key, "task": args.task, "method": method, **where, "gold": min(item["golds"], key=len),
                                   **item, "prediction": text, **scores, "inference_tflops": flops / 1e12, **cost})
                records += [{**run.done[key], **score(run.done[key]["prediction"], item["golds"])}
                            for key, item in zip(keys, batch)]
                bar.update(len(keys))
            for p, before in zip(model.base.parameters(), read[-1] if read else ()):
                p.data = before
    if lost := sum(record.get("lost", 0) > 0 for record in records):
        run.note(f"{name}: {lost} of {len(records)} prompts do not fit the base's window and lose the beginning of their "
                 "context")
    return records


def fingerprint(run, method, template=""):
    """Hash of what an answer depends on beside its question: base, data and flags, and for adapters the generator."""
    facts = [*run.facts, template, run.model.generator.fingerprint() if method.startswith("adapter") else "", "nats",
             run.args.controls if method == "adapter-shuffled" else 0]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def table_row(records, seconds, controls=None, **what):
    """what, then n, nats (and, with the records of the controls, memory_gap), mean and standard error of every metric,
    0 to 100, and mean costs over the questions: a query's, and its context's."""
    row = {**what, "n": len(records)}
    if nats := [record["nats"] for record in records if record.get("nats") is not None]:
        row["nats"], row["nats_stderr"] = mean_and_stderr(nats)
    row |= memory_gap(records, controls) if controls else {}
    for key in METRICS:
        if key in records[0]:
            mean, error = mean_and_stderr([record[key] for record in records])
            row[key], row[key + "_stderr"] = 100 * mean, None if error is None else 100 * error
    costs = {key: statistics.fmean(record[key] for record in records) for key in COSTS if key in records[0]}
    return {**row, **costs, "seconds": seconds}


# --------------------------------------------------------------------------------------------------------------------
# tasks: each yields the rows of its table


def evaluate_msc(run, rows):
    """Table 1. The adapter, its control and closed-book see the identical prompt, the bare question; only
    full-conversation reads the text."""
    args, keys, results = run.args, [set(row["sessions"]) for row in rows], {}
    others, labels = control_contexts(keys, args.seed, args.controls, args.limit), context_clusters(keys)
    contexts = ["\n\n".join(row["sessions"]) for row in rows]
    items = [{"number": i, "id": row["id"], "cluster": labels[i], "question": row["question"], "golds": [row["answer"]]}
             for i, row in enumerate(rows[:args.limit])]
    for method in args.method:
        asked, began = items, time.time()
        if method == "adapter-shuffled":
            asked = [item for item in items if others[item["number"]]]
            if lost := [item["id"] for item in items if not others[item["number"]]]:
                run.note(f"{method}: every other conversation shares a session with {', '.join(lost)}: left out of the "
                         "control and of the gap, not of the adapter's own row")
            if not asked:
                continue
        size = 1 if method in IN_CONTEXT else args.batch_size      # adapters of different contexts work side by side
        groups = []
        for at in range(0, len(asked), size):
            numbers = [item["number"] for item in asked[at:at + size]]
            read = {"adapter": contexts, "full-conversation": contexts,
                    "adapter-shuffled": [tuple(contexts[j] for j in some) for some in others]}.get(method)
            groups.append(([read[i] for i in numbers] if read else [None], asked[at:at + size]))
        results[method] = predict(run, method, groups, qa_scores), time.time() - began
    for method, (records, seconds) in results.items():
        controls = results["adapter-shuffled"][0] if method == "adapter" and "adapter-shuffled" in results else None
        row = table_row(records, seconds, controls, method=method)
        yield {key: value for key, value in row.items() if "_max" not in key}             # a question has one gold


def evaluate_qa(run, documents):
    """Fig. 2, Fig. 3, Table 5: documents in the order of the data, split evenly into ceil(tokens / k) groups, each the
    context of all its questions. Closed-book has no context: one row, of length 0. Lengths that make the same groups
    share their answers."""
    args, lengths, results = run.args, run.args.context_lengths or QA_LENGTHS, {}
    documents = documents[:args.limit]
    total = sum(map(len, tokenize(run.tokenizer, [document["text"] for document in documents])))
    if len(documents) == 1 or total <= max(lengths):
        run.note(f"the documents hold {total} tokens: longer contexts are all the same single group, to which "
                 "adapter-shuffled has no other")
    for method in args.method:
        for length in [0] if method == "closed-book" else lengths:
            began, count = time.time(), min(-(-total // length), len(documents)) if length else 1
            parts = np.array_split(range(len(documents)), count)
            contexts = ["\n\n".join(documents[i]["text"] for i in part) for part in parts] if length else [None]
            if method == "adapter-shuffled":
                others = control_contexts([{g} for g in range(count)], args.seed, args.controls)
                contexts = [tuple(contexts[j] for j in some) for some in others]
                if not all(contexts):
                    continue
            groups = [([context], [{**item, "cluster": g} for i in part for item in documents[i]["questions"]])
                      for g, (context, part) in enumerate(zip(contexts, parts))]
            records = predict(run, method, groups, qa_scores, parts=count)
            results[method, length] = records, time.time() - began, {"context_length": length, "groups": count}
    for (method, length), (records, seconds, what) in results.items():
        controls = results.get(("adapter-shuffled", length), [None])[0] if method == "adapter" else None
        yield table_row(records, seconds, controls, method=method, **what)


def evaluate_metaicl(run, tasks):
    """Fig. 4 to 6: a row for each method, number of shots and task, then averages over tasks. An item's accuracy is its
    mean over the demonstration seeds; the standard error is over items, and an average's follows from its tasks'."""
    args, names, results, table = run.args, list(tasks), {}, {}
    controls = control_contexts([{name} for name in names], args.seed, args.controls)
    others = {name: [names[j] for j in some] for name, some in zip(names, controls)}

    def shown(name, seed, shots):                                            # fewer shots are a part of more
        train = tasks[name][seed][0]
        drawn = random.Random(args.seed).sample(train, len(train))[:shots]
        return "\n\n".join(f"{row['question']} {row['golds'][0]}" for row in drawn)

    for method in args.method:
        if method == "adapter-shuffled" and len(names) == 1:
            run.note(f"{method} is left out: it takes another task's demonstrations, and {names[0]} is the only task")
            continue
        for shots in [0] if method in ("zero-shot", "fine-tuned") else args.shots:
            for name in tqdm(names, desc=f"{method}, {shots} shots", unit="task"):
                items, began, groups = tasks[name]["test"][:args.limit], time.time(), []
                for seed in args.demo_seeds if method != "zero-shot" else [None]:
                    context = {"zero-shot": lambda: None, "fine-tuned": lambda: tasks[name][seed],
                               "adapter-shuffled": lambda: tuple(shown(other, seed, shots) for other in others[name])
                               }.get(method, lambda: shown(name, seed, shots))()
                    groups.append(([context], [{**item, "cluster": seed} for item in items]))
                records = predict(run, method, groups, icl_scores, METAICL_PROMPT, name=name, shots=shots)
                results[method, shots, name] = records, len(items), time.time() - began
    for (method, shots, name), (records, n, seconds) in results.items():
        controls = results.get(("adapter-shuffled", shots, name), [None])[0] if method == "adapter" else None
        means = [{key: average(record.get(key) for record in records[i::n]) for key in ("accuracy", "nats", *COSTS)}
                 for i in range(n)]
        row = table_row(means, seconds, method=method, task=name, shots=shots)
        table.setdefault((method, shots), {})[name] = {**row, **(memory_gap(records, controls) if controls else {})}
    for rows in table.values():
        yield from rows.values()
    for (method, shots), rows in table.items():
        for label, wanted in (("classification", METAICL_CLASSIFICATION), ("non-classification", METAICL_OTHER),
                              ("all", names)):
            if part := [rows[name] for name in wanted if name in rows]:
                yield average_row(part, method=method, task=label, shots=shots)


def average(values):
    """Mean of the values that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def average_row(rows, **what):
    """Means over the rows of several tasks; a standard error follows from theirs, n and seconds are sums."""
    row = dict(what)
    for key in (key for key in rows[0] if key not in what):
        values = [each.get(key) for each in rows]
        if key in ("n", "seconds"):
            row[key] = sum(values)
        elif key.endswith("_stderr"):
            row[key] = None if None in values else sum(e * e for e in values) ** 0.5 / len(rows)
        else:
            row[key] = average(values)
    return row


@torch.no_grad()
def evaluate_ppl(run, texts):
    """Table 2: perplexity of a document's first 1,024 tokens (reconstruction) and of the next 1,024 (completion), exp of the mean over
    documents of the token-mean nats; other lengths by --context-lengths. A document of fewer tokens gives what is left; the first token of a
    target is no target. The checkpoints of several ablations stand side by side; what no generator touches is computed once."""
    args, device, lengths = run.args, run.model.base.device, run.args.context_lengths or [PPL_TOKENS]
    if 2 * max(lengths) > (window := run.model.base.config.get_text_config().max_position_embeddings):
        raise InputError(f"--context-lengths {max(lengths)}: context and completion must fit the base's window of {window} tokens together")
    documents = first_ids(texts, run.tokenizer, 2 * max(lengths), args.limit or 100)
    if len(documents) < 2:
        raise InputError(f"{args.data}: ppl needs at least 2 documents of 2 tokens or more, found {len(documents)}")
    others = other_contexts([{i} for i in range(len(documents))], args.seed)

    def nats(model, method, i, L):
        """Of document i, in nats a token; None where no token is left."""
        context, memory, values = documents[i][:L], None, []
        if method.startswith("adapter"):
            memory = encode(model, [documents[others[i]][:L] if method == "adapter-shuffled" else context], run.tokenizer.pad_token_id)
        for target in (context, documents[i][L:2 * L]):
            ids = torch.tensor([context + target if method == "in-context" else target], device=device)    # (1, L) or (1, 2 L)
            n = len(target) - 1
            values.append(F.cross_entropy(model(ids, memory=memory)[0, -n - 1:-1].float(), ids[0, -n:]).item() if n > 0 else None)
        return dict(zip(("reconstruction_nats", "completion_nats"), values))

    for L, method in itertools.product(lengths, args.method):
        for name, model in run.models if method.startswith("adapter") else run.models[:1]:
            run.model, records, began = model, [], time.time()
            digest = fingerprint(run, method)
            for i in tqdm(range(len(documents)), desc=f"{method} {L}", unit="document"):
                key = f"ppl {method} {L} {i} {digest}"
                if key not in run.done:
                    run.write({"key": key, "task": "ppl", "method": method, "context_length": L, "document": i, **nats(model, method, i, L)})
                records.append(run.done[key])
            row = {"method": method, **({"checkpoint": name} if method.startswith("adapter") else {}), **({"context_length": L} if args.context_lengths else {}), "n": len(records)}
            for key in ("reconstruction", "completion"):
                values = [record[key + "_nats"] for record in records if record[key + "_nats"] is not None]
                if values:
                    mean, error = mean_and_stderr(values)
                    row[f"ppl_{key}"] = torch.tensor(mean).exp().item()
                    row[f"ppl_{key}_stderr"] = None if error is None else row[f"ppl_{key}"] * error                # delta method
            yield {**row, "seconds": time.time() - began}


# --------------------------------------------------------------------------------------------------------------------
# command line


def load_models(args):
    """([(name, AdaptedLM)] for each --checkpoint on one base, tokenizer). Without --base it is the base that the first checkpoint was trained for; without a
    checkpoint the generator is untrained and says so."""
    names = args.checkpoint or [DEFAULT_CHECKPOINT if args.base in (None, DEFAULT_BASE) and os.path.isdir(DEFAULT_CHECKPOINT) else "none"]
    directories = {name: locate_checkpoint(name) for name in names if name != "none"}
    args.base = args.base or next((checkpoint_base(directory) for directory in directories.values()), None) or DEFAULT_BASE
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype) if args.dtype else None, args.device)
    models = []
    for name in names:
        if name == "none":
            print("NOTE: the generator is untrained (A1 = 0), so the adapter rows equal closed-book; train one with train.py and name it with --checkpoint")
            torch.manual_seed(args.seed)
        models.append((name, AdaptedLM(base, GeneratorConfig()) if name == "none" else AdaptedLM.from_pretrained(base, directories[name])))
    return models, tokenizer


def markdown(rows):
    """The rows as a Markdown table; a metric stands with its standard error."""
    def cell(row, key):
        value, error = row.get(key), row.get(key + "_stderr")
        return ("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)) + (f" ± {error:.2g}" if error is not None else "")

    longest_first = sorted(rows, key=len, reverse=True)                      # the row of the adapter orders the columns
    keys = [key for key in dict.fromkeys(k for row in longest_first for k in row) if not key.endswith("_stderr")]
    lines = [keys, ["---"] * len(keys), *([cell(row, key) for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=["ask", *sorted(METHODS)], required=True)
    add("--base", help="frozen base model: hub id, directory or .gguf file, one that train.py fine-tuned included; default: the checkpoint's, or " + DEFAULT_BASE)
    add("--checkpoint", action="append", help="generator directory or hub id, the authors' format included; none: an untrained generator; ppl compares several: repeatable")
    add("--data", help="hub id, .parquet or .jsonl in the data set's own schema; streamingqa: also .csv; metaicl: directory")
    add("--method", action="append", help="repeatable; default: all of the task")
    add("--context-lengths", type=int, nargs="+", help="squad, streamingqa: tokens of a group of documents (default 512 to 32768); ppl: of the context, and of what follows (default 1024)")
    add("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="metaicl: demonstrations; zero-shot and fine-tuned have 0")
    add("--demo-seeds", type=int, nargs="+", choices=METAICL_SEEDS, default=METAICL_SEEDS, help="metaicl: training files to draw them from")
    add("--limit", type=int, help="msc: conversations; ppl: documents (default 100); squad, streamingqa: documents; metaicl: test items a task")
    add("--controls", type=int, default=4, help="other contexts whose memories the gold is scored under; F1 takes the first")
    add("--seed", type=int, default=0, help="of the control and of the demonstrations drawn")
    add("--batch-size", type=int, default=4)
    add("--device")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; default bfloat16 on CUDA, float32 elsewhere")
    add("--output", help="write the table and its circumstances as JSON")
    add("--predictions", help="append every prediction to this JSONL; a run that was stopped continues from it")
    add("--plot", help="draw the table: .png, .svg or .pdf")
    add("--context", action="append", default=[], help="ask: text file to read into the memory, - for standard input; repeatable")
    add("--question", action="append", help="ask: repeatable; without one, questions are typed in until an empty line")
    add("--memory", help="ask: .safetensors file of what was read; loaded if it exists, streamed on with --context, and saved")
    add("--export", help="ask: write the adapter of the context as a PEFT LoRA directory")
    add("--compare", action="store_true", help="ask: the closed-book and the in-context answer beside it")
    args = parser.parse_args(argv)
    if args.task == "ask":
        check_flags(args)
        return args
    if args.context or args.question or args.memory or args.export or args.compare:
        raise InputError(f"--context, --question, --memory, --export and --compare belong to --task ask, not to --task {args.task}")
    args.method = list(dict.fromkeys(args.method or METHODS[args.task]))
    unknown, outputs = [method for method in args.method if method not in METHODS[args.task]], [path for path in (args.output, args.predictions, args.plot) if path]
    unwritable = [path for path in outputs if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")]
    files = [os.path.realpath(path) for path in (args.data, *outputs) if path]
    for wrong, words in (
            (unknown, f"--method {' '.join(unknown)} is unknown for --task {args.task}: choose from {', '.join(METHODS[args.task])}"),
            (unwritable, f"{' '.join(unwritable)} cannot be written: name a file in a directory that exists"),
            (len(set(files)) < len(files), "--data, --output, --predictions and --plot must be different files"),
            (args.plot and not args.plot.endswith((".png", ".svg", ".pdf")), f"--plot {args.plot}: name a .png, .svg or .pdf file"),
            (min(args.batch_size, args.controls, *(args.context_lengths or [1]), *args.shots, args.limit or (1 if args.limit is None else 0)) < 1, "--batch-size, --controls, --limit, --context-lengths and --shots must be at least 1"),
            (len(args.checkpoint or []) > 1 and args.task != "ppl", "--checkpoint is given more than once: only --task ppl compares several"),
            (args.data is None and args.task not in HUB_IDS, f"--task {args.task} has no data set on the hub: name a {'directory' if args.task == 'metaicl' else '.csv'} with --data")):
        if wrong:
            raise InputError(words)
    return args


def load_data(args, note):
    """The data of the task. It is read before the model: a bad file should not have to wait for that to load."""
    if args.task == "msc" and args.data is None and not hub_reachable():
        args.data = MSC_SAMPLE
        note(f"the hub is out of reach: this is the built-in sample of {len(load_msc())} conversations, NOT the paper's benchmark ({MSC_HUB_ID})")
    args.data = args.data or HUB_IDS[args.task]
    if args.task == "metaicl":
        tasks, missing = load_metaicl(args.data, args.demo_seeds, max(args.shots), "fine-tuned" in args.method)
        note(f"{len(tasks)} of MetaICL's 26 test tasks are averaged; not in {args.data}: {', '.join(missing) or 'none'}")
        return tasks
    if args.task == "ppl":
        texts = read_rows(args.data, split="validation")
        return itertools.chain([next(texts)], texts)
    return load_msc(args.data) if args.task == "msc" else load_qa(args.data, args.task)


def main(argv=None):
    args, notes = arguments(argv), []
    if args.task == "ask":
        def load():
            models, tokenizer = load_models(args)
            return models[0][1], tokenizer

        return ask(args, load)

    def note(text):
        notes.append(text)
        tqdm.write(f"NOTE: {text}")

    data = load_data(args, note)
    done, write = open_predictions(args.predictions)
    models, tokenizer = load_models(args)
    model = models[0][1]
    versions, dtype = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}, str(model.base.dtype).split(".")[-1]
    facts = [args.base, stamps(args.base), args.data, stamps(args.data), args.limit, args.seed, args.demo_seeds, args.batch_size, dtype, model.base.device.type, versions]
    run = types.SimpleNamespace(args=args, models=models, model=model, tokenizer=tokenizer, facts=facts, done=done, write=write, note=note)
    contexts = max(args.controls + 1, int(PAIR_FLOATS / adapter_floats(model)))                    # kept, then read again
    run.read = functools.lru_cache(contexts)(functools.partial(read_adapter, model, tokenizer))
    rows = list({"msc": evaluate_msc, "squad": evaluate_qa, "streamingqa": evaluate_qa, "metaicl": evaluate_metaicl, "ppl": evaluate_ppl}[args.task](run, data))
    if not rows:
        raise InputError(f"{args.data}: no method could be evaluated on it")
    print("\n" + markdown(rows))
    print("".join(f"NOTE: {text}\n" for text in notes), end="")
    if args.output:
        query = demonstration("{input}", "")
        bare = {"ppl": "none: the text itself is scored", "metaicl": f"{query} as one user turn"}.get(args.task, "the question alone, as one user turn")
        full = {"ppl": "context + text", "metaicl": METAICL_PROMPT.replace("{question}", query)}.get(args.task, IN_CONTEXT_PROMPT)
        result = {"task": args.task, "data": os.path.relpath(args.data) if os.path.exists(args.data) else args.data, "note": " ".join(notes) or None,
                  "n": max(row["n"] for row in rows), "limit": args.limit, "seed": args.seed, "base": args.base,
                  "checkpoint": models[0][0] if len(models) == 1 else [name for name, _ in models], "dtype": dtype, "versions": versions,
                  "prompts": {method: full if method in IN_CONTEXT else bare for method in args.method}, "rows": rows}
        with open(args.output + ".part", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
        os.replace(args.output + ".part", args.output)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    run_command(main)
