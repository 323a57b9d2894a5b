"""Instruction data (Table 3): rows in the schemas of its sets -> documents with questions, and tasks with examples.
Instruction tuning (data.py) and the fine-tuned baselines need it."""

import os

from tqdm import tqdm

from support.files import InputError, count_rows, read_rows

# the sets with a hub id; MetaICL has none: give its files
TABLE_3 = ["stanfordnlp/coqa", "ucinlp/drop", "deepmind/narrativeqa", "qiaojin/PubMedQA:pqa_labeled",
           "textmachinelab/quail", "microsoft/ms_marco:v1.1", "kmfoda/booksum", "sggetao/PwC"]


def demonstration(text, output):
    """An example of a task, as MetaICL writes it; the question is the same with an empty output."""
    return f"Input: {text}\nOutput: {output}".rstrip()


def known_fields(row, where):
    """(context, [(question, [answers])]) as they stand in a row, whose set is told by its fields: this project's own
    schema, SQuAD's, or one of Table 3's."""
    if "qas" in row:
        return row["context"], [(qa["question"], list(qa["answers"])) for qa in row["qas"]]
    if "story" in row:                                                                      # CoQA
        return row["story"], [(q, [a]) for q, a in zip(row["questions"], row["answers"]["input_text"])]
    if "passage" in row:                                                                    # DROP
        return row["passage"], [(row["question"], list(row["answers_spans"]["spans"]))]
    if "document" in row:                                                                   # NarrativeQA, on summaries
        answers = [a["text"] for a in row["answers"]]
        return row["document"]["summary"]["text"], [(row["question"]["text"], answers)]
    if "long_answer" in row:                                                                # PubMedQA
        return "\n".join(row["context"]["contexts"]), [(row["question"], [row["long_answer"]])]
    if "correct_answer_id" in row:                                                          # QuAIL
        return row["context"], [(row["question"], [row["answers"][row["correct_answer_id"]]])]
    if "passages" in row:                                                                   # MS MARCO
        return "\n\n".join(row["passages"]["passage_text"]), [(row["query"], list(row["answers"]))]
    if "chapter" in row:                                                                    # BookSum
        return row["chapter"], [("Write a summary of the text.", [row["summary_text"]])]
    if "prompt" in row:                                                                     # PwC
        return row["input"], [(row["prompt"], [row["answer"]])]
    if "context" in row and "question" in row:                                              # SQuAD
        return row["context"], [(row["question"], list(row["answers"]["text"]))]
    raise InputError(f"{where}: the fields {', '.join(row)} are not of a known instruction set: give context and qas "
                     "[{question, answers}], or task, input and output")


def question_answers(row, where):
    """(context, [(question, [answers])]) of a row, without empty questions and answers."""
    try:
        context, pairs = known_fields(row, where)
        pairs = [(q.strip(), [a for a in answers if a.strip()]) for q, answers in pairs]
        if not isinstance(context, str):
            raise TypeError("the context is not a text")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: a field of the instruction data is missing or malformed "
                         f"({type(error).__name__}: {error})") from None
    return context, [(q, answers) for q, answers in pairs if q and answers]


def task_example(row, where):
    """(task, definition, input, [outputs]) of a row in the manner of MetaICL or Super-NaturalInstructions."""
    outputs = [row["output"]] if isinstance(row.get("output"), str) else row.get("output")
    definition = row.get("definition") or ""
    texts = (row["task"], row.get("input"), definition, *outputs) if isinstance(outputs, list) and outputs else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: 'task', 'input', 'output' and 'definition' must be texts, 'output' one or a list")
    return row["task"], definition, row["input"], outputs


def load_instructions(sources):
    """(documents, tasks): [(source, context, [(question, [answers])])], rows of one context joined, and
    {task: (definition, [(input, [outputs])])}."""
    documents, tasks = {}, {}
    for source in sources:
        rows = tqdm(read_rows(source), total=count_rows(source), unit="row", desc=os.path.basename(source), leave=False)
        for where, row in rows:
            if "task" in row:
                task, definition, text, outputs = task_example(row, where)
                tasks.setdefault(task, (definition, []))[1].append((text, outputs))
            else:
                context, pairs = question_answers(row, where)
                documents.setdefault((source, context), []).extend(pairs)
    kept = [(*key, pairs) for key, pairs in documents.items() if pairs and key[1].strip()]
    return kept, tasks


def load_texts(sources):
    """Texts of documents, each once: the field "text", or the context of a row with questions."""
    rows = ((where, row) for source in sources for where, row in read_rows(source))
    return list(dict.fromkeys(row["text"] if isinstance(row.get("text"), str) else question_answers(row, where)[0]
                              for where, row in rows))
