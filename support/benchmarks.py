"""The benchmarks of §4 and their prompts: MSC, SQuAD, StreamingQA, MetaICL. evaluate.py needs it; training does not."""

import csv
import itertools
import os
import re

from support.files import InputError, field, read_rows
from support.instructions import demonstration
from support.text import context_ids, tokenize, user_turn

MSC_HUB_ID = "MemGPT/MSC-Self-Instruct"
MSC_SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "msc_sample.jsonl")

# Fig. 7, document question answering: one user turn
IN_CONTEXT_PROMPT = (
    "{context}\n\nInstruction: Answer the question based on the context above. Respond with a short phrase only. "
    "Keep the answer short and concise, without any explanation or additional words\n\nQuestion: {question}\n\nAnswer:")
# Fig. 7, MetaICL: the context are demonstrations joined by blank lines, the question is one without an output
METAICL_PROMPT = (
    "{context}\n\nInstruction: Based on the demonstration above, provide a short and concise answer, "
    "without any explanation or additional words.\n\n{question}")

METAICL_SEEDS = [100, 13, 21, 42, 87]
# the 26 test tasks of MetaICL's hr_to_lr setting (Table 4), split by the task_type of its configuration files
METAICL_CLASSIFICATION = (
    "financial_phrasebank", "glue-mrpc", "sick", "medical_questions_pairs", "poem_sentiment", "glue-wnli",
    "climate_fever", "ethos-national_origin", "ethos-race", "ethos-religion", "hate_speech18", "glue-rte",
    "superglue-cb", "tweet_eval-hate", "tweet_eval-stance_atheism", "tweet_eval-stance_feminist")
METAICL_OTHER = (
    "quarel", "openbookqa", "codah", "qasc", "dream", "commonsense_qa", "quartz-with_knowledge",
    "quartz-no_knowledge", "ai2_arc", "superglue-copa")


def in_context_prompts(tokenizer, template, context, questions, room):
    """(ids of a prompt for each question, tokens lost): where the longest prompt is more than room tokens, the context
    loses its beginning, as in the paper, and for all questions alike, so that they share it. Raises InputError where
    even an empty context does not fit."""
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


def load_msc(source=None):
    """Conversations in the MSC-Self-Instruct schema: [{"id", "sessions": [text of each earlier session], "question",
    "answer"}].

    source: hub id, .parquet or .jsonl; None reads the built-in sample. Only previous_dialogs and self_instruct are
    read: personas and summary_* hold the answer. Turns alternate; "Speaker 1: " / "Speaker 2: " goes before them unless
    they already begin with a name.
    """
    source, rows = source or MSC_SAMPLE, []
    for where, row in read_rows(source):
        turns = [[field(turn, "text", str, where) for turn in field(dialog, "dialog", list, where)]
                 for dialog in field(row, "previous_dialogs", list, where)]
        asked = field(row, "self_instruct", dict, where)
        named = all(re.match(r"[A-Z][\w.'’ -]{0,30}: ", text) for session in turns for text in session)
        sessions = ["\n".join(text if named else f"Speaker {i % 2 + 1}: {text}" for i, text in enumerate(session))
                    for session in turns]
        if not any(sessions):
            raise InputError(f"{where}: previous_dialogs holds no turn to read")
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        rows.append({"id": str(metadata.get("initial_data_id", len(rows))), "sessions": sessions,
                     "question": field(asked, "B", str, where), "answer": field(asked, "A", str, where)})
    return rows


def first_ids(rows, tokenizer, length, count):
    """The first `length` ids of each of the first `count` documents that have at least 2. rows: (where, row) as
    read_rows yields them."""
    texts = (context_ids(tokenizer, field(row, "text", str, where))[:length] for where, row in rows)
    return list(itertools.islice((ids for ids in texts if len(ids) > 1), count))


def load_qa(source, task):
    """Documents with their questions, in the order of the data: [{"text", "questions": [{"number" of its row, "id",
    "question", "golds": [text, ...]}]}].

    task "squad": rows with context, question, answers {"text": [...]}; "streamingqa": rows with text, question, answers
    split on a backslash, from a .csv with these columns. Rows of one text are one document.
    """
    documents, text_key = {}, "context" if task == "squad" else "text"
    table = task == "streamingqa" and source.endswith(".csv")
    for number, (where, row) in enumerate(read_csv(source) if table else read_rows(source, split="validation")):
        if task == "squad":
            golds = field(field(row, "answers", dict, where), "text", list, where)
        else:
            golds = [gold.strip() for gold in field(row, "answers", str, where).split("\\")]
        golds = [gold for gold in golds if isinstance(gold, str) and gold]
        if not golds:
            raise InputError(f"{where}: answers holds no text")
        document = documents.setdefault(field(row, text_key, str, where), [])
        document.append({"number": number, "id": str(row.get("id", number)),
                         "question": field(row, "question", str, where), "golds": golds})
    if not all(text.strip() for text in documents):
        raise InputError(f"{source}: a row has an empty {text_key}")
    return [{"text": text, "questions": questions} for text, questions in documents.items()]


def read_csv(path):
    """(where, row) for each row of a .csv file with a header. Raises InputError when it is missing, empty or
    malformed."""
    where = path
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                where = f"{path} row {number}"
                yield where, row
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if where == path:
        raise InputError(f"{path} is empty: it needs a header and at least one row")


def load_metaicl(directory, seeds, shots, dev):
    """MetaICL's test tasks found in a directory of its layout, <task>/<task>_16_<seed>_{train,dev,test}.jsonl:
    {task: {"test": rows, seed: (train rows, dev rows)}}, a row {"number", "id", "question", "golds": [text]}; and the
    names of those not found. The test items are those of seed 100, as in the released code; dev: whether dev files are
    read (only fine-tuning wants them)."""
    def rows(task, seed, split):
        read = read_rows(os.path.join(directory, task, f"{task}_16_{seed}_{split}.jsonl"))
        return [{"number": number, "id": f"{task} {number}", "golds": [field(row, "output", str, where)],
                 "question": demonstration(field(row, "input", str, where), "")}
                for number, (where, row) in enumerate(read)]

    tasks = {}
    for task in METAICL_CLASSIFICATION + METAICL_OTHER:
        if os.path.isdir(os.path.join(directory, task)):
            tasks[task] = {seed: (rows(task, seed, "train"), rows(task, seed, "dev") if dev else []) for seed in seeds}
            tasks[task]["test"] = rows(task, 100, "test")
            fewest = min(len(tasks[task][seed][0]) for seed in seeds)
            if fewest < shots:
                raise InputError(f"{directory}: {task} has {fewest} training examples, fewer than --shots {shots}")
    if not tasks:
        raise InputError(f"{directory}: none of MetaICL's 26 test tasks is there; give a directory with "
                         "<task>/<task>_16_<seed>_train.jsonl, .._dev.jsonl and .._test.jsonl")
    return tasks, [task for task in METAICL_CLASSIFICATION + METAICL_OTHER if task not in tasks]
