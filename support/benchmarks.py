"""The benchmarks of §4 and their prompts: MSC, SQuAD, StreamingQA, MetaICL. evaluate.py needs it, training not."""

import itertools
import os
import random
import re

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from support.files import InputError, bad_input, field, hub_reachable, read_rows
from data import demonstration
from support.text import context_ids, tokenize, user_turn, whole_words

HUB_IDS = {"msc": "MemGPT/MSC-Self-Instruct", "squad": "rajpurkar/squad", "metaicl": "allenai/metaicl-data"}
MSC_SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "msc_sample.jsonl")
SPANS = ("oracle turn", "oracle turn ± 2", "oracle session", "conversation")      # the gold located the oracle ones

# Fig. 7: one user turn. MetaICL's context is demonstrations, its question one without an output
IN_CONTEXT_PROMPT = (
    "{context}\n\nInstruction: Answer the question based on the context above. Respond with a short phrase only. "
    "Keep the answer short and concise, without any explanation or additional words\n\nQuestion: {question}\n\nAnswer:")
ZERO_SHOT_PROMPT = (
    "Instruction: Provide a short and concise answer, without any explanation or additional words.\n\n{question}")
CLOSED_BOOK_PROMPT = IN_CONTEXT_PROMPT.replace("{context}\n\n", "").replace(" based on the context above", "")
METAICL_PROMPT = "{context}\n\n" + ZERO_SHOT_PROMPT.replace("Provide", "Based on the demonstration above, provide")
IN_CONTEXT = ("in-context", "full-conversation", "few-shot")         # the methods with the context in the prompt
METAICL_SEEDS = [100, 13, 21, 42, 87]
# the 26 test tasks of MetaICL's hr_to_lr setting (Table 4), split by the task_type of its configuration files
METAICL_KINDS = {
    "classification": (
        "financial_phrasebank", "glue-mrpc", "sick", "medical_questions_pairs", "poem_sentiment", "glue-wnli",
        "climate_fever", "ethos-national_origin", "ethos-race", "ethos-religion", "hate_speech18", "glue-rte",
        "superglue-cb", "tweet_eval-hate", "tweet_eval-stance_atheism", "tweet_eval-stance_feminist"),
    "non-classification": (
        "quarel", "openbookqa", "codah", "qasc", "dream", "commonsense_qa", "quartz-with_knowledge",
        "quartz-no_knowledge", "ai2_arc", "superglue-copa")}


def prompt_template(task, method):
    """What a method puts into its user turn."""
    if method in IN_CONTEXT:
        return METAICL_PROMPT if task == "metaicl" else IN_CONTEXT_PROMPT
    if method.endswith("-instructed"):
        return ZERO_SHOT_PROMPT if task == "metaicl" else CLOSED_BOOK_PROMPT
    return "{question}"


def in_context_prompts(tokenizer, template, context, questions, room):
    """(ids of a prompt for each question, tokens lost): where the longest prompt is more than room tokens, the context
    loses its beginning, as in the paper, and for all questions alike, so that they share it."""
    def prompt(question):
        return user_turn(tokenizer, template.format(context=context, question=question))

    longest, lost = max(questions, key=lambda question: len(tokenize(tokenizer, [question])[0])), 0
    while (excess := len(prompt(longest)) - room) > 0:
        ids = tokenize(tokenizer, [context])[0]
        if not ids:
            raise InputError(f"a question alone is longer than the {room} tokens that the base's window leaves for it")
        context = tokenizer.decode(ids[excess:]).lstrip("\ufffd")                              # no half a character
        lost += min(excess, len(ids))
    return [prompt(question) for question in questions], lost


def load_data(args, note):
    """The data of the task, read before the model: a bad file should not have to wait for that to load."""
    if args.task == "msc" and args.data is None and not hub_reachable():
        args.data = MSC_SAMPLE
        note(f"the hub is out of reach: this is the built-in sample of {len(load_msc())} conversations, NOT the "
             f"paper's benchmark ({HUB_IDS['msc']})")
    args.data = args.data or HUB_IDS[args.task]
    if args.task == "msc":
        rows = load_msc(args.data, args.evidence)
        if args.evidence:
            note(f"--evidence: {sum(not row['spans'] for row in rows)} of {len(rows)} conversations have no turn with "
                 "the answer word for word and are left out")
        return rows
    if args.task == "ppl":
        texts = read_rows(args.data, split="validation")
        return itertools.chain([next(texts)], texts)
    if args.task == "metaicl":
        tasks, missing = load_metaicl(args.data, args.demo_seeds, max(args.shots), "fine-tuned" in args.method)
        note(f"{len(tasks)} of MetaICL's 26 test tasks averaged; not in {args.data}: {', '.join(missing) or 'none'}")
        return tasks
    return load_qa(args.data, args.task)


def load_msc(source=MSC_SAMPLE, evidence=False):
    """Conversations in the MSC-Self-Instruct schema, of which only previous_dialogs, a last session in the row's own
    dialog and self_instruct are read (personas and summary_* hold the answer): [{"id", "sessions": [text of each],
    "question", "answer"}], with evidence also "spans". Turns alternate; "Speaker 1: " / "Speaker 2: " goes before them
    unless they already begin with a name."""
    rows = []
    for where, row in read_rows(source):
        dialogs = field(row, "previous_dialogs", list, where) + ([row] if row.get("dialog") else [])
        turns = [[field(turn, "text", str, where) for turn in field(dialog, "dialog", list, where)]
                 for dialog in dialogs]
        if not any(turns):
            raise InputError(f"{where}: previous_dialogs holds no turn to read")
        if not all(re.match(r"[A-Z][\w.'’ -]{0,30}: ", text) for session in turns for text in session):
            turns = [[f"Speaker {i % 2 + 1}: {text}" for i, text in enumerate(session)] for session in turns]
        asked, metadata = field(row, "self_instruct", dict, where), row.get("metadata")
        name = metadata.get("initial_data_id", len(rows)) if isinstance(metadata, dict) else len(rows)
        rows.append({"id": str(name), "sessions": ["\n".join(session) for session in turns],
                     "question": field(asked, "B", str, where), "answer": field(asked, "A", str, where)})
        if evidence:
            rows[-1]["spans"] = evidence_spans(turns, rows[-1]["answer"])
    return rows


def evidence_spans(sessions, answer):
    """{span of SPANS: text} round the first turn that holds the answer as whole words, but for case, after the name of
    its speaker; None where none does. sessions: lists of turns."""
    words = whole_words(answer.strip())
    for session in sessions:
        for i, turn in enumerate(session):
            if words.search(turn.split(": ", 1)[-1]):
                near, whole = session[max(0, i - 2):i + 3], "\n\n".join(map("\n".join, sessions))
                return dict(zip(SPANS, (turn, "\n".join(near), "\n".join(session), whole)))


def first_ids(rows, tokenizer, length, count):
    """The first `length` ids of each of the first `count` documents that have so many. rows: as of read_rows."""
    texts = (context_ids(tokenizer, field(row, "text", str, where))[:length] for where, row in rows)
    return list(itertools.islice((ids for ids in texts if len(ids) == length), count))


def load_qa(source, task):
    """Documents with their questions, in the order of the data: [{"text", "questions": [{"number" of its row, "id",
    "question", "golds": [text, ...]}]}]. Rows of one text are one document.

    task "squad": rows with context, question, answers {"text": [...]}; "streamingqa": rows with text, question, answers
    split on a backslash, from a .csv with these columns."""
    documents, text_key = {}, "context" if task == "squad" else "text"
    for number, (where, row) in enumerate(read_rows(source, split="validation")):
        if task == "squad":
            golds = field(field(row, "answers", dict, where), "text", list, where)
        else:
            golds = [gold.strip() for gold in field(row, "answers", str, where).split("\\")]
        golds, text = [gold for gold in golds if isinstance(gold, str) and gold], field(row, text_key, str, where)
        if not golds:
            raise InputError(f"{where}: answers holds no text")
        if not text.strip():
            raise InputError(f"{where}: empty {text_key}")
        documents.setdefault(text, []).append({"number": number, "id": str(row.get("id", number)),
                                               "question": field(row, "question", str, where), "golds": golds})
    return [{"text": text, "questions": questions} for text, questions in documents.items()]


def load_metaicl(source, seeds, shots, dev):
    """MetaICL's test tasks found in a directory of its layout, or such a data set on the hub: {task: {"test": rows,
    seed: (train rows, dev rows)}}, a row {"number", "id", "question", "golds": [text]}; and the names of those not
    found. The test items are those of seed 100, as in the released code; dev: whether dev files are read."""
    directory, names = source, sum(METAICL_KINDS.values(), ())
    if not os.path.exists(source):
        parts = ["100_test", *(f"{seed}_{split}" for seed in seeds for split in ("train", "dev"))]
        with bad_input(f"{source}: no such directory, and not to be had from the hub"):
            validate_repo_id(source)                         # a path is refused before the hub is asked
            directory = os.path.join(huggingface_hub.snapshot_download(
                source, repo_type="dataset", local_files_only=not hub_reachable(),
                allow_patterns=[f"data/{name}/{name}_16_{part}.jsonl" for name in names for part in parts]), "data")

    def rows(task, seed, split):
        read = read_rows(os.path.join(directory, task, f"{task}_16_{seed}_{split}.jsonl"))
        return [{"number": number, "id": f"{task} {number}", "golds": [field(row, "output", str, where)],
                 "question": demonstration(field(row, "input", str, where), "")}
                for number, (where, row) in enumerate(read)]

    tasks = {}
    for task in [name for name in names if os.path.isdir(os.path.join(directory, name))]:
        tasks[task] = {seed: (rows(task, seed, "train"), rows(task, seed, "dev") if dev else []) for seed in seeds}
        if (fewest := min(len(train) for train, _ in tasks[task].values())) < shots:
            raise InputError(f"{source}: {task} has {fewest} training examples, fewer than --shots {shots}")
        tasks[task]["test"] = rows(task, 100, "test")
    if not tasks:
        raise InputError(f"{source}: none of MetaICL's 26 test tasks is there; give a directory with "
                         "<task>/<task>_16_<seed>_train.jsonl, .._dev.jsonl and .._test.jsonl")
    return tasks, [task for task in names if task not in tasks]


def load_answers(path, task, data):
    """Answers of another program: {context_length or shots, 0 where a line names neither: {id: its prediction and
    costs}} of a .jsonl file, its ids those of the predictions file."""
    parts = itertools.chain(*(each["test"] for each in data.values())) if task == "metaicl" else data
    ids = [row["id"] for part in parts for row in part.get("questions", [part])]
    answers, known, key = {}, set(ids), {"msc": None, "metaicl": "shots"}.get(task, "context_length")
    if len(known) < len(ids):
        raise InputError("--rows needs data whose ids are all different, which these are not")
    for where, row in read_rows(path):
        costs = ("inference_tflops", "contextualisation_tflops", "storage_mfloats")
        given = {cost: row[cost] for cost in costs if row.get(cost) is not None}
        name, place = str(row.get("id")), row.get(key, 0)
        if not isinstance(place, int) or place < 0 or not all(isinstance(v, (int, float)) for v in given.values()):
            raise InputError(f"{where}: costs must be numbers, context_length and shots natural numbers")
        if name not in known or name in answers.setdefault(place, {}):
            raise InputError(f"{where}: id {name!r} is not one of the data's, or stands there twice")
        answers[place][name] = {"prediction": field(row, "prediction", str, where), **given}
    return answers


def given_records(run, method, what, groups):
    """The records of a row of --rows."""
    given = run.rows[method][what.get("context_length", what.get("shots", 0))]
    items = [item for _, some in groups for item in some]
    if missing := [item["id"] for item in items if item["id"] not in given]:
        raise InputError(f"{run.args.rows[method]}: {len(missing)} of {len(items)} answers are missing, the first of "
                         f"them that to {missing[0]!r}; the ids are those of the data, as --predictions writes them")
    return [{**item, **given[item["id"]], **run.score(given[item["id"]]["prediction"], item["golds"])}
            for item in items]


def control_contexts(keys, seed, count, first=None):
    """For each item the indices of `count` others that share no part of its context (keys: a set an item), drawn at
    random, as many for all: fewer where some item has fewer, none where it has none. The first `first` items are drawn
    before the rest: those are read anyway."""
    draw, order, others = random.Random(seed), list(range(len(keys))), []
    for own in keys:
        draw.shuffle(order)
        near = sorted(order, key=lambda j: first is not None and j >= first)
        others.append(list(itertools.islice((j for j in near if not own & keys[j]), count)))
    count = min((len(some) for some in others if some), default=0)
    return [some[:count] for some in others]


def controls_of(run, keys, first=None):
    """control_contexts as --seed and --controls ask, with a note where there are fewer."""
    others = control_contexts(keys, run.args.seed, run.args.controls, first)
    if 0 < (count := max(map(len, others), default=0)) < run.args.controls and "adapter-shuffled" in run.args.method:
        run.note(f"adapter-shuffled: some contexts have {count} others, so the gold is scored under {count}, not under "
                 f"{run.args.controls}")
    return others


def context_clusters(keys):
    """A label for each item: equal where contexts overlap, also by way of others. keys: a set an item."""
    groups = []
    for own in keys:
        touching = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own] + [set(own).union(*touching)]
    return [next(n for n, group in enumerate(groups) if group >= own) for own in keys]
