"""Fig. 4, 5, 6: MetaICL's 26 test tasks (its setting hr_to_lr, Table 4), learnt from k demonstrations.

Read:    the first k of a training file's 16 examples, as in the released code (the paper: of the development split),
         in a seeded order, so that fewer are a part of more; each demonstration seed has its file.
Asked:   the test items of seed 100, as in the released code: "Input: ..", to be continued after "Output:".
Scored:  exact match but for case, of generated text as in the released code (MetaICL's own pipeline takes the most
         likely option); nats of the output. A row for each task, then means over classification, non-classification
         and all tasks.
Control: the demonstrations of other tasks.
Besides: fine-tuned, all weights of the base fitted to the 16 examples; only with --method.
"""

import math
import os
import random

from support.files import InputError, field, hub_snapshot, read_rows
from tasks.contexts import other_contexts

HUB_ID = "allenai/metaicl-data"
SEEDS = [100, 13, 21, 42, 87]
SHOTS = [1, 2, 4, 8, 16]
KINDS = {                                                   # by the task_type of MetaICL's configuration files
    "classification": (
        "financial_phrasebank", "glue-mrpc", "sick", "medical_questions_pairs", "poem_sentiment", "glue-wnli",
        "climate_fever", "ethos-national_origin", "ethos-race", "ethos-religion", "hate_speech18", "glue-rte",
        "superglue-cb", "tweet_eval-hate", "tweet_eval-stance_atheism", "tweet_eval-stance_feminist"),
    "non-classification": (
        "quarel", "openbookqa", "codah", "qasc", "dream", "commonsense_qa", "quartz-with_knowledge",
        "quartz-no_knowledge", "ai2_arc", "superglue-copa"),
}
TASKS = sum(KINDS.values(), ())

# Fig. 7. The question is an example without its output. The released prompt begins "## Instruction:"
FEW_SHOT_PROMPT = (
    "{context}\n\nInstruction: Based on the demonstration above, provide a short and concise answer, without any "
    "explanation or additional words.\n\n{question}")
ZERO_SHOT_PROMPT = (
    "Instruction: Provide a short and concise answer, without any explanation or additional words.\n\n{question}")

METHODS = ["zero-shot", "few-shot", "few-shot-bare", "adapter", "adapter-shuffled"]
PROMPTS = {
    "zero-shot": "{question}",
    "zero-shot-instructed": ZERO_SHOT_PROMPT,               # the paper's zero-shot; only with --method
    "few-shot": FEW_SHOT_PROMPT,                            # the paper's for Llama2
    "few-shot-bare": "{context}\n\n{question}",             # the paper's for Mistral
    "fine-tuned": "{question}",                             # only with --method
    "adapter": "{question}",
    "adapter-shuffled": "{question}",
}
METRICS = ["accuracy"]
NEW_TOKENS = 10


def load(source, args, notes):
    """The test tasks found in a directory of MetaICL's layout, or such a data set on the hub: {task: {"test": rows,
    seed: (train rows, dev rows)}}, a row {"number", "id", "question", "golds": [text]}. Dev files are read for
    fine-tuned alone."""
    seeds = args.demo_seeds or SEEDS
    shots = max(args.shots or SHOTS)
    directory = source
    if not os.path.exists(source):
        patterns = [f"data/{task}/{task}_16_*.jsonl" for task in TASKS]
        directory = os.path.join(hub_snapshot(source, patterns, repo_type="dataset"), "data")
    tasks = {}
    for task in TASKS:
        if not os.path.isdir(os.path.join(directory, task)):
            continue
        prefix = os.path.join(directory, task, f"{task}_16_")
        tasks[task] = {}
        for seed in seeds:
            train = read_examples(f"{prefix}{seed}_train.jsonl", task)
            dev = []
            if "fine-tuned" in args.method:
                dev = read_examples(f"{prefix}{seed}_dev.jsonl", task)
            if len(train) < shots:
                raise InputError(f"{source}: {task} has {len(train)} training examples, fewer than --shots {shots}")
            tasks[task][seed] = train, dev
        tasks[task]["test"] = read_examples(f"{prefix}100_test.jsonl", task)
    if not tasks:
        raise InputError(f"{source}: none of MetaICL's 26 test tasks is there; give a directory with "
                         "<task>/<task>_16_<seed>_train.jsonl, .._dev.jsonl and .._test.jsonl")
    return tasks


def read_examples(path, task):
    rows = []
    for number, (where, row) in enumerate(read_rows(path)):
        question = f"Input: {field(row, 'input', str, where, blank=False)}\nOutput:"
        rows.append({"number": number, "id": f"{task} {number}", "question": question,
                     "golds": [field(row, "output", str, where, blank=False)]})
    return rows


def settings(tasks, model, tokenizer, args, notes):
    """Yield (setting, methods, [(context, other contexts, questions)]): each task without demonstrations, then with
    each number of them. A group is a demonstration seed; the context of fine-tuned is (train rows, dev rows)."""
    names = list(tasks)
    seeds = args.demo_seeds or SEEDS
    notes.append(f"{len(names)} of MetaICL's 26 test tasks averaged")
    others = other_contexts([{name} for name in names], args, notes)

    def questions(name, seed):
        return [{**row, "cluster": seed} for row in tasks[name]["test"][:args.limit]]

    def demonstrations(name, seed, shots):
        train, _ = tasks[name][seed]
        drawn = random.Random(args.seed).sample(train, len(train))[:shots]
        return "\n\n".join(f"{row['question']} {row['golds'][0]}" for row in drawn)

    for name in names:
        setting = {"task": name, "shots": 0}
        yield setting, ["zero-shot", "zero-shot-instructed"], [(None, [], questions(name, 0))]
        yield setting, ["fine-tuned"], [(tasks[name][seed], [], questions(name, seed)) for seed in seeds]
    for shots in args.shots or SHOTS:
        for name, controls in zip(names, others):
            groups = []
            for seed in seeds:
                context = demonstrations(name, seed, shots)
                other = [demonstrations(names[j], seed, shots) for j in controls]
                groups.append((context, other, questions(name, seed)))
            setting = {"task": name, "shots": shots}
            yield setting, ["few-shot", "few-shot-bare", "adapter", "adapter-shuffled"], groups


def averages(rows):
    """Rows of means over tasks, for each method and number of shots; a standard error follows from those of the
    tasks."""
    means = []
    for kind, tasks in {**KINDS, "all": TASKS}.items():
        parts = {}                                          # the rows of each method and number of shots
        for row in rows:
            if row["task"] in tasks:
                parts.setdefault((row["method"], row["shots"]), []).append(row)
        for (method, shots), part in parts.items():
            mean = {"method": method, "task": kind, "shots": shots, "n": sum(row["n"] for row in part)}
            for key in part[0]:
                numbers = [row.get(key) for row in part]
                if key in mean or None in numbers:
                    continue
                mean[key] = sum(numbers) / len(part)
                if key.endswith("_stderr"):
                    mean[key] = math.hypot(*numbers) / len(part)
            means.append(mean)
    return means
