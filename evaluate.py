"""The paper's evaluation (§4, §5): each method beside its baselines and its control, in one table.

    python evaluate.py --task msc                             # Table 1: conversations; built-in sample
    python evaluate.py --task squad --limit 20 --plot squad.png              # Fig. 2, Fig. 3, Table 5
    python evaluate.py --task squad --data own.jsonl --context-lengths 1        # a document a context
    python evaluate.py --task streamingqa --data streamingqa.csv --base out/sft --method closed-book
    python evaluate.py --task metaicl --data metaicl --predictions p.jsonl   # Fig. 4; can be continued
    python evaluate.py --task ppl --data validation.parquet --checkpoint out/run/step-000100 # Table 2
    python evaluate.py --task ask --context notes.txt --question "Who owns the boat?" --compare

What is read, what is asked and how it is scored stands in tasks/, a file for each task.

Methods: closed-book (bare question; the paper's, with an instruction, is closed-book-instructed),
full-conversation / in-context / few-shot (context in the prompt), adapter (bare question, context
in the weights) and adapter-shuffled, the control: the adapters of OTHER contexts. What a generator
remembers is the gap between the last two in nats, the negative log-likelihood of the right answer,
per token: a generator that has only learnt an answer style has no gap.
"""

import argparse
import collections
import copy
import hashlib
import json
import math
import os
import platform
import re
import statistics
import string

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from generator import GeneratorConfig, Memory
from model import AdaptedLM, load_base
from support.bases import DEFAULT_BASE
from support.costs import COSTS, base_flops, clock, context_costs, kv_cache_floats, query_costs
from support.files import InputError, hub_reachable, run_command, stamps
from support.formats import checkpoint_base
from support.plots import write_table
from support.text import context_ids, tokenize, user_turn
from tasks import metaicl, msc, ppl, qa

TASKS = {"msc": msc, "squad": qa, "streamingqa": qa, "metaicl": metaicl, "ppl": ppl}
DEFAULT_CHECKPOINT = os.path.join(os.path.dirname(__file__), "assets", "smollm2-135m")
MEMORY_FLOATS = 1e9       # of the memories of contexts that are kept for later questions
KV_FLOATS = 4e9           # of the copies of a KV cache that stand in memory at once
NOTHING_READ = {"contextualisation_tflops": 0.0, "storage_mfloats": 0.0, "contextualisation_seconds": 0.0}


# --------------------------------------------------------------------------------------------------------------------
# metrics, 0 to 1


def normalize_text(text):
    """Lower case, no ASCII punctuation, single spaces."""
    without = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(without.split())


def normalize_answer(text):
    """SQuAD's normalisation: normalize_text without the articles."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", normalize_text(text)).split())


def f1_score(prediction, gold):
    """SQuAD F1 over normalised words; 0 where they share none, also when both are empty."""
    predicted = normalize_answer(prediction).split()
    wanted = normalize_answer(gold).split()
    shared = collections.Counter(predicted) & collections.Counter(wanted)
    if not shared:
        return 0.0
    return 2 * shared.total() / (len(predicted) + len(wanted))


def exact_match(prediction, gold):
    return float(normalize_answer(prediction) == normalize_answer(gold))


def recall(prediction, gold):
    """Does the answer contain the gold, word for word after SQuAD's normalisation? More guesses, more hits."""
    words = normalize_answer(gold)
    return float(words != "" and f" {words} " in f" {normalize_answer(prediction)} ")


def rouge_l_recall(prediction, gold):
    """Distinct words of the longest common subsequence over those of the gold, as the package of the released code
    counts; 0 if a side is empty."""
    predicted = normalize_text(prediction).split()
    wanted = normalize_text(gold).split()
    if not wanted:
        return 0.0
    above = [()] * (len(wanted) + 1)           # above[j]: of the predicted words so far and wanted[:j]
    for word in predicted:
        row = [()]
        for j, w in enumerate(wanted):
            if w == word:
                row.append(above[j] + (word,))
            else:
                row.append(max(above[j + 1], row[j], key=len))
        above = row
    return len(set(above[-1])) / len(set(wanted))


def accuracy(prediction, gold):
    """Exact match but for case, of a prediction without the "Output:" it may repeat, as the released code counts."""
    return float(prediction.replace("Output:", "").strip().lower() == gold.strip().lower())


METRICS = {"f1": f1_score, "em": exact_match, "f1_max": f1_score, "em_max": exact_match, "recall": recall,
           "rougeL_recall": rouge_l_recall, "accuracy": accuracy}


def scores(prediction, golds, names):
    """{name: score}. f1, em, rougeL_recall and accuracy: against the shortest gold, as the released code scores; recall
    and .._max: the best over the golds, as SQuAD does."""
    row = {}
    for name in names:
        against = [min(golds, key=len)]
        if name == "recall" or name.endswith("_max"):
            against = golds
        row[name] = max(METRICS[name](prediction, gold) for gold in against)
    return row


# --------------------------------------------------------------------------------------------------------------------
# means, standard errors and the gap


def mean_and_stderr(values, clusters=None):
    """(mean, standard error) of a list; the error is cluster-robust where clusters labels the values, and None where
    there is a single cluster."""
    mean = statistics.fmean(values)
    sums = collections.defaultdict(float)
    for value, label in zip(values, clusters or range(len(values))):
        sums[label] += value - mean
    G = len(sums)
    if G == 1:
        return mean, None
    squares = G / (G - 1) * sum(s**2 for s in sums.values())
    return mean, squares**0.5 / len(values)


def add_mean(row, name, pairs):
    """Put the mean of pairs (value, cluster) and its standard error into a row, nothing where there are none."""
    if pairs:
        row[name], row[f"{name}_stderr"] = mean_and_stderr(*zip(*pairs))


def memory_gap(own, controls, closed_book=()):
    """What an adapter knows of ITS context, from the records of adapter, adapter-shuffled and closed-book, paired by
    question, standard errors clustered by context.

    gain: nats of the gold closed-book minus under its own; gap: under the others (their mean) minus under its own;
    best-of-K: share of questions whose own memory gives the fewest nats (ties are shared); chance: 100 / K. K: the
    controls, as many for all, and the own.
    """
    without = {record["number"]: record["nats"] for record in closed_book}
    others = {(record["cluster"], record["number"]): record["control_nats"] for record in controls}
    row = {}
    gains, gaps, firsts = [], [], []                        # (value, cluster)
    for record in own:
        nats, cluster, number = record["nats"], record["cluster"], record["number"]
        if number in without:
            gains.append((without[number] - nats, cluster))
        other = others.get((cluster, number))
        if other:
            K = 1 + len(other)
            gaps.append((statistics.fmean(other) - nats, cluster))
            firsts.append((100 * (nats <= min(other)) / (1 + other.count(nats)), cluster))
    add_mean(row, "gain", gains)
    add_mean(row, "gap", gaps)
    if gaps:
        add_mean(row, f"best-of-{K}", firsts)
        row["chance"] = 100 / K
    if 0 < len(gaps) < len(own):
        row["pairs"] = len(gaps)
    return row


def mean_scores(records, gap):
    """A row of the table: n questions, nats, memory_gap, metrics from 0 to 100, perplexities, costs. A question asked
    under several demonstration seeds counts once."""
    row = {"n": len({record["number"] for record in records})}
    add_mean(row, "nats", [(record["nats"], record["number"]) for record in records if "nats" in record])
    row |= gap
    for key in METRICS:
        if key in records[0]:
            add_mean(row, key, [(100 * record[key], record["number"]) for record in records])
    for key in ppl.TARGETS:
        if key in records[0]:
            mean, error = mean_and_stderr([record[key] for record in records])
            perplexity = math.exp(mean)
            row[f"ppl_{key}"] = perplexity
            row[f"ppl_{key}_stderr"] = perplexity * error                                   # delta method
    for key in COSTS:
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            row[key] = statistics.fmean(values)
    return row


# --------------------------------------------------------------------------------------------------------------------
# prompts in, answers and nats out


def greedy_answers(model, tokenizer, prompts, new_tokens, memory=None, prefix=(), cache=None):
    """Greedy answers to prompts (lists of ids), to their first newline, the number of tokens generated for each, and
    whether new_tokens cut it short. cache: the base's KV cache of prefix, ids with which every prompt begins."""
    device = model.base.device
    P = len(prefix)
    batch = tokenizer.pad({"input_ids": [prompt[P:] for prompt in prompts]}, padding_side="left", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]                                 # (B, L)
    if cache is not None:                                   # prefix, padding, rest: positions are counted by the mask
        ids = torch.cat([torch.tensor([prefix]).expand(len(ids), P), ids], 1)               # (B, P + L)
        mask = F.pad(mask, (P, 0), value=1)                                                 # (B, P + L)
        cache = copies(cache, len(ids))
    out = model.generate(ids.to(device), memory, attention_mask=mask.to(device), past_key_values=cache,
                         max_new_tokens=new_tokens)                                         # (B, P + L + new)
    new = out[:, ids.shape[1]:]                                                             # (B, new)
    ends = torch.tensor(model.base.generation_config.eos_token_id, device=device)
    ended = torch.isin(new, ends).cumsum(1)                                                 # 0 before an answer's end
    counts = (1 + (ended == 0).sum(1)).clamp(max=new.shape[1])                              # (B,), its end included
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    cut = [not end and "\n" not in text for text, end in zip(texts, ended[:, -1])]
    return [text.split("\n")[0].strip() for text in texts], counts.tolist(), cut


@torch.no_grad()
def gold_nats(model, tokenizer, prompts, golds, memory=None, prefix=(), cache=None):
    """Teacher-forced nats a token of each gold after its prompt, the end token left out: a list, from one forward pass.
    memory, prefix, cache: as in greedy_answers."""
    golds = tokenize(tokenizer, [gold.strip() for gold in golds])
    rows = [prompt[len(prefix):] + gold for prompt, gold in zip(prompts, golds)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"].to(model.base.device)                                          # (B, L)
    if cache is None:
        logits = model(ids, memory=memory)                                                  # (B, L, V)
    else:
        logits = model.base(input_ids=ids, past_key_values=copies(cache, len(rows))).logits
    nats = []
    for b, gold in enumerate(golds):
        end = len(rows[b])
        start = end - len(gold)
        nats.append(F.cross_entropy(logits[b, start - 1:end - 1].float(), ids[b, start:end]).item())
    return nats


def copies(cache, rows):
    """A KV cache of one row as one of many, the original unchanged."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def answer(model, tokenizer, task, questions, prompts, costs, memories=(None,), prefix=(), cache=None):
    """Records of a batch of questions: greedy answers, their scores, nats of the shortest gold, costs.

    costs: of reading the context, a dict for each question. memories: the answers are under the first, the nats are
    the mean over all. prefix, cache: as in greedy_answers.
    """
    golds = [min(question["golds"], key=len) for question in questions]
    texts, new_tokens, _ = greedy_answers(model, tokenizer, prompts, task.NEW_TOKENS, memories[0], prefix, cache)
    nats = [gold_nats(model, tokenizer, prompts, golds, memory, prefix, cache) for memory in memories]
    records = []
    for b, question in enumerate(questions):
        each = [row[b] for row in nats]
        past = costs[b].get("past", 0)                      # of a context, reused; an adapter counts as merged
        tokens = len(prompts[b]) - past + new_tokens[b]
        records.append({**question, "gold": golds[b], "prediction": texts[b], "nats": statistics.fmean(each),
                        "control_nats": each, **scores(texts[b], question["golds"], task.METRICS),
                        **query_costs(model.base, tokens, past), **costs[b]})
    return records


# --------------------------------------------------------------------------------------------------------------------
# methods: what each makes of contexts


def bare_question(model, tokenizer, task, template, questions, costs, memories=(None,)):
    """The bare question, or with an instruction, as one user turn; of itself it reads nothing."""
    prompts = [user_turn(tokenizer, template.format(**question)) for question in questions]
    return answer(model, tokenizer, task, questions, prompts, costs, memories)


def adapter(model, tokenizer, task, template, contexts, questions, memories):
    """The context in the weights. contexts: for each question its own one, or K other ones: the answers are under the
    first, the nats are the mean over all."""
    under = []                                              # the k-th memories of all questions
    costs = []                                              # of the first contexts, then of the others
    for texts in zip(*contexts):
        batch = []
        for text in texts:
            memory, cost = read_context(model, tokenizer, text, memories)
            batch.append(memory)
            costs.append(cost)
        if len(set(texts)) > 1:                             # of one context a batch of 1 serves every row
            memory = Memory.stack(batch)                    # side by side: row b is for question b
        under.append(memory)
    return bare_question(model, tokenizer, task, template, questions, costs, under)


def read_context(model, tokenizer, text, memories):
    """(Memory, costs) of a context. memories: {text: the same} of those read before, of which the oldest are dropped:
    a context is read once for all its questions and for those whose control it is."""
    if text in memories:
        return memories[text]
    ids = context_ids(tokenizer, text)
    began = clock(model.base.device)
    memory = model.read(ids)
    costs = context_costs(model, len(ids))
    costs["contextualisation_seconds"] = clock(model.base.device) - began
    costs["context_tokens"] = len(ids)
    memories[text] = memory, costs
    size = sum(S.numel() for S in memory.states.values())
    if len(memories) * size > MEMORY_FLOATS:
        memories.pop(next(iter(memories)))
    return memory, costs


def in_context(model, tokenizer, task, template, context, questions, batch_size):
    """The context in the prompt: its questions share the KV cache of what their prompts begin with, unless the base has
    a sliding window shorter than a prompt: that would count the padding which follows a shared cache."""
    base = model.base
    golds = tokenize(tokenizer, [min(question["golds"], key=len) for question in questions])
    new_tokens = max(task.NEW_TOKENS, *map(len, golds))
    most = model.window - new_tokens
    prompts, lost = in_context_prompts(tokenizer, template, context, questions, most)
    # costs count what the context adds to the bare question; the cache holds all that the prompts have in common, but
    # for their last token: each needs something to go on from
    past = len(prompts[0]) - len(user_turn(tokenizer, questions[0]["question"]))
    longest = max(map(len, prompts))
    prefix = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    sliding = getattr(base.config.get_text_config(), "sliding_window", None)
    if sliding and sliding < longest + new_tokens:
        prefix = []
    cache = None
    began = clock(base.device)
    if prefix:
        with torch.no_grad():
            ids = torch.tensor([prefix], device=base.device)                                # (1, P)
            cache = base.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    costs = {"contextualisation_tflops": base_flops(base, past, head=False) / 1e12,
             "storage_mfloats": kv_cache_floats(base, past) / 1e6, "context_tokens": past,
             "contextualisation_seconds": clock(base.device) - began, "past": past, "lost": lost}
    copied = int(KV_FLOATS / kv_cache_floats(base, longest))
    size = max(1, min(batch_size, copied))
    records = []
    for start in range(0, len(questions), size):
        end = start + size
        records += answer(model, tokenizer, task, questions[start:end], prompts[start:end], [costs] * size,
                          prefix=prefix, cache=cache)
    return records


def in_context_prompts(tokenizer, template, context, questions, most):
    """(ids of a prompt for each question, tokens lost): where the longest prompt is more than `most` tokens, the
    context loses its beginning, as in the paper, and for all questions alike, so that they share it."""
    lost = 0
    while True:
        prompts = [user_turn(tokenizer, template.format(context=context, **question)) for question in questions]
        excess = max(map(len, prompts)) - most
        if excess <= 0:
            return prompts, lost
        ids = tokenize(tokenizer, [context])[0]
        if not ids:
            raise InputError(f"a question alone is longer than the {most} tokens that the base's window leaves for it")
        context = tokenizer.decode(ids[excess:]).lstrip("\ufffd")                           # no half a character
        lost += min(excess, len(ids))


def fine_tuned(model, tokenizer, task, template, examples, questions, args):
    """All weights of the base fitted to examples, (training rows, validation rows); then the bare question."""
    from extras.finetune import fit_task

    base = model.base
    weights = [p.data for p in base.parameters()]           # fit_task trains copies of them, which it puts in p.data
    fit_task(base, tokenizer, *examples, args.seed)
    costs = {"storage_mfloats": base.num_parameters() / 1e6}
    records = []
    for start in range(0, len(questions), args.batch_size):
        batch = questions[start:start + args.batch_size]
        records += bare_question(model, tokenizer, task, template, batch, [costs] * len(batch))
    for p, data in zip(base.parameters(), weights):
        p.data = data
    return records


# --------------------------------------------------------------------------------------------------------------------
# one loop: every method on groups of questions


def evaluate(model, tokenizer, method, setting, groups, args, memories, done, facts):
    """Records of the questions of groups [(context, other contexts, questions)] under one method.

    memories: of the contexts read so far, as in read_context. done: {key: record} of earlier runs, from the predictions
    file: a part, which is a batch or a group, is computed again if any of its keys is missing. facts: what all answers
    of this run depend on.
    """
    task = TASKS[args.task]
    template = task.PROMPTS[method]
    facts = [*facts, args.task, method, setting, template]
    if args.predictions and method.startswith("adapter"):
        facts.append(model.generator.fingerprint())
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    by_group = args.task == "ppl" or method == "fine-tuned" or "{context}" in template      # one context at a time
    parts = []                                              # a batch of questions and their contexts, or a group
    rest = []                                               # (the contexts that a question is answered under, question)
    for context, others, questions in groups:
        read = [context]
        if method == "adapter-shuffled":
            read = others
        if read:                                            # some contexts have no other
            rest += [(read, question) for question in questions]
        if by_group:
            parts.append(rest)
            rest = []
    for start in range(0, len(rest), args.batch_size):
        parts.append(rest[start:start + args.batch_size])

    records = []
    for part in tqdm(parts, desc=method, leave=None):
        contexts, questions = zip(*part)
        keys = [f"{digest} {question['cluster']} {question['number']}" for question in questions]
        if not all(key in done for key in keys):
            first = contexts[0][0]
            if args.task == "ppl":
                new = [ppl.losses(model, method, first, questions[0])]
            elif "{context}" in template:
                new = in_context(model, tokenizer, task, template, first, questions, args.batch_size)
            elif method == "fine-tuned":
                new = fine_tuned(model, tokenizer, task, template, first, questions, args)
            elif method.startswith("adapter"):
                new = adapter(model, tokenizer, task, template, contexts, questions, memories)
            else:
                new = bare_question(model, tokenizer, task, template, questions, [NOTHING_READ] * len(questions))
            for key, record in zip(keys, new):
                done[key] = {"key": key, "task": args.task, "method": method, **setting, **record}
            if args.predictions:
                with open(args.predictions, "a", encoding="utf-8", errors="backslashreplace") as file:
                    for key in keys:
                        print(json.dumps(done[key], ensure_ascii=False), file=file)
        records += [done[key] for key in keys]
    return records


def read_predictions(path):
    """{key: record} of the predictions file of earlier runs; a half-written last line is dropped. A file that holds
    anything else is left as it is."""
    done = {}
    if not path or not os.path.exists(path):
        return done
    size = 0                                                # of what is whole
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and b'{"key": '.startswith(line[:8]):
                break
            try:
                record = json.loads(line)
                done[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} line {number} is not a prediction of this script, so nothing was written: "
                                 "name another file with --predictions") from None
            size += len(line)
    os.truncate(path, size)
    return done


def longer_than_trained(chunk, tokens):
    """The note where contexts are longer than a chunk of the training: the number of chunks is recorded nowhere."""
    return (f"the generator was trained to read {chunk} tokens at a time, contexts here have about {tokens:.0f}: "
            "unless it was trained on as many, chunk after chunk, expect answers no better than the control's")


def load_model(args):
    """(AdaptedLM, tokenizer). Without --base it is the base that the checkpoint was trained for. Without --checkpoint
    it is the shipped generator on the default base, on another one (as with --checkpoint none) an untrained one, with a
    note. Fills in args.base and args.checkpoint."""
    if args.checkpoint is None:
        args.checkpoint = "none"
        if args.base in (None, DEFAULT_BASE):
            args.checkpoint = DEFAULT_CHECKPOINT
    if args.base is None:
        args.base = DEFAULT_BASE
        if args.checkpoint not in ("none", DEFAULT_CHECKPOINT):
            args.base = checkpoint_base(args.checkpoint) or DEFAULT_BASE
    torch.backends.cuda.enable_cudnn_sdp(False)             # on CUDA cuDNN builds a plan for every new shape
    base, tokenizer = load_base(args.base, args.dtype and getattr(torch, args.dtype), args.device)
    # generate takes what a config of its own leaves open from the base's: Qwen2.5's has a repetition penalty
    base.generation_config = transformers.GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=base.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    if args.checkpoint != "none":
        return AdaptedLM.from_pretrained(base, args.checkpoint), tokenizer
    print("NOTE: the generator is untrained (A1 = 0), so the adapter rows equal closed-book; train one with train.py "
          "and name it with --checkpoint")
    torch.manual_seed(args.seed)
    return AdaptedLM(base, GeneratorConfig()), tokenizer


def main(argv=None):
    args = arguments(argv)
    if args.task == "ask":
        from extras.ask import ask

        return ask(args)
    task = TASKS[args.task]
    notes = []
    if args.task == "msc" and args.data is None and not hub_reachable():
        args.data = os.path.relpath(msc.SAMPLE)
        notes.append("the hub is out of reach: this is the built-in sample of 24 conversations, NOT the paper's "
                     f"benchmark ({msc.HUB_ID})")
    args.data = args.data or task.HUB_ID
    data = task.load(args.data, args, notes)                # before the model: a bad file should not wait for that
    done = read_predictions(args.predictions)
    model, tokenizer = load_model(args)
    dtype = str(model.base.dtype).removeprefix("torch.")
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    facts = []                                              # what the answers in a predictions file depend on
    if args.predictions:
        facts = [args.base, stamps(args.base), args.data, stamps(args.data), args.limit, args.seed, args.demo_seeds,
                 args.batch_size, args.controls, dtype, model.base.device.type, versions]

    rows = []
    memories = {}
    closed_book = {}                                        # {task of MetaICL, else None: records}
    for setting, methods, groups in task.settings(data, model, tokenizer, args, notes):
        results = {}
        for method in args.method:
            if method not in methods:
                continue
            results[method] = evaluate(model, tokenizer, method, setting, groups, args, memories, done, facts)
            if method in ("closed-book", "zero-shot"):
                closed_book[setting.get("task")] = results[method]
        for method, records in results.items():
            if not records:                                 # of a control where no context has another
                continue
            gap = {}
            if method == "adapter" and args.task != "ppl":
                controls = results.get("adapter-shuffled", [])
                gap = memory_gap(records, controls, closed_book.get(setting.get("task"), []))
            rows.append({"method": method, **setting, **mean_scores(records, gap)})
            lost = [record for record in records if record.get("lost")]
            if lost:
                notes.append(f"{method}: {len(lost)} of {len(records)} prompts do not fit the base's window and lose "
                             f"the beginning of their context ({setting})")
    if args.task == "metaicl":
        rows += metaicl.averages(rows)
    if not rows:
        raise InputError(f"{args.data}: no method could be evaluated on it")
    read = [row.get("context_tokens", row.get("context_length")) for row in rows if row["method"] == "adapter"]
    if args.checkpoint != "none" and max(read, default=0) > model.config.chunk:
        notes.append(longer_than_trained(model.config.chunk, max(read)))

    notes = dict.fromkeys(notes)
    write_table(args, {**vars(args), "note": " ".join(notes) or None, "n": max(row["n"] for row in rows),
                       "dtype": dtype, "versions": versions, "prompts": task.PROMPTS, "rows": rows})
    for note in notes:
        print(f"NOTE: {note}")
    for path in (args.output, args.predictions, args.plot):
        if path:
            print(f"written: {path}")


# --------------------------------------------------------------------------------------------------------------------
# the command line


def positive(text):
    """A number of at least 1, for argparse, which names the flag where it is not."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def arguments(argv=None):
    """The flags, checked before anything is loaded. Raises InputError naming the flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=["ask", *TASKS], required=True)
    add("--data", help="hub id, .parquet or .jsonl; streamingqa: .csv; metaicl: hub id or directory; default: the "
        "paper's on the hub, msc without a connection: the built-in sample")
    add("--limit", type=positive, help="conversations, documents or, metaicl, test items a task; default: all, ppl 100")
    add("--context-lengths", type=positive, nargs="+", help="tokens. squad, streamingqa: documents are joined to "
        "contexts of about so many, 1 makes each a context of its own; default 512 to 32768, doubling. ppl: 1024")
    add("--shots", type=positive, nargs="+", help="metaicl: demonstrations; default 1 2 4 8 16")
    add("--demo-seeds", type=int, nargs="+", choices=metaicl.SEEDS,
        help="metaicl: their files; default 100 13 21 42 87")
    add = parser.add_argument_group("model").add_argument
    add("--base", help=f"hub id, directory or .gguf file; default: the checkpoint's, or {DEFAULT_BASE}")
    add("--checkpoint", help="generator: directory or hub id, or none, an untrained one; default: the shipped one, on "
        "another base none")
    add("--device", help="the base must fit on it; default: cuda where there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the hardware has it")
    add("--batch-size", type=positive, default=4, help="questions at once; default 4")
    add = parser.add_argument_group("methods").add_argument
    add("--method", action="append", help="repeatable; default: all of the task but -instructed and fine-tuned")
    add("--controls", type=positive, default=4, help="other contexts under which the gold is scored; the answer is "
        "under the first; default 4")
    add("--seed", type=int, default=0, help="of the control and of the demonstrations drawn; default 0")
    add = parser.add_argument_group("output").add_argument
    add("--output", help="file for the table and its circumstances as JSON; default: only print it")
    add("--predictions", help="file to which every prediction is appended as JSONL, from which a run that was stopped "
        "continues; default: none")
    add("--plot", help="file for a figure of the table: .png, .svg or .pdf; default: none")
    add = parser.add_argument_group("--task ask, your own text and questions").add_argument
    add("--context", action="append", help="file of text to read, - for standard input; repeatable")
    add("--question", action="append", help="repeatable; default: typed in, until an empty line")
    add("--memory", help="file of what was read, .safetensors: loaded if it exists, read on into, saved; default: "
        "nothing is kept")
    add("--export", help="directory to write the adapter of the context to, as a PEFT LoRA; default: not")
    add("--compare", action="store_true", help="the closed-book and the in-context answer beside it; default: not")
    args = parser.parse_args(argv)

    tasks_of = {"context_lengths": ["squad", "streamingqa", "ppl"]}
    tasks_of |= dict.fromkeys(["shots", "demo_seeds"], ["metaicl"])
    tasks_of |= dict.fromkeys(["context", "question", "memory", "export", "compare"], ["ask"])
    tasks_of |= dict.fromkeys(["data", "method", "limit", "output", "predictions", "plot"], TASKS)
    for flag, tasks in tasks_of.items():
        if getattr(args, flag) and args.task not in tasks:
            raise InputError(f"--{flag.replace('_', '-')} belongs to --task {' or '.join(tasks)}")
    if args.task in ("ppl", "streamingqa") and not args.data:
        raise InputError(f"--task {args.task} has no data set on the hub, and the paper's cerebras/SlimPajama-627B "
                         "cannot be read from it any more: give --data")
    if args.task != "ask":
        task = TASKS[args.task]
        args.method = list(dict.fromkeys(args.method or task.METHODS))
        for method in args.method:
            if method not in task.PROMPTS:
                raise InputError(f"--method {method} is unknown: choose from {', '.join(task.PROMPTS)}")
    files = {os.path.realpath(path) for path in [args.data or "", *(args.context or [])]}
    for flag in ("output", "predictions", "plot", "memory"):
        path = getattr(args, flag)
        if not path:
            continue
        if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
            raise InputError(f"--{flag} {path} cannot be written: name a file in a directory that exists and can be "
                             "written")
        if os.path.realpath(path) in files:
            raise InputError(f"--{flag} {path} is the file of another flag: name another")
        files.add(os.path.realpath(path))
    if args.plot and not args.plot.endswith((".png", ".svg", ".pdf")):
        raise InputError("--plot must be a .png, .svg or .pdf")
    if args.export and os.path.exists(args.export):
        raise InputError(f"--export {args.export} exists already: name another")
    if args.context and "-" in args.context and not args.question:
        raise InputError("--context - reads standard input, so questions cannot be typed in: give them with --question")
    if not all(question.strip() for question in args.question or []):
        raise InputError("--question is empty: ask something, or leave it out to type questions in")
    return args


if __name__ == "__main__":
    run_command(main)
