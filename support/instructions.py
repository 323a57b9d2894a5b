"""Instruction data (Table 3): rows in the schemas of its sets -> documents with questions, and tasks with examples.
Instruction tuning (data.py) and the fine-tuned baselines need it."""

import os
import re

from tqdm import tqdm

from support.files import InputError, bad_input, count_rows, read_rows
from support.text import tokenize, whole_words

# MetaICL is not among them: give its files
TABLE_3 = ["stanfordnlp/coqa", "ucinlp/drop", "deepmind/narrativeqa", "qiaojin/PubMedQA:pqa_labeled",
           "textmachinelab/quail", "microsoft/ms_marco:v1.1", "kmfoda/booksum", "sggetao/PwC"]


# by a field that tells its set, (context, [(question, [answers])]) of a row: this project's own schema, CoQA, DROP,
# NarrativeQA (on summaries), PubMedQA, QuAIL, MS MARCO, BookSum, PwC, SQuAD
SCHEMAS = {
    "qas": lambda row: (row["context"], [(qa["question"], qa["answers"]) for qa in row["qas"]]),
    "story": lambda row: (row["story"], [(q, [a]) for q, a in zip(row["questions"], row["answers"]["input_text"])]),
    "passage": lambda row: (row["passage"], [(row["question"], row["answers_spans"]["spans"])]),
    "document": lambda row: (row["document"]["summary"]["text"],
                             [(row["question"]["text"], [a["text"] for a in row["answers"]])]),
    "long_answer": lambda row: ("\n".join(row["context"]["contexts"]), [(row["question"], [row["long_answer"]])]),
    "correct_answer_id": lambda row: (row["context"], [(row["question"], [row["answers"][row["correct_answer_id"]]])]),
    "passages": lambda row: ("\n\n".join(row["passages"]["passage_text"]), [(row["query"], row["answers"])]),
    "chapter": lambda row: (row["chapter"], [("Write a summary of the text.", [row["summary_text"]])]),
    "prompt": lambda row: (row["input"], [(row["prompt"], [row["answer"]])]),
    "context": lambda row: (row["context"], [(row["question"], row["answers"]["text"])])}


def demonstration(text, output):
    """An example of a task, as MetaICL writes it; the question is the same with an empty output."""
    return f"Input: {text}\nOutput: {output}".rstrip()


def question_answers(row, where):
    """(context, [(question, [answers])]) of a row without empty ones. Its set is told by its fields, see SCHEMAS."""
    kind = next((field for field in SCHEMAS if field in row), None)
    if kind is None:
        raise InputError(f"{where}: the fields {', '.join(row)} are not of a known instruction set: give context and "
                         "qas [{question, answers}], or task, input and output")
    with bad_input(f"{where}: a field of the instruction data is missing or malformed"):
        context, pairs = SCHEMAS[kind](row)
        pairs = [(q, [answers] if isinstance(answers, str) else answers) for q, answers in pairs]
        pairs = [(q.strip(), [a for a in answers if a.strip()]) for q, answers in pairs]
        return context.strip() and context, [(q, answers) for q, answers in pairs if q and answers]


def task_example(row, where):
    """(task, definition, input, [outputs]) of a row in the manner of MetaICL or Super-NaturalInstructions."""
    task, definition, text, outputs = row["task"], row.get("definition") or "", row.get("input"), row.get("output")
    outputs = outputs if isinstance(outputs, list) else [outputs]
    if not outputs or not all(isinstance(value, str) for value in (task, definition, text, *outputs)):
        raise InputError(f"{where}: 'task', 'input', 'output' and 'definition' must be texts, 'output' one or a list")
    return task, definition, text, outputs


def load_instructions(sources):
    """(documents, tasks): [(source, context, [(question, [answers])])], rows of one context joined, and {task: (source,
    definition, [(input, [outputs])])}. A source is the set that a row names as its "dataset", else the file."""
    documents, tasks = {}, {}
    for source in sources:
        rows = tqdm(read_rows(source), total=count_rows(source), unit="row", desc=os.path.basename(source), leave=False)
        for where, row in rows:
            name = row["dataset"] if isinstance(row.get("dataset"), str) else source
            if "task" in row:
                task, definition, text, outputs = task_example(row, where)
                tasks.setdefault(task, (name, definition, []))[2].append((text, outputs))
            else:
                context, pairs = question_answers(row, where)
                documents.setdefault((name, context), []).extend(pairs)
    return [(*key, pairs) for key, pairs in documents.items() if pairs and key[1]], tasks


def instruction_units(documents, tasks, weights=()):
    """The units of an epoch: the index of every document, and the name of a task once for each 20 of its items.
    weights: "source=integer", each unit of that source as many times; 1 for sources not named."""
    sources, factors = {source for source, *_ in [*documents, *tasks.values()]}, {}
    for entry in weights:
        source, _, number = entry.rpartition("=")
        if source not in sources or not number.isdecimal():
            raise InputError(f"--weights {entry}: give source=integer for one of {', '.join(sorted(sources))}")
        factors[source] = int(number)
    units = [(k, source, 1) for k, (source, _, _) in enumerate(documents)]
    units += [(task, source, -(-len(items) // 20)) for task, (source, _, items) in tasks.items() if len(items) > 1]
    return [unit for unit, source, count in units for _ in range(count * factors.get(source, 1))]


def excerpt(tokenizer, text, pairs, room, random):
    """(sentences of text, the pairs they answer): a window around the answer to one of the questions, grown sentence by
    sentence on a random side up to room tokens; one sentence at least. Only answers said once in all of text count, as
    whole words other than yes and no; without one: (text, pairs). A dialogue's lines stand for sentences."""
    def said_once(answer):
        found = list(whole_words(answer).finditer(text))
        return found[0].span() if len(found) == 1 and answer.lower() not in ("yes", "no") else None

    answered = [(span, pair) for pair in pairs if (span := next(filter(None, map(said_once, pair[1])), None))]
    if not answered:
        return text, pairs
    turns = all(re.match(r"[^:\n]{1,40}: ", line) for line in text.splitlines() if line.strip())
    ends = re.finditer(r"\n+" if turns else r"[.!?][\"'”’)]*\s+", text)
    bounds = sorted({0, len(text), *(end.end() for end in ends)})              # sentence i: bounds[i] .. bounds[i + 1]
    lengths = [len(ids) for ids in tokenize(tokenizer, [text[a:b] for a, b in zip(bounds, bounds[1:])])]
    start, end = answered[int(random.integers(len(answered)))][0]
    first, last = max(i for i, b in enumerate(bounds) if b <= start), min(i for i, b in enumerate(bounds) if b >= end)
    while sides := [(i, j) for i, j in ((first - 1, last), (first, last + 1))
                    if i >= 0 and j < len(bounds) and sum(lengths[i:j]) <= room]:
        first, last = sides[int(random.integers(len(sides)))]
    kept = [pair for (a, b), pair in answered if bounds[first] <= a and b <= bounds[last]]
    return text[bounds[first]:bounds[last]].strip(), kept


def load_texts(sources):
    """Texts of documents, each once: the field "text", or the context of a row with questions."""
    return list(dict.fromkeys(row["text"] if isinstance(row.get("text"), str) else question_answers(row, where)[0]
                              for source in sources for where, row in read_rows(source)))
