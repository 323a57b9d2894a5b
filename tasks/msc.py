"""Table 1: a question about a conversation of several sessions (MSC-Self-Instruct, of the authors of MemGPT).

Read:    the sessions of `previous_dialogs` and, where the row's own `dialog` is not empty, that last one; never
         `personas` and `summary_*`, which hold the answer.
Asked:   `self_instruct` B, the bare question; only full-conversation has the sessions in its prompt, with Fig. 7's
         instruction, and closed-book-instructed an instruction alone.
Scored:  the greedy answer against A; nats of A.
Control: conversations that share no session with the question's own.

Fig. 7's prompt and 20 new tokens, those of the questions on documents, are our choice: the paper names none for MSC,
and the one example released (inference.ipynb) reads a speaker's persona and generates 100 tokens.

A row may name its `span`: how much of the conversation around the answer it holds, as in the built-in sample. Each span
is a setting of its own; closed-book, which reads nothing, is asked once.
"""

import os
import re

from support.files import InputError, field, read_rows
from tasks.contexts import other_contexts
from tasks.qa import CLOSED_BOOK_PROMPT, IN_CONTEXT_PROMPT

HUB_ID = "MemGPT/MSC-Self-Instruct"
SAMPLE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets", "msc_sample.jsonl")
NAMED_TURN = re.compile(r"[A-Z][\w.'’ -]{0,30}: ")

METHODS = ["closed-book", "full-conversation", "adapter", "adapter-shuffled"]
PROMPTS = {
    "closed-book": "{question}",
    "closed-book-instructed": CLOSED_BOOK_PROMPT,           # only with --method
    "full-conversation": IN_CONTEXT_PROMPT,
    "adapter": "{question}",
    "adapter-shuffled": "{question}",
}
METRICS = ["f1", "em", "recall", "rougeL_recall"]
NEW_TOKENS = 20


def load(source=SAMPLE, args=None, notes=None):
    """Conversations of a file or hub id: [{"id", "span" or None, "sessions": [text of each], "question", "answer"}].

    Turns alternate: "Speaker 1: " and "Speaker 2: ", anew in each session, go before them unless every turn of the row
    already begins with a name. A session without a word is none.
    """
    rows = []
    for where, row in read_rows(source):
        dialogs = list(field(row, "previous_dialogs", list, where))
        if row.get("dialog"):
            dialogs.append(row)                             # which has the form of a session, {"dialog": [...]}
        sessions = []
        for dialog in dialogs:
            turns = field(dialog, "dialog", list, where)
            session = [field(turn, "text", str, where) for turn in turns]
            if "".join(session).strip():
                sessions.append(session)
        turns = sum(sessions, [])
        if not turns:
            raise InputError(f"{where}: previous_dialogs holds no turn to read")
        if not all(map(NAMED_TURN.match, turns)):
            for session in sessions:
                session[:] = [f"Speaker {i % 2 + 1}: {text}" for i, text in enumerate(session)]
        asked = field(row, "self_instruct", dict, where)
        metadata = row.get("metadata")
        name = len(rows)
        if isinstance(metadata, dict):
            name = metadata.get("initial_data_id", name)
        span = row.get("span")
        if not isinstance(span, str | None):
            raise InputError(f"{where}: span must be a text")
        rows.append({
            "id": str(name),
            "span": span,
            "sessions": ["\n".join(session) for session in sessions],
            "question": field(asked, "B", str, where, blank=False),
            "answer": field(asked, "A", str, where, blank=False),
        })
    return rows


def settings(rows, model, tokenizer, args, notes):
    """Yield (setting, methods, [(context, other contexts, questions)]): closed-book, then each span."""
    spans = {}
    for row in rows:
        spans.setdefault(row["span"], []).append(row)
    asked = {}                                              # a question has one number under all spans
    groups = {span: [] for span in spans}
    for span, span_rows in spans.items():
        parts = [set(row["sessions"]) for row in span_rows]
        others = other_contexts(parts, args, notes, first=args.limit)
        clusters = overlapping(parts)
        texts = ["\n\n".join(row["sessions"]) for row in span_rows]
        for i, row in enumerate(span_rows[:args.limit]):
            key = (row["id"], row["question"], row["answer"])
            question = {"number": len(asked), "id": row["id"], "cluster": clusters[i], "question": row["question"],
                        "golds": [row["answer"]]}
            question = {**asked.setdefault(key, question), "cluster": clusters[i]}
            groups[span].append((texts[i], [texts[j] for j in others[i]], [question]))
    setting = {} if None in spans else {"span": "none"}
    yield setting, ["closed-book", "closed-book-instructed"], [(None, [], list(asked.values()))]
    for span in spans:
        setting = {} if span is None else {"span": span}
        yield setting, ["full-conversation", "adapter", "adapter-shuffled"], groups[span]


def overlapping(parts):
    """A label for each context, one for those that share a part, directly or through others. parts: a set for each."""
    label = {}                                              # of each part
    for number, own in enumerate(parts):
        met = {label.get(part, number) for part in own}
        first = min(met)
        for part in label:
            if label[part] in met:
                label[part] = first
        label |= dict.fromkeys(own, first)
    return [label[next(iter(own))] for own in parts]
