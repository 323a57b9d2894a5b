"""The paper's evaluation (§4, §5): one table, one JSON, one plot, each method beside its controls.

    python evaluate.py --task msc                                # Table 1: conversations; default base, built-in sample
    python evaluate.py --task squad --limit 20 --context-lengths 512 1024 2048 --plot squad.png     # Fig. 2, 3, Table 5
    python evaluate.py --task streamingqa --data streamingqa.csv --base out/sft --method closed-book   # a baseline
    python evaluate.py --task metaicl --data metaicl --predictions metaicl.jsonl    # Fig. 4; after a kill: continues
    python evaluate.py --task ppl --data validation.parquet --checkpoint out/run/step-000100           # Table 2
    python evaluate.py --task ask --context notes.txt --question "Who owns the boat?" --compare    # your own text

Methods: closed-book (bare question), full-conversation / in-context / few-shot (context in the prompt), adapter (bare
question, context in the weights) and adapter-shuffled, the control: the adapters of OTHER contexts. What a generator
remembers is the gap between the last two, in answer nats: one that has only learnt an answer style has none.
"""

import collections
import functools
import itertools
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

from support.answers import average, encode, fingerprint, load_models, NEW_TOKENS, predict
from support.ask import ask
from support.benchmarks import (context_clusters, control_contexts, controls_of, first_ids, given_records, IN_CONTEXT,
                                in_context_prompts, load_answers, load_data, METAICL_KINDS, prompt_template, SPANS)
from support.costs import COSTS, adapter_floats, base_flops, clock, context_flops, kv_cache_floats, window
from support.files import InputError, open_predictions, run_command, stamps
from extras.finetune import cost_of_base, fit_task, lacking_memory
from support.flags import arguments
from support.plots import mean_row, merge, write_table
from support.text import context_ids, tokenize, user_turn

QA_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
PAIR_FLOATS = 1e9         # of the LoRA pairs of contexts that are kept for later questions
METRICS = ("f1", "em", "f1_max", "em_max", "recall", "rougeL_recall", "accuracy")


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
    """Does the answer contain the gold, word for word after SQuAD's normalisation? More guesses, more hits."""
    words = f" {normalize_answer(gold)} "
    return float(bool(words.strip()) and words in f" {normalize_answer(prediction)} ")


def rouge_l_recall(prediction, gold):
    """Distinct words of the longest common subsequence over those of the gold, as the package the authors used counts;
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
    best = {name: max(metric(prediction, each) for each in golds)
            for name, metric in (("f1_max", f1_score), ("em_max", exact_match), ("recall", recall))}
    return {"f1": f1_score(prediction, gold), "em": exact_match(prediction, gold), **best,
            "rougeL_recall": rouge_l_recall(prediction, gold)}


def icl_scores(prediction, golds):
    """Exact match but for case, of a prediction without the "Output:" it may repeat, as the authors count."""
    return {"accuracy": float(prediction.replace("Output:", "").strip().lower() == golds[0].strip().lower())}


def mean_and_stderr(values, clusters=None):
    """(mean, standard error) of a list, cluster-robust where clusters labels its values; of one cluster None."""
    mean, sums = statistics.fmean(values), collections.defaultdict(float)
    for value, label in zip(values, clusters or range(len(values))):
        sums[label] += value - mean
    G = len(sums)
    return mean, (G / (G - 1) * sum(s * s for s in sums.values())) ** 0.5 / len(values) if G > 1 else None


def memory_gap(own, controls, bare=()):
    """What an adapter knows of ITS context, from the records of adapter, adapter-shuffled and closed-book, paired by
    question, standard errors clustered by context. gain: nats of the gold closed-book minus under its own; gap: under
    the others (their mean) minus under its own; best-of-K+1: share of questions whose own memory gives the fewest nats
    (ties are shared); chance: 100 / (K+1)."""
    bare, row = {record["number"]: record["nats"] for record in bare}, {}
    if gains := [(bare[record["number"]] - record["nats"], record["cluster"]) for record in own
                 if bare.get(record["number"]) is not None and record["nats"] is not None]:
        row["gain"], row["gain_stderr"] = mean_and_stderr(*zip(*gains))
    mine = {(record["cluster"], record["number"]): record["nats"] for record in own}
    pairs = [(mine[key], record["control_nats"], record["cluster"]) for record in controls
             if mine.get(key := (record["cluster"], record["number"])) is not None]
    if not pairs:
        return row
    K, labels = len(pairs[0][1]), [label for _, _, label in pairs]
    gap, error = mean_and_stderr([statistics.fmean(others) - nats for nats, others, _ in pairs], labels)
    first = [100 * (nats <= min(others)) / (1 + others.count(nats)) for nats, others, _ in pairs]
    best, best_error = mean_and_stderr(first, labels)
    name = f"best-of-{K + 1}"
    return {**row, "gap": gap, "gap_stderr": error, name: best, name + "_stderr": best_error, "chance": 100 / (K + 1),
            **({"pairs": len(pairs)} if len(pairs) < len(own) else {})}


# --------------------------------------------------------------------------------------------------------------------
# methods: what each makes of contexts before questions (items) are asked -> (prompts, keyword arguments of
# support.answers.solve, costs of each context). contexts: one for all items or, for adapters, one each


def closed_book(run, template, contexts, items):
    """The bare question, or with an instruction; nothing is read. A base that was fine-tuned brings what that cost."""
    return [user_turn(run.tokenizer, template.format(question=item["question"])) for item in items], {}, [run.free]


def in_context(run, template, contexts, items):
    """The context in the prompt: its questions share the KV cache of what their prompts begin with."""
    tokenizer, base, questions = run.tokenizer, run.model.base, [item["question"] for item in items]
    golds = tokenize(tokenizer, [min(item["golds"], key=len) for item in items])
    room = window(base) - max(NEW_TOKENS, *map(len, golds))
    prompts, lost = in_context_prompts(tokenizer, template, contexts[0], questions, room)
    past, began = len(prompts[0]) - len(user_turn(tokenizer, questions[0])), clock(base.device)
    prefix = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    with torch.no_grad():
        ids = torch.tensor([prefix], device=base.device)                                           # (1, P)
        cache = base.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    return prompts, {"prefix": prefix, "cache": cache}, [{
        "contextualisation_tflops": base_flops(base, past, head=False) / 1e12, "past": past, "lost": lost,
        "storage_mfloats": kv_cache_floats(base, past) / 1e6, "context_tokens": past,
        "contextualisation_seconds": clock(base.device) - began}]


def fine_tuned(run, template, contexts, items):
    """All weights of the base fitted to the context: (training rows, validation rows)."""
    costs = fit_task(run.model.base, run.tokenizer, *contexts[0], run.args.seed)
    return closed_book(run, template, contexts, items)[0], {}, [costs]


def adapter(run, template, contexts, items):
    """The context in the weights. A control's is a tuple of texts: answers are under the first, nats under all."""
    read = [[run.read(text) for text in ((context,) if isinstance(context, str) else context)] for context in contexts]
    columns = [[pairs for pairs, _ in column] for column in zip(*read)]             # the k-th text of each context
    batch = [{name: tuple(map(torch.cat, zip(*(p[name] for p in column)))) for name in column[0]} for column in columns]
    kept = {"memory": batch[0], "controls": batch[1:]}
    return closed_book(run, template, contexts, items)[0], kept, [row[0][1] for row in read]


def read_adapter(model, tokenizer, text):
    """(LoRA pairs of a context in the base's dtype, its costs), the last norm included."""
    ids, began, dtype = context_ids(tokenizer, text), clock(model.base.device), model.base.dtype
    pairs = {name: tuple(m.detach().to(dtype) for m in pair) for name, pair in model.lora(encode(model, ids)).items()}
    return pairs, {"contextualisation_tflops": context_flops(model, len(ids)) / 1e12,
                   "storage_mfloats": adapter_floats(model) / 1e6, "context_tokens": len(ids),
                   "contextualisation_seconds": clock(model.base.device) - began}


# the methods that read a context; all others are closed-book
WITH_CONTEXT = {**dict.fromkeys(IN_CONTEXT, in_context), "fine-tuned": fine_tuned,
                **dict.fromkeys(("adapter", "adapter-shuffled", "adapter-permuted"), adapter)}


def read_contexts(run, method, contexts, items):
    """(prompts, arguments of solve, costs of each item's context) of any method."""
    template = prompt_template(run.args.task, method)
    prompts, kept, costs = WITH_CONTEXT.get(method, closed_book)(run, template, contexts, items)
    return prompts, kept, costs * (len(items) // len(costs))


# --------------------------------------------------------------------------------------------------------------------
# tasks: what is asked under which context


def msc(run, rows):
    """Table 1. Adapter, control and closed-book see one prompt, the bare question; full-conversation alone reads the
    text. --evidence: questions whose gold a turn says, at four lengths, from that turn to the whole conversation."""
    rows = [row for row in rows if row.get("spans", True)]
    args, keys = run.args, [set(row["sessions"]) for row in rows]
    others, labels = controls_of(run, keys, args.limit), context_clusters(keys)
    items = [{"number": i, "id": row["id"], "cluster": labels[i], "question": row["question"], "golds": [row["answer"]]}
             for i, row in enumerate(rows[:args.limit])]
    if (lost := [item["id"] for item in items if not others[item["number"]]]) and "adapter-shuffled" in args.method:
        run.note(f"adapter-shuffled: every other conversation shares a session with {', '.join(lost)}: left out of the "
                 "control and of the gap, not of the adapter's own row")

    def conditions(method):
        asked = [item for item in items if method != "adapter-shuffled" or others[item["number"]]]
        size = 1 if method in IN_CONTEXT else args.batch_size      # adapters of different contexts work side by side
        for span in SPANS if args.evidence and method in WITH_CONTEXT else SPANS[-1:]:
            texts = [row["spans"][span] if args.evidence else "\n\n".join(row["sessions"]) for row in rows]
            if method == "adapter-shuffled":
                texts = [tuple(texts[j] for j in some) for some in others]
            groups = [([texts[item["number"]] for item in asked[at:at + size]] if method in WITH_CONTEXT else [None],
                       asked[at:at + size]) for at in range(0, len(asked), size)]
            where = {"context": span if method in WITH_CONTEXT else "none"} if args.evidence else {}
            if groups:
                yield method, where, where, groups

    for row in table(run, itertools.chain(*map(conditions, (*args.method, *run.rows)))):
        yield {key: value for key, value in row.items() if "_max" not in key}              # a question has one gold


def qa(run, documents):
    """Fig. 2, Fig. 3, Table 5: documents in the order of the data, split evenly into ceil(tokens / length) groups of
    whole documents; a group is the context of all its questions. Closed-book has no context: one row, of length 0.
    Lengths that make the same groups share their answers. --groups: the first so many of a length; closed-book then
    answers those of the longest."""
    args, lengths, documents = run.args, run.args.context_lengths or QA_LENGTHS, documents[:run.args.limit]
    total = sum(map(len, tokenize(run.tokenizer, [document["text"] for document in documents])))
    if (alike := [n for n in lengths if len(documents) == 1 or n >= total]) and "adapter-shuffled" in args.method:
        run.note(f"the documents hold {total} tokens: longer contexts are all the same single group, to which "
                 f"adapter-shuffled has no other: no such row, nor a gap, at {', '.join(map(str, alike))}")

    def conditions(method):
        for length in lengths if method in WITH_CONTEXT else run.rows.get(method, [0]):
            count = min(-(-total // (length or max(lengths))), len(documents))
            parts = np.array_split(range(len(documents)), count)
            texts = ["\n\n".join(documents[i]["text"] for i in part) for part in parts]
            others = controls_of(run, [{g} for g in range(count)], args.groups)
            if method == "adapter-shuffled":
                texts = [tuple(texts[j] for j in some) for some in others]
            groups = [([text], [{**item, "cluster": g} for i in part for item in documents[i]["questions"]])
                      for g, (text, part) in enumerate(zip(texts, parts))][:args.groups]
            if method not in WITH_CONTEXT:
                groups = [([None], [item for _, items in groups for item in items])]
            if method != "adapter-shuffled" or others[0]:
                what, where = {"context_length": length, "groups": len(groups)}, {"parts": count if length else 1}
                yield method, what, where, groups

    return table(run, itertools.chain(*map(conditions, (*args.method, *run.rows))))


def metaicl(run, tasks):
    """Fig. 4 to 6: a row for each method, number of shots and task, then their means over tasks. A question's scores
    are its means over the demonstration seeds. adapter-permuted reads the task's own demonstrations, each with the
    output of another."""
    args, names = run.args, list(tasks)
    others = dict(zip(names, controls_of(run, [{name} for name in names])))
    methods = [method for method in (*args.method, *run.rows) if method != "adapter-shuffled" or len(names) > 1]
    if methods != [*args.method, *run.rows]:
        run.note(f"adapter-shuffled is left out: it takes other tasks' demonstrations, and {names[0]} is the only one")

    def shown(name, seed, shots, shift=0):                                   # fewer shots are a part of more
        drawn = random.Random(args.seed).sample(tasks[name][seed][0], len(tasks[name][seed][0]))
        pairs = zip(drawn[:shots], drawn[shift:] + drawn[:shift])
        return "\n\n".join(f"{row['question']} {other['golds'][0]}" for row, other in pairs)

    def context(method, name, seed, shots):
        if method == "fine-tuned":
            return tasks[name][seed]
        if method == "adapter-shuffled":
            return tuple(shown(names[j], seed, shots) for j in others[name])
        return shown(name, seed, shots, int(method == "adapter-permuted")) if method in WITH_CONTEXT else None

    def conditions(method):
        learns = method in WITH_CONTEXT and method != "fine-tuned"
        for shots, name in itertools.product(args.shots if learns else run.rows.get(method, [0]), names):
            groups = [([context(method, name, seed, shots)],
                       [{**item, "cluster": seed} for item in tasks[name]["test"][:args.limit]])
                      for seed in (args.demo_seeds if method in WITH_CONTEXT else [None])]
            yield method, {"task": name, "shots": shots}, {"name": name, "shots": shots}, groups

    rows = list(table(run, itertools.chain(*map(conditions, methods))))
    kinds = {**METAICL_KINDS, "all": names}
    for (method, shots), kind in itertools.product(dict.fromkeys((row["method"], row["shots"]) for row in rows), kinds):
        part = [row for row in rows if (row["method"], row["shots"]) == (method, shots) and row["task"] in kinds[kind]]
        rows += [mean_row(part, method=method, task=kind, shots=shots)] if part else []
    return rows


@torch.no_grad()
def ppl(run, texts):
    """Table 2: perplexity of a document's first 1,024 tokens (reconstruction) and of the next 1,024 (completion), exp
    of the mean over documents of the token-mean nats; other lengths by --context-lengths. Documents too short for the
    longest are left out; the first token of a target is no target. What no generator touches is computed once."""
    args, device, lengths = run.args, run.model.base.device, run.args.context_lengths or [1024]
    if 2 * max(lengths) > window(run.model.base):
        raise InputError(f"--context-lengths {max(lengths)}: context and completion must fit the base's window of "
                         f"{window(run.model.base)} tokens together")
    documents = first_ids(texts, run.tokenizer, 2 * max(lengths), args.limit or 100)
    if len(documents) < 2:
        raise InputError(f"{args.data}: ppl needs 2 documents of {2 * max(lengths)} tokens, found {len(documents)}")
    others = control_contexts([{i} for i in range(len(documents))], args.seed, 1)

    def nats(model, method, i, L):
        """Token-mean nats of both targets of document i."""
        context, memory, values = documents[i][:L], None, {}
        if method.startswith("adapter"):
            memory = encode(model, documents[others[i][0]][:L] if method == "adapter-shuffled" else context)
        for key, target in (("reconstruction_nats", context), ("completion_nats", documents[i][L:2 * L])):
            ids = torch.tensor([context + target if method == "in-context" else target], device=device)  # (1, L or 2 L)
            values[key] = F.cross_entropy(model(ids, memory=memory)[0, -L:-1].float(), ids[0, 1 - L:]).item()
        return values

    for L, method in itertools.product(lengths, args.method):
        for name, model in run.models if method.startswith("adapter") else run.models[:1]:
            run.model, records, began = model, [], time.time()
            for i in tqdm(range(len(documents)), desc=f"{method} {L}", unit="document"):
                key = f"ppl {method} {L} of {max(lengths)} {i} {fingerprint(run, method)}"
                if key not in run.done:
                    run.write({"key": key, "task": "ppl", "method": method, "context_length": L, "document": i,
                               **nats(model, method, i, L)})
                records.append(run.done[key])
            row = {"method": method, **({"checkpoint": name} if method.startswith("adapter") else {}),
                   **({"context_length": L} if args.context_lengths else {}), "n": len(records)}
            for key in ("reconstruction", "completion"):
                mean, error = mean_and_stderr([record[key + "_nats"] for record in records])
                row[f"ppl_{key}"] = np.exp(mean).item()
                row[f"ppl_{key}_stderr"] = None if error is None else row[f"ppl_{key}"] * error      # delta method
            yield {**row, "seconds": time.time() - began}


# --------------------------------------------------------------------------------------------------------------------
# the table


def table_row(records, seconds, bare=(), controls=(), **what):
    """what, then n questions, nats, memory_gap of what has records of closed-book or of controls, mean and standard
    error of every metric, 0 to 100, and mean costs: a query's, and its context's. A question asked under several
    demonstration seeds counts once."""
    numbers = [record["number"] for record in records]
    row = {**what, "n": len(set(numbers))}
    if scored := [(record["nats"], record["number"]) for record in records if record.get("nats") is not None]:
        row["nats"], row["nats_stderr"] = mean_and_stderr(*zip(*scored))
    row |= memory_gap(records, controls, bare) if bare or controls else {}
    for key in METRICS:
        if key in records[0]:
            mean, error = mean_and_stderr([record[key] for record in records], numbers)
            row[key], row[key + "_stderr"] = 100 * mean, None if error is None else 100 * error
    costs = {key: average(record.get(key) for record in records)
             for key in (COSTS[0], "released_tflops", *COSTS[1:]) if any(key in record for record in records)}
    return {**row, **costs, "seconds": seconds}


def table(run, conditions):
    """The rows of a task. conditions: (method, what names its row, what else keys its records, groups)."""
    conditions, results, bare = list(conditions), {}, {}
    given = {(method, str(what)): given_records(run, method, what, groups) for method, what, _, groups in conditions
             if method in run.rows}                                          # another program answered
    for method, what, where, groups in tqdm(conditions, desc=run.args.task, unit="row"):
        began, key = time.time(), (method, str(what))
        records = given[key] if key in given else predict(run, read_contexts, method, groups, **where)
        results[key] = records, time.time() - began, what
        if method in ("closed-book", "zero-shot"):
            bare[what.get("task")] = records
    for (method, place), (records, seconds, what) in results.items():
        beside = {"bare": bare.get(what.get("task"), ()),
                  "controls": results.get(("adapter-shuffled", place), [()])[0]} if method == "adapter" else {}
        if run.args.evidence and method in WITH_CONTEXT:
            what = {**what, "context_tokens": round(average(record["context_tokens"] for record in records))}
        yield table_row(records, seconds, **beside, method=method, **what)


def main(argv=None):
    args, notes = arguments(argv, __doc__), []
    if args.merge:
        return write_table(args, *merge(args.merge))
    if args.task == "ask":
        return ask(args)

    def note(text):
        notes.append(text)
        tqdm.write(f"NOTE: {text}")

    data = load_data(args, note)
    given = {name: load_answers(path, args.task, data) for name, path in args.rows.items()}
    done, write = open_predictions(args.predictions)
    models, tokenizer = load_models(args)
    model, base, dtype = models[0][1], models[0][1].base, str(models[0][1].base.dtype).split(".")[-1]
    if "fine-tuned" in args.method and not args.named and (lack := lacking_memory(base)):
        args.method.remove("fine-tuned")
        note(f"fine-tuned is left out: {lack}; --method fine-tuned tries")
    versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers)}}
    facts = [args.base, stamps(args.base), args.data, stamps(args.data), args.limit, args.seed, args.demo_seeds,
             args.batch_size, dtype, base.device.type, versions]
    kept = max(args.controls + 1, int(PAIR_FLOATS / adapter_floats(model)))              # contexts; more are read again
    run = types.SimpleNamespace(
        args=args, models=models, model=model, tokenizer=tokenizer, facts=facts, done=done, write=write, note=note,
        rows=given, free=cost_of_base(args.base), score=icl_scores if args.task == "metaicl" else qa_scores,
        read=functools.lru_cache(kept)(functools.partial(read_adapter, model, tokenizer)))
    rows = list({"msc": msc, "squad": qa, "streamingqa": qa, "metaicl": metaicl, "ppl": ppl}[args.task](run, data))
    if not rows:
        raise InputError(f"{args.data}: no method could be evaluated on it")
    write_table(args, rows, {
        "task": args.task, "data": os.path.relpath(args.data) if os.path.exists(args.data) else args.data,
        "note": " ".join(dict.fromkeys(notes)) or None, "n": max(row["n"] for row in rows), "limit": args.limit,
        "seed": args.seed, "base": args.base, "dtype": dtype, "versions": versions,
        "checkpoint": models[0][0] if len(models) == 1 else [name for name, _ in models],
        "prompts": {method: prompt_template(args.task, method) for method in args.method if args.task != "ppl"}})
    print("".join(f"NOTE: {text}\n" for text in dict.fromkeys(notes)), end="")


if __name__ == "__main__":
    run_command(main)
