"""Fig. 2, Fig. 3, Table 5: questions on documents (SQuAD, StreamingQA).

Read:    documents in the order of the data, joined by blank lines and split evenly into ceil(tokens / context length)
         groups of whole documents; a group is the context of all its questions.
Asked:   the bare question, under in-context after the group, in the words of Fig. 7.
Scored:  f1, em, rougeL_recall against the shortest gold, as the authors score; f1_max, em_max over all golds, as SQuAD
         does; recall, whether the answer contains a gold; nats of the shortest gold.
Control: other groups of the same length.
"""

import ast
import math
import re

import numpy as np

from support.files import InputError, bad_input, field, read_rows
from support.text import tokenize
from tasks.contexts import other_contexts

HUB_ID = "rajpurkar/squad"                                  # StreamingQA is on no hub: a .csv
CONTEXT_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]

# Fig. 7: one user turn. The released prompts begin "## Instruction:", have one line break before "Answer:" and name the
# context in the closed-book one as well
IN_CONTEXT_PROMPT = (
    "{context}\n\nInstruction: Answer the question based on the context above. Respond with a short phrase only. "
    "Keep the answer short and concise, without any explanation or additional words\n\nQuestion: {question}\n\nAnswer:")
CLOSED_BOOK_PROMPT = (                                      # the same, without the words about a context
    "Instruction: Answer the question. Respond with a short phrase only. "
    "Keep the answer short and concise, without any explanation or additional words\n\nQuestion: {question}\n\nAnswer:")

METHODS = ["closed-book", "in-context", "adapter", "adapter-shuffled"]
PROMPTS = {
    "closed-book": "{question}",
    "closed-book-instructed": CLOSED_BOOK_PROMPT,           # Table 5's zero-shot prompting; only with --method
    "in-context": IN_CONTEXT_PROMPT,
    "adapter": "{question}",
    "adapter-shuffled": "{question}",
}
METRICS = ["f1", "em", "f1_max", "em_max", "recall", "rougeL_recall"]
NEW_TOKENS = 20

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
LIST = re.compile(rf"\[(?:{QUOTED.pattern}|[\s,])*\]")      # of texts, as JSON, Python or numpy writes it


def load(source, args, notes):
    """Documents with their questions, in the order of the data: [{"text", "questions": [{"number" of its row, "id",
    "cluster": 0, "question", "golds": [text, ...]}]}]. Rows of one text are one document.

    squad: rows with context, question, answers {"text": [...]}; streamingqa: with text, question, answers, a list
    written as text or split on a backslash. Rows without an answer, the unanswerable ones of SQuAD v2, are left out.
    """
    documents = {}
    unanswerable = 0
    for number, (where, row) in enumerate(read_rows(source, split="validation")):
        if args.task == "squad":
            key = "context"
            golds = field(field(row, "answers", dict, where), "text", list, where)
        else:
            key = "text"
            answers = field(row, "answers", str, where).strip()
            golds = [gold.strip() for gold in answers.split("\\")]
            if LIST.fullmatch(answers):
                with bad_input(f"{where}: answers is not the list that it looks like"):
                    golds = [ast.literal_eval(quoted) for quoted in QUOTED.findall(answers)]
        golds = [gold for gold in golds if isinstance(gold, str) and gold.strip()]
        text = field(row, key, str, where, blank=False)
        asked = field(row, "question", str, where, blank=False)
        if not golds:
            unanswerable += 1
            continue
        question = {"number": number, "id": str(row.get("id", number)), "cluster": 0, "question": asked, "golds": golds}
        documents.setdefault(text, []).append(question)
    if not documents:
        raise InputError(f"{source}: none of its {unanswerable} questions has an answer, so nothing can be scored")
    if unanswerable:
        notes.append(f"questions left out, since they have no answer: {unanswerable}")
    return [{"text": text, "questions": questions} for text, questions in documents.items()]


def settings(documents, model, tokenizer, args, notes):
    """Yield (setting, methods, [(context, other contexts, questions)]): closed-book, then each context length."""
    documents = documents[:args.limit]
    texts = [document["text"] for document in documents]
    total = len(tokenize(tokenizer, ["\n\n".join(texts)])[0])
    questions = []
    for document in documents:
        questions += document["questions"]
    closed_book = ["closed-book", "closed-book-instructed"]
    yield {"context_length": 0, "groups": 1}, closed_book, [(None, [], questions)]
    for length in args.context_lengths or CONTEXT_LENGTHS:
        count = min(math.ceil(total / length), len(documents))
        parts = np.array_split(range(len(documents)), count)            # as many documents each
        contexts = ["\n\n".join(texts[i] for i in part) for part in parts]
        others = other_contexts([{g} for g in range(count)], args, [])      # the note is below
        if count == 1:
            notes.append(f"{total} tokens or more hold all documents ({len(documents)}) in one context, which has no "
                         "control: --context-lengths 1 makes each document a context of its own")
        groups = []
        for g, part in enumerate(parts):
            questions = []
            for i in part:
                questions += [{**question, "cluster": g} for question in documents[i]["questions"]]
            groups.append((contexts[g], [contexts[j] for j in others[g]], questions))
        yield {"context_length": length, "groups": count}, ["in-context", "adapter", "adapter-shuffled"], groups
