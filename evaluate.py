"""The paper's evaluation (§4, §5): one table, one JSON, one plot, each method beside its controls.

    python evaluate.py --task msc                                   # Table 1: memory of conversations; default base, built-in sample
    python evaluate.py --task squad --limit 20 --context-lengths 512 1024 2048 --output squad.json --plot squad.png       # Fig. 2, 3, Table 5
    python evaluate.py --task streamingqa --data streamingqa.csv --base out/sft --method closed-book                      # a fine-tuned baseline
    python evaluate.py --task metaicl --data metaicl --predictions metaicl.jsonl            # Fig. 4; once more after a kill: continues
    python evaluate.py --task ppl --data validation.parquet --checkpoint out/a/step-000280 --checkpoint out/b/step-000280 # Table 2
    python evaluate.py --task ask --context notes.txt --memory notes.safetensors --question "Who owns the boat?" --compare # your own text

Methods: closed-book (bare question), full-conversation / in-context / few-shot (context in the prompt), adapter (bare question, context in
the weights) and adapter-shuffled, the control: the adapter of ANOTHER context. What a generator remembers is the gap between the last two;
one that has only learnt an answer style scores the same with both.
"""

import argparse
import collections
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

from data import conversation
from generator import GeneratorConfig
from model import AdaptedLM, load_base
from support.answers import answer, encode
from support.ask import ask, check_flags
from support.bases import DEFAULT_BASE
from support.benchmarks import (IN_CONTEXT_PROMPT, METAICL_CLASSIFICATION, METAICL_OTHER, METAICL_PROMPT, METAICL_SEEDS,
                                MSC_HUB_ID, MSC_SAMPLE, first_ids, in_context_prompts, load_metaicl, load_msc, load_qa)
from support.costs import adapter_floats, base_flops, context_flops, kv_cache_floats
from support.files import InputError, hub_reachable, open_predictions, read_rows, run_command, stamps
from support.finetune import fit_base
from support.formats import checkpoint_base, locate_checkpoint
from support.instructions import demonstration
from support.plots import COSTS, plot
from support.text import context_ids, tokenize, user_turn

QA_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
PPL_TOKENS = 1024         # of a context, and of the text that follows it
NEW_TOKENS = 20           # greedy, cut at the first newline; MetaICL 10, ask 60
DEFAULT_CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "smollm2-135m")
QA_METHODS = ["closed-book", "in-context", "adapter", "adapter-shuffled"]
METHODS = {"msc": ["closed-book", "full-conversation", "adapter", "adapter-shuffled"], "squad": QA_METHODS, "streamingqa": QA_METHODS, "ppl": QA_METHODS,
           "metaicl": ["zero-shot", "few-shot", "fine-tuned", "adapter", "adapter-shuffled"]}
IN_CONTEXT = ("in-context", "full-conversation", "few-shot")
METRICS = ("f1", "em", "f1_max", "em_max", "recall", "rougeL_recall", "accuracy")
HUB_IDS = {"msc": MSC_HUB_ID, "squad": "rajpurkar/squad", "ppl": "cerebras/SlimPajama-627B"}


# --------------------------------------------------------------------------------------------------------------------
# metrics, 0 to 1


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
    """Does the answer contain the gold, word for word after SQuAD's normalisation? No answer style can game it."""
    words = f" {normalize_answer(gold)} "
    return float(bool(words.strip()) and words in f" {normalize_answer(prediction)} ")


def rouge_l_recall(prediction, gold):
    """Longest common subsequence of words over the distinct words of the gold, as the package the authors used counts; 0 if a side is empty."""
    predicted, wanted = normalize_text(prediction).split(), normalize_text(gold).split()
    if not predicted or not wanted:
        return 0.0
    above = [()] * (len(wanted) + 1)                                    # the longest common subsequence of the words so far, for each part of the gold
    for word in predicted:
        row = [()]
        for j, w in enumerate(wanted):
            row.append(above[j] + (w,) if w == word else above[j + 1] if len(above[j + 1]) > len(row[j]) else row[j])
        above = row
    return len(set(above[-1])) / len(set(wanted))


def mean_and_stderr(values):
    """(mean, standard error) of a list; the error of fewer than two values is None."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --------------------------------------------------------------------------------------------------------------------
# contexts and answers


def other_contexts(keys, seed):
    """For each item the index of one that shares no part of its context, drawn at random; None where there is none. keys: a set an item."""
    draw, order, others = random.Random(seed), list(range(len(keys))), []
    for own in keys:
        draw.shuffle(order)
        others.append(next((j for j in order if not own & keys[j]), None))
    return others


def read_contexts(run, method, contexts, items, template):
    """What a method makes of contexts before the questions are asked: (prompts, keyword arguments of answer, costs, base weights to restore).
    contexts: one for all items, or one each; their costs are TFLOPs, M floats to keep and seconds, and the questions come on top."""
    model, tokenizer, base, began = run.model, run.tokenizer, run.model.base, time.time()
    prompts = [user_turn(tokenizer, item["question"]) for item in items]
    kept, weights, costs, window = {}, (), [(0.0, 0.0, {})], base.config.get_text_config().max_position_embeddings           # costs: FLOPs, floats, more
    if method.startswith("adapter"):
        read = [context_ids(tokenizer, context) for context in contexts]
        kept["memory"] = encode(model, read, tokenizer.pad_token_id)
        costs = [(context_flops(model, len(ids)), adapter_floats(model), {}) for ids in read]
    elif method in IN_CONTEXT:
        bare, costs = prompts, []
        asked = [[item["question"] for item in items]] if len(contexts) == 1 else [[item["question"]] for item in items]
        fitted = [in_context_prompts(tokenizer, template, context, questions, window - NEW_TOKENS) for context, questions in zip(contexts, asked)]
        prompts = [prompt for some, _ in fitted for prompt in some]
        for some, lost in fitted:
            past = len(some[0]) - len(bare[len(costs)])
            costs.append((base_flops(base, past, head=False), kv_cache_floats(base, past), {"past": past, "lost": lost}))
        if len(contexts) == 1:                                          # read once for all its questions
            same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*(prompt[:-1] for prompt in prompts)))
            kept["prefix"] = [column[0] for column in same]
            with torch.no_grad():
                kept["cache"] = base.get_decoder()(input_ids=torch.tensor([kept["prefix"]], device=base.device), use_cache=True).past_key_values
    elif method == "fine-tuned":
        weights = [p.data for p in base.parameters()]
        train, dev = ([conversation(tokenizer, [(row["question"], row["golds"][0])], window) for row in rows] for rows in contexts[0])
        for p in base.parameters():                                     # steps of 1e-5 would be lost in bfloat16
            p.data = p.data.to(torch.float32, copy=True)
        losses = fit_base(base, train, dev, lr=1e-5, batch_size=16, epochs=40, patience=3, seed=run.args.seed, pad=tokenizer.pad_token_id)
        forward, validation = (sum(base_flops(base, len(ids)) for ids, _ in examples) for examples in (train, dev))
        epochs = len(losses) - 1                                        # the backward pass costs two forward passes
        costs = [(epochs * 3 * forward + len(losses) * validation, sum(p.numel() for p in base.parameters()), {})]
    # different conversations are read with their questions in one pass, whose parts have no times of their own
    seconds = {} if method == "full-conversation" else {"contextualisation_seconds": (time.time() - began) / len(contexts) if kept or weights else 0.0}
    costs = [{"contextualisation_tflops": flops / 1e12, "storage_mfloats": floats / 1e6, **seconds, **more} for flops, floats, more in costs]
    return prompts, kept, costs * (len(items) // len(costs)), weights


def predict(run, method, groups, score, template=IN_CONTEXT_PROMPT, **where):
    """Records of the answers to groups, scores included; from the predictions file where it has them. A group is (contexts, items): one
    context for all its items or one each; an item has number, id, question and golds; where is the condition, part of a record's key.

    A batch is computed whole if one of its answers is missing: padded as in an unbroken run, it gives the same answers to the last bit."""
    args, model, name, records = run.args, run.model, " ".join([method, *map(str, where.values())]), []
    digest = fingerprint(run, method, template)
    with tqdm(total=sum(len(items) for _, items in groups), desc=name, unit="question", leave=None) as bar:
        for group, (contexts, items) in enumerate(groups):
            read = None
            for at in range(0, len(items), args.batch_size):
                batch = slice(at, at + args.batch_size)
                keys = [f"{args.task} {name} group {group} item {item['number']} {digest}" for item in items[batch]]
                if not all(key in run.done for key in keys):
                    prompts, kept, costs, weights = read = read or read_contexts(run, method, contexts, items, template)
                    answers = answer(model, run.tokenizer, prompts[batch], new_tokens=10 if args.task == "metaicl" else NEW_TOKENS, **kept)
                    for key, item, prompt, cost, text, new in zip(keys, items[batch], prompts[batch], costs[batch], *answers):
                        # the KV cache of the context is reused, as in Table 1; the adapter is merged into the weights and costs nothing more
                        past = cost.get("past", 0)
                        run.write({"key": key, "task": args.task, "method": method, **where, "id": item["id"], "question": item["question"],
                                   "gold": min(item["golds"], key=len), "golds": item["golds"], "prediction": text, **score(text, item["golds"]),
                                   "inference_tflops": base_flops(model.base, len(prompt) - past + new, past) / 1e12, **cost})
                records += [{**run.done[key], **score(run.done[key]["prediction"], item["golds"])} for key, item in zip(keys, items[batch])]
                bar.update(len(keys))
            for p, before in zip(model.base.parameters(), read[-1] if read else ()):
                p.data = before
    if lost := sum(record.get("lost", 0) > 0 for record in records):
        run.note(f"{name}: {lost} of {len(records)} prompts do not fit the base's window and lose the beginning of their context")
    return records


def fingerprint(run, method, template=""):
    """Hash of what an answer depends on beside its question: base, data and flags, and for adapters the generator."""
    facts = [*run.facts, template, run.model.generator.fingerprint() if method.startswith("adapter") else ""]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# tasks: each yields the rows of its table


def qa_scores(prediction, golds):
    """Against the shortest gold, as the authors score (f1, em, rougeL_recall); the best over the golds, as SQuAD does (_max); recall of any."""
    gold = min(golds, key=len)
    return {"f1": f1_score(prediction, gold), "em": exact_match(prediction, gold), "f1_max": max(f1_score(prediction, g) for g in golds),
            "em_max": max(exact_match(prediction, g) for g in golds), "recall": max(recall(prediction, g) for g in golds), "rougeL_recall": rouge_l_recall(prediction, gold)}


def icl_scores(prediction, golds):
    """Exact match but for case, of a prediction without the "Output:" it may repeat, as the authors count."""
    return {"accuracy": float(prediction.replace("Output:", "").strip().lower() == golds[0].strip().lower())}


def table_row(records, began, **what):
    """what, then mean and standard error of every metric, 0 to 100, and mean costs over the questions: a query's, and its context's."""
    row = {**what, "n": len(records)}
    for key in METRICS:
        if key in records[0]:
            mean, error = mean_and_stderr([record[key] for record in records])
            row[key], row[key + "_stderr"] = 100 * mean, None if error is None else 100 * error
    costs = {key: statistics.fmean(record[key] for record in records) for key in COSTS if key in records[0]}
    return {**row, **costs, "seconds": time.time() - began}


def evaluate_msc(run, everything):
    """Table 1. The adapter, its control and closed-book see the identical prompt, the bare question; only full-conversation reads the text."""
    args, size = run.args, run.args.batch_size
    others = other_contexts([set(row["sessions"]) for row in everything], args.seed)
    contexts = ["\n\n".join(row["sessions"]) for row in everything]
    items = [{"number": i, "id": row["id"], "question": row["question"], "golds": [row["answer"]]} for i, row in enumerate(everything[:args.limit])]
    for method in args.method:
        shuffled, began = method == "adapter-shuffled", time.time()
        asked = [item for item in items if not shuffled or others[item["number"]] is not None]
        if not asked:
            run.note(f"{method} is left out: no two conversations without a session in common")
            continue
        batches = [asked[at:at + size] for at in range(0, len(asked), size)]              # contexts differ: a batch of them is read side by side
        groups = [([contexts[others[item["number"]] if shuffled else item["number"]] for item in batch], batch) for batch in batches]
        row = table_row(predict(run, method, groups, qa_scores), began, method=method)
        yield {key: value for key, value in row.items() if "_max" not in key}             # a question has one gold


def evaluate_qa(run, documents):
    """Fig. 2, Fig. 3, Table 5: documents in the order of the data, split evenly into ceil(tokens / k) groups, each the context of all its
    questions. Closed-book has no context: one row, of length 0. Lengths that make the same groups share their answers."""
    args, lengths, documents = run.args, run.args.context_lengths or QA_LENGTHS, documents[:run.args.limit]
    total = sum(map(len, tokenize(run.tokenizer, [document["text"] for document in documents])))
    if len(documents) == 1 or total <= max(lengths):
        run.note(f"the documents hold {total} tokens: longer contexts are all the same single group, to which adapter-shuffled has no other")
    for method in args.method:
        for length in [0] if method == "closed-book" else lengths:
            began, count = time.time(), min(-(-total // length), len(documents)) if length else 1
            parts = np.array_split(range(len(documents)), count)
            texts = ["\n\n".join(documents[i]["text"] for i in part) for part in parts] if length else [None]
            others = other_contexts([{g} for g in range(count)], args.seed) if method == "adapter-shuffled" else range(count)
            if None in others:
                continue
            groups = [([texts[other]], [item for i in part for item in documents[i]["questions"]]) for other, part in zip(others, parts)]
            yield table_row(predict(run, method, groups, qa_scores, parts=count), began, method=method, context_length=length, groups=count)


def evaluate_metaicl(run, tasks):
    """Fig. 4 to 6: a row for each method, number of shots and task, then averages over tasks. An item's accuracy is its mean over the
    demonstration seeds; the standard error is over items, and an average's follows from its tasks'."""
    args, names, averages = run.args, list(tasks), []
    others = other_contexts([{name} for name in names], args.seed)
    for method in args.method:
        if method == "adapter-shuffled" and None in others:
            run.note(f"{method} is left out: it takes another task's demonstrations, and {names[0]} is the only task")
            continue
        for shots in [0] if method in ("zero-shot", "fine-tuned") else args.shots:
            rows = {}
            for name, other in tqdm(list(zip(names, others)), desc=f"{method}, {shots} shots", unit="task"):
                items, began = tasks[name]["test"][:args.limit], time.time()
                groups = [([None], items)]
                if method != "zero-shot":
                    examples = [tasks[names[other] if method == "adapter-shuffled" else name][seed] for seed in args.demo_seeds]
                    drawn = [random.Random(args.seed).sample(train, len(train))[:shots] for train, _ in examples]         # fewer shots are a part of more
                    contexts = examples if method == "fine-tuned" else ["\n\n".join(f"{row['question']} {row['golds'][0]}" for row in rows) for rows in drawn]
                    groups = [([context], items) for context in contexts]
                records = predict(run, method, groups, icl_scores, METAICL_PROMPT, name=name, shots=shots)
                means = [{key: statistics.fmean(record[key] for record in records[i::len(items)]) for key in ("accuracy", *COSTS)} for i in range(len(items))]
                rows[name] = table_row(means, began, method=method, task=name, shots=shots)
                yield rows[name]
            for label, wanted in (("classification", METAICL_CLASSIFICATION), ("non-classification", METAICL_OTHER), ("all", names)):
                if part := [rows[name] for name in wanted if name in rows]:
                    row, errors = table_row([{**row, "accuracy": row["accuracy"] / 100} for row in part], 0, method=method, task=label, shots=shots), [row["accuracy_stderr"] for row in part]
                    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / len(part)
                    averages.append({**row, "n": sum(row["n"] for row in part), "accuracy_stderr": error, "seconds": sum(row["seconds"] for row in part)})
    yield from averages


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

    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if not key.endswith("_stderr")]
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
    add("--seed", type=int, default=0, help="of the shuffled control and of the demonstrations drawn")
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
            (min(args.batch_size, *(args.context_lengths or [1]), *args.shots, args.limit or (1 if args.limit is None else 0)) < 1, "--batch-size, --limit, --context-lengths and --shots must be at least 1"),
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
