"""Data: from text to the batches of a training run (§2.3, appendix A, Table 3).

    python data.py corpus.parquet more.jsonl.gz notes.txt --out tokens.bin        # pack text; --base: whose tokenizer

A source is a .parquet, .jsonl(.gz) or .txt(.gz) file with a "text" field (a .txt file is one document), or a hub data
set id, with its configuration after a colon where it has several ("microsoft/ms_marco:v1.1"). A source of instruction
tuning has rows of the sets of Table 3, or of this project's own kind, which say what is asked and answered:

    {"context": "...", "qas": [{"question": "...", "answers": ["...", ...]}], "dataset": "its name, if you like"}
    {"context": "...", "question": "...", "answer": "..."}
    {"task": "its name", "input": "...", "output": "...", "definition": "what is to be done, if you like"}

Shapes: B rows of a batch, N segments of a pass, C context chunks of a row, L tokens of a segment. (What the paper calls
a segment, a training text of 8,192 tokens, is a sequence here; a segment is a stretch of L tokens read under one
adapter: a chunk, its second reading, or a conversation.)
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import tempfile
import zlib
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from generator import split_into_chunks
from support.bases import DEFAULT_BASE, locate_base, tokenizer_at
from support.files import CACHE, InputError, bad_input, count_rows, make_directory, read_rows, run_command, stamps
from support.text import MARK, apply_template, context_ids, document_marks, token_ids, tokenize, user_turn

# MetaICL, the ninth set of Table 3, is no hub data set of rows: name the files <task>/<task>_16384_100_train.jsonl of
# allenai/metaicl-data with --data, for the tasks under "train" of config/hr_to_lr.json in its repository (Table 4)
TABLE_3 = ["stanfordnlp/coqa", "ucinlp/drop", "deepmind/narrativeqa", "qiaojin/PubMedQA:pqa_labeled",
           "textmachinelab/quail", "microsoft/ms_marco:v1.1", "kmfoda/booksum", "sggetao/PwC"]

SHORTEST_CONTEXT = 16     # tokens: the shortest contexts of instruction tuning, a sentence
CONVERSATION = 128        # tokens: a conversation may be this long even where chunks are shorter
TEXT_SHARE = 1 / 2        # of the rows of an instruction batch, with --documents: texts to reconstruct and continue
DEMONSTRATIONS = 64       # of a task, at most
QUERIES = 4               # of a task, at most
EXAMPLES_A_UNIT = 20      # an epoch comes to a task once for each 20 of its examples, rounded up
PACKED = 512              # documents tokenised at once


class Batch(NamedTuple):
    """One pass over all segments: segment j is adapted by the first visible[j] segments. Segments 0 .. C-1, C =
    max(visible), are the context chunks; the others never enter S."""
    segments: torch.Tensor     # (B, N, L) token ids, right-padded
    mask: torch.Tensor         # (B, N, L) 1 for real tokens, 0 for padding
    visible: torch.Tensor      # (N,)
    labels: torch.Tensor       # (B, N, L) targets, -100 where there is none


# --------------------------------------------------------------------------------------------------------------------
# segments: the doubled sequence of pretraining


def doubled(tokens, C):
    """The doubled sequence, both tasks of §2.3 in one pass: tokens (B, C L) -> Batch of N = 2C segments.

    Chunk j is read under the adapter of the chunks before it (completion), then again under one that has seen it too
    (reconstruction): visible = 0, 1, .., C-1, 1, 2, .., C. The second half is a copy, as the authors' README has it;
    their code draws random windows of what came before.
    """
    chunks = tokens.view(len(tokens), C, -1)                                   # (B, C, L)
    segments = torch.cat([chunks, chunks], dim=1)                              # (B, 2C, L)
    visible = torch.cat([torch.arange(C), torch.arange(1, C + 1)])             # (2C,)
    return Batch(segments, torch.ones_like(segments), visible, segments)


# --------------------------------------------------------------------------------------------------------------------
# instruction tuning: rows of many kinds -> documents with questions, and tasks with examples


def demonstration(text, output):
    """An example of a task, as MetaICL writes it; the question is the same with an empty output."""
    return f"Input: {text}\nOutput: {output}".rstrip()


def question_answers(row):
    """(context, [(question, answers)]) of a row, answers a text or a list. Its fields tell which set it is from."""
    if "qas" in row:                                                           # this project's own
        return row["context"], [(qa["question"], answers_of(qa)) for qa in row["qas"]]
    if "story" in row:                                                         # CoQA
        return row["story"], zip(row["questions"], row["answers"]["input_text"])
    if "passage" in row:                                                       # DROP
        return row["passage"], [(row["question"], row["answers_spans"]["spans"])]
    if "document" in row:                                                      # NarrativeQA, on summaries
        answers = [answer["text"] for answer in row["answers"]]
        return row["document"]["summary"]["text"], [(row["question"]["text"], answers)]
    if "long_answer" in row:                                                   # PubMedQA: yes, no or maybe, and why
        answer = row["final_decision"].capitalize() + ". " + row["long_answer"]
        return "\n".join(row["context"]["contexts"]), [(row["question"], answer)]
    if "correct_answer_id" in row:                                             # QuAIL
        answer = row["answers"][row["correct_answer_id"]]
        if answer.strip().lower() == "not enough information":                 # left out, as in the released code
            return row["context"], []
        return row["context"], [(row["question"], answer)]
    if "passages" in row:                                                      # MS MARCO: the passages that answer
        passages = row["passages"]
        selected = []
        for passage, is_selected in zip(passages["passage_text"], passages["is_selected"]):
            if is_selected:
                selected.append(passage)
        return "\n\n".join(selected), [(row["query"], row["answers"])]
    if "chapter" in row:                                                       # BookSum
        return row["chapter"], [("Write a summary of the text.", row["summary_text"])]
    if "prompt" in row:                                                        # PwC
        return row["input"], [(row["prompt"], row["answer"])]
    if "text" in row:                                                          # nothing is asked
        return row["text"], []
    return row["context"], [(row["question"], answers_of(row))]


def answers_of(row):
    """The field of a row that answers its question: a text, a number or a list of them, SQuAD's within "text"."""
    for name in ("answers", "answer", "response"):
        if name in row:
            if isinstance(row[name], dict):
                return row[name]["text"]
            return row[name]
    raise ValueError("there is a question without a field 'answers' or 'answer'")


def texts_of(value, name):
    """The texts of a field of that name, which holds one or a list of them, but for blank ones; a number is spelled
    out."""
    if not isinstance(value, list):
        value = [value]
    texts = []
    for text in value:
        if text is None or text != text:                                       # null, NaN
            continue
        if isinstance(text, (int, float)):
            text = str(text)
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}")
        if text.strip():
            texts.append(text)
    return texts


def load_instructions(sources):
    """(documents, tasks): [(source, context, [(question, [answers])])], rows of one context joined, and {task:
    (definition, [(input, [outputs])])}. A source is the set that a row names as its "dataset", else the file. Rows
    without a context and questions without an answer are left out and counted."""
    documents, tasks = {}, {}
    left_out = 0
    for source in sources:
        for where, row in tqdm(read_rows(source), desc=source, leave=False):
            with bad_input(f"{where}: the row is of no known instruction set, or a field is missing or malformed (give "
                           "context and question and answer, context and qas [{question, answers}], or task, input and "
                           "output; answers and output are a text, a number or a list of them)"):
                if "task" in row:
                    definition = "\n".join(texts_of(row.get("definition"), "definition"))
                    text = "\n".join(texts_of(row["input"], "input"))
                    outputs = texts_of(row["output"], "output")
                    _, examples = tasks.setdefault(str(row["task"]), (definition, []))
                    if outputs:
                        examples.append((text, outputs))
                    else:
                        left_out += 1
                    continue
                context, asked = question_answers(row)
                context = "\n\n".join(texts_of(context, "context"))
                if not context:
                    left_out += 1
                    continue
                pairs = documents.setdefault((row.get("dataset") or source, context), [])
                for question, answers in asked:
                    question = "\n".join(texts_of(question, "question"))
                    answers = texts_of(answers, "answer")
                    if question and answers:
                        pairs.append((question.strip(), answers))
                    else:
                        left_out += 1
    if left_out:
        print(f"{left_out} rows or questions of {', '.join(sources)} without a text or an answer were left out")
    return [(name, context, pairs) for (name, context), pairs in documents.items()], tasks


# --------------------------------------------------------------------------------------------------------------------
# instruction tuning: a context and a conversation about it


class Example(NamedTuple):
    context: list              # ids of the context
    ids: list                  # ids of questions and answers in the chat template
    labels: list               # ids of the answers, -100 elsewhere


def conversation(tokenizer, pairs, limit):
    """(ids, labels) of those pairs (question, answer) that fit into limit tokens, in the base's chat template. Labels
    are -100 but for the answers and the token that ends each. The first question stands there exactly as user_turn
    shows it at test time. If no pair fits, the last is truncated, and may have no label. A base without a template gets
    one question."""
    ends = {tokenizer.eos_token_id}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            ends.add(token_id)
    if tokenizer.chat_template is None:
        pairs = pairs[:1]
    messages, ids, labels = [], [], []
    for number, (question, answer) in enumerate(pairs, 1):
        # a template that trims would find no white space beside the MARKs
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        if tokenizer.chat_template is None:
            prompt = user_turn(tokenizer, question)
            full = prompt + tokenize(tokenizer, [answer])[0] + [tokenizer.eos_token_id]
        else:
            opening = apply_template(tokenizer, messages + turn[:1], add_generation_prompt=True)
            parts = apply_template(tokenizer, messages + turn).split(MARK)
            if len(parts) != 3:
                raise InputError("the chat template of --base does not write an answer once and as it is, so that its "
                                 "tokens cannot be found: choose another base, or mend its chat_template")
            before, reply, after = parts
            if not before.startswith(opening):         # R1's opens a thought in the prompt alone
                before = opening
            prompt, full = token_ids(tokenizer, [opening, before + reply + after])
            # Qwen3 and gpt-oss write an empty thought or the name of a channel before an answer, which are no part of
            # it; and a tokenizer may join the prompt's end and the answer's first word: apart, then
            if before[len(opening):].strip() or full[:len(prompt)] != prompt:
                prompt, reply, after = token_ids(tokenizer, [before, reply, after])
                full = prompt + reply + after
        start = len(prompt)                             # where the answer begins
        stop = start                                    # where its end token stands, which is a target too
        while stop < len(full) and full[stop] not in ends:
            stop += 1
        if full[:len(ids)] != ids:             # the template writes earlier turns differently: keep what stands
            break
        if len(full) > limit and (ids or number < len(pairs)):
            continue                           # too long, and not the last hope
        labels += [-100] * (start - len(labels)) + full[start:stop + 1]
        labels += [-100] * (len(full) - len(labels))
        ids = full
        messages += turn
    return ids[:limit], labels[:limit]


def index_by_source(documents):
    """{source: [indices of its documents]}."""
    index = {}
    for k, (source, _, _) in enumerate(documents):
        index.setdefault(source, []).append(k)
    return index


def document_context(tokenizer, documents, by_source, k, length, random):
    """(texts, pairs): document k, whole, then other documents of its source in random order, up to the first that no
    longer fits into length tokens; the questions of all of them, in random order."""
    source, text, pairs = documents[k]
    texts, pairs = [text], list(pairs)
    used = len(tokenize(tokenizer, [text])[0])
    same = by_source[source]
    for number in random.permutation(len(same)):
        i = same[number]
        if i == k:
            continue
        _, other_text, other_pairs = documents[i]
        used += 2 + len(tokenize(tokenizer, [other_text])[0])                  # a blank line stands before it
        if used > length:
            break
        texts.append(other_text)
        pairs += other_pairs
    random.shuffle(texts)
    random.shuffle(pairs)
    return texts, pairs


def task_context(tokenizer, definition, examples, length, random):
    """(texts, pairs) of a task: its definition and demonstrations, the first of these texts always, the next while all
    fit into length tokens (so a short context may be a definition alone); queries, which are other examples."""
    chosen = [examples[i] for i in random.permutation(len(examples))[:QUERIES + DEMONSTRATIONS]]
    queries = min(QUERIES, len(chosen) - 1)
    pairs = [(demonstration(text, ""), outputs) for text, outputs in chosen[:queries]]
    texts = [demonstration(text, outputs[0]) for text, outputs in chosen[queries:]]
    if definition:
        texts.insert(0, definition)
    used = 0
    for count, ids in enumerate(tokenize(tokenizer, texts)):
        used += len(ids) + 2                                                   # and a blank line
        if used > length and count > 0:
            return texts[:count], pairs
    return texts, pairs


def context_length(limit, random):
    """Tokens of a context, log-uniform between a sentence and limit: each doubling has an equal share."""
    low = math.log(min(SHORTEST_CONTEXT, limit))
    return int(math.exp(random.uniform(low, math.log(limit + 1))))


def instruction_example(tokenizer, documents, by_source, tasks, unit, args, *numbers):
    """Example of a unit, which is the index of a document or the name of a task: a context of up to args.chunks x
    args.chunk tokens (see context_length) and a conversation about it. A document that is longer than the length
    drawn stands there whole. Texts are joined by blank lines and raw, as in evaluation. args.seed and the numbers alone
    decide what is drawn. by_source: index_by_source(documents)."""
    random = np.random.default_rng((args.seed, *numbers))
    limit = args.chunks * args.chunk
    length = context_length(limit, random)
    if isinstance(unit, str):
        texts, pairs = task_context(tokenizer, *tasks[unit], length, random)
    else:
        texts, pairs = document_context(tokenizer, documents, by_source, unit, length, random)
    context = context_ids(tokenizer, "\n\n".join(texts))[:limit]
    asked = [(question, answers[random.integers(len(answers))]) for question, answers in pairs]
    ids, labels = conversation(tokenizer, asked, max(args.chunk, CONVERSATION))
    return Example(context, ids, labels)


def instruction_batch(examples, pad, chunk):
    """Batch of N = C+1 segments: C context chunks, then the conversation under the adapter of all of them,
    visible = 0, 1, .., C-1, C. Shorter contexts end with chunks of padding, which add nothing to S."""
    contexts = [split_into_chunks(example.context, chunk) for example in examples]
    C = max(map(len, contexts))
    L = max(max(len(chunks[0]), len(example.ids)) for chunks, example in zip(contexts, examples))
    segments = torch.full((len(examples), C + 1, L), pad)               # (B, N, L)
    mask = torch.zeros_like(segments)
    labels = torch.full_like(segments, -100)
    for b, example in enumerate(examples):
        for j, ids in [*enumerate(contexts[b]), (C, example.ids)]:
            segments[b, j, :len(ids)] = torch.tensor(ids)
            mask[b, j, :len(ids)] = 1
        labels[b, C, :len(example.ids)] = torch.tensor(example.labels)
    return Batch(segments, mask, torch.arange(C + 1), labels)


def cut_into_passes(lengths, limit):
    """Slices of rows of these lengths, the longest first, each for one pass of at most `limit` tokens with padding, but
    for a row that is longer by itself."""
    slices = []
    start = 0
    while start < len(lengths):
        size = max(1, limit // lengths[start])
        slices.append(slice(start, start + size))
        start += size
    return slices


# --------------------------------------------------------------------------------------------------------------------
# what a run trains on. Every process makes the whole global batch and takes its rows of it. args: the flags of train.py


class PretrainingData:
    """Doubled sequences of chunks x chunk tokens, over packed text."""

    def __init__(self, args, tokenizer):
        self.args = args
        self.length = args.chunks * args.chunk
        self.tokens = open_tokens(args.data, tokenizer)
        if args.validation:
            held_out = open_tokens(args.validation, tokenizer)
        else:
            n = min(args.eval_sequences, max(2, len(self.tokens) // self.length // 10))
            self.tokens, held_out = np.split(self.tokens, [-n * self.length])
        n = min(args.eval_sequences, len(held_out) // self.length)
        if n < 2:
            raise InputError(f"validation needs at least 2 sequences of {self.length} tokens: give more text or "
                             "shorter --chunks")
        starts = np.arange(n) * (len(held_out) - self.length) // (n - 1)         # fixed, and spread over the text
        rows = [held_out[start:start + self.length] for start in starts]
        self.validation = doubled(torch.from_numpy(np.stack(rows).astype(np.int64)), args.chunks)
        self.about = f"{len(self.tokens) / 1e6:.2f} M tokens"

    def checksum(self):
        """The same in all processes that read the same text."""
        return zlib.crc32(self.tokens)

    def batches(self, step):
        """Yield the global batches of this step and all later ones."""
        args = self.args
        stream = sequences(self.tokens, self.length, step * args.batch, args.seed)
        while True:
            rows = list(itertools.islice(stream, args.batch))
            batch = doubled(torch.stack(rows), args.chunks)
            if args.objective == "completion":          # the second half trains nothing: the pass leaves padding out
                batch.mask[:, args.chunks:] = 0
            yield batch


class InstructionData:
    """Contexts of up to chunks x chunk tokens, each with a conversation about it; validation asks about documents. A
    unit is what a row is drawn from: a document, or a task. With args.documents, half of the rows are texts of up to a
    chunk, to reconstruct (its own tokens follow) and to continue (as many next tokens follow) in turn, the two halves
    of eq. 5, so that training on questions does not unlearn them."""

    def __init__(self, args, tokenizer):
        self.args = args
        self.tokenizer = tokenizer
        self.text_rows = 0
        self.text = np.zeros(0)
        if args.documents:
            self.text_rows = round(TEXT_SHARE * args.batch)
            self.text = open_tokens(args.documents, tokenizer)
        self.question_rows = args.batch - self.text_rows

        documents, self.tasks = load_instructions(args.data)
        self.documents = usable(documents, tokenizer, args)
        self.about = (f"{len(self.documents)} of {len(documents)} documents have questions and fit into a context, "
                      f"{len(self.tasks)} tasks")
        if args.validation:
            held_out, _ = load_instructions(args.validation)
            held_out = usable(held_out, tokenizer, args)
        else:
            n = min(args.eval_sequences, max(2, len(self.documents) // 10))
            held_out = self.documents[:n]
            del self.documents[:n]
        self.by_source = index_by_source(self.documents)
        self.units = list(range(len(self.documents)))
        for task, (_, examples) in self.tasks.items():
            if len(examples) > 1:
                self.units += [task] * math.ceil(len(examples) / EXAMPLES_A_UNIT)
        self.steps_per_epoch = len(self.units) / self.question_rows

        half = min(args.eval_sequences, len(held_out)) // 2
        if half == 0 or not self.units:
            raise InputError(f"{len(held_out)} documents are there to validate on, {len(self.units)} documents and "
                             f"tasks to train on, with questions and of at most {args.chunks} x {args.chunk} tokens, "
                             "and 2 and 1 are needed: give more --data, files of --validation or longer --chunks")
        items = []
        for side in (held_out[:half], held_out[half:2 * half]):     # an item and its control share no document
            by_source = index_by_source(side)
            for k in range(half):
                items.append(instruction_example(tokenizer, side, by_source, self.tasks, k, args, 2, len(items)))
        self.validation = instruction_batch(items, tokenizer.pad_token_id, args.chunk)

    def checksum(self):
        """The same in all processes that read the same data."""
        rows = json.dumps([self.documents, self.tasks])
        return zlib.crc32(self.text, zlib.crc32(rows.encode()))

    def batches(self, step):
        """Yield the global batches of this step and all later ones: rows of questions, then rows of texts."""
        args = self.args
        # the units in an order shuffled anew each epoch: sequences of one number
        units = sequences(np.arange(len(self.units)), 1, step * self.question_rows, args.seed)
        texts = sequences(self.text, 2 * args.chunk, step * self.text_rows, args.seed)
        while True:
            examples = []
            for row in range(self.question_rows):
                unit = self.units[next(units)]
                examples.append(instruction_example(
                    self.tokenizer, self.documents, self.by_source, self.tasks, unit, args, 1, step, row))
            random = np.random.default_rng((args.seed, 3, step))
            for row in range(self.text_rows):
                ids = next(texts).tolist()                      # 2 chunks
                length = context_length(args.chunk, random)
                context = ids[:length]
                target = context                                # reconstruction
                if (step * self.text_rows + row) % 2:
                    target = ids[length:2 * length]             # completion
                examples.append(Example(context, target, target))
            yield instruction_batch(examples, self.tokenizer.pad_token_id, args.chunk)
            step += 1


def usable(documents, tokenizer, args):
    """The documents with questions, of up to args.chunks x args.chunk tokens, shuffled: a longer one's end, and answers
    with it, would be cut off."""
    found = []
    for document in documents:
        _, context, pairs = document
        if pairs and len(context_ids(tokenizer, context)) <= args.chunks * args.chunk:
            found.append(document)
    Random(args.seed).shuffle(found)
    return found


# --------------------------------------------------------------------------------------------------------------------
# packing: text -> one memory-mapped token file, and sequences out of it


def open_tokens(sources, tokenizer, path=None):
    """Memory-mapped tokens (T,) of sources: a packed .bin file as it is, anything else packed once, into path or CACHE.
    A token file belongs to one tokenizer."""
    facts = {
        "vocabulary": len(tokenizer),
        "probe": tokenizer("The quick brown fox, 1234.", add_special_tokens=False)["input_ids"],
        "marks": list(document_marks(tokenizer)),
        "dtype": "uint32"}
    if len(tokenizer) <= 65_536:
        facts["dtype"] = "uint16"
    if path is None and len(sources) == 1 and sources[0].endswith(".bin"):
        path = sources[0]
    else:
        with bad_input(f"{path or CACHE} cannot be written, where the packed text goes: make room there or name "
                       "another directory, instead of the cache in GENERATIVE_ADAPTER_CACHE", OSError):
            if path is not None:
                pack(sources, tokenizer, facts, path)
            else:
                files = json.dumps([facts, sources, *map(stamps, sources)])
                key = hashlib.sha256(files.encode()).hexdigest()[:16]
                path = os.path.join(CACHE, key + ".bin")
                os.makedirs(CACHE, exist_ok=True)
                with FileLock(path + ".lock"):          # one process of a machine packs, the others wait for it
                    if not os.path.isfile(path):
                        pack(sources, tokenizer, facts, path)

    with bad_input(f"{path} is not a packed token file", OSError, ValueError, TypeError):
        with open(path + ".json") as file:
            packed = json.load(file)
        tokens = np.memmap(path, dtype=facts["dtype"], mode="r")
        facts["tokens"] = len(tokens)
        fits = packed | facts == packed                 # all facts are as in the file
    if not fits:
        raise InputError(f"{path}: the token file is cut short or was packed with another tokenizer; pack it again")
    return tokens


def pack(sources, tokenizer, facts, path):
    """Tokenise every document of sources into one flat file, uint16 where the vocabulary fits, and a .json with the
    facts beside it. Rows without a text are left out and counted. Both are written aside and renamed; PACKED documents
    are in memory at a time."""
    before, after = facts["marks"]
    tokens = 0
    blank = 0
    total = sum(count_rows(source) for source in sources)
    rows = itertools.chain.from_iterable(map(read_rows, sources))
    rows = iter(tqdm(rows, desc="packing", total=total or None))
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as part:
        with open(f"{part}/tokens", "wb") as file:
            for some in iter(lambda: list(itertools.islice(rows, PACKED)), []):
                texts = []
                for where, row in some:
                    text = row.get("text", 0)           # 0: there is no such field
                    if text is None:
                        text = ""
                    if not isinstance(text, str):
                        raise InputError(f"{where}: field 'text' is missing or is not a text")
                    if text.strip():
                        texts.append(text)
                    else:
                        blank += 1
                for ids in tokenize(tokenizer, texts):
                    ids = before + ids + after
                    np.array(ids, dtype=facts["dtype"]).tofile(file)
                    tokens += len(ids)
        if tokens == 0:
            raise InputError(f"{', '.join(sources)}: there is no text in any row's field 'text'")
        with open(f"{part}/facts", "w") as file:
            json.dump({**facts, "tokens": tokens, "sources": sources}, file)
        os.replace(f"{part}/facts", path + ".json")
        os.replace(f"{part}/tokens", path)
    if blank:
        print(f"{blank} rows without a text were left out")


def sequences(tokens, length, first, seed):
    """Yield the endless stream of training sequences (length,), from number `first` on. Each epoch cuts tokens (T,)
    into pieces, from a random offset below length on, and shuffles them. Sequence i is the same for any number of
    processes, so the data position is one integer."""
    per_epoch = (len(tokens) - length + 1) // length                           # as many as fit at any offset
    if per_epoch < 1:
        raise InputError(f"the training text has {len(tokens)} tokens, fewer than two sequences of {length}: give more "
                         "text or a shorter --chunk or --chunks (without --validation, --eval-sequences are held out)")
    epoch, done = divmod(first, per_epoch)
    while True:
        random = np.random.default_rng((seed, epoch))
        offset = random.integers(length)
        for k in random.permutation(per_epoch)[done:]:
            start = offset + length * k
            yield torch.from_numpy(tokens[start:start + length].astype(np.int64))
        epoch += 1
        done = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="text files or hub data set ids")
    parser.add_argument("--out", required=True, help="token file to write, ending in .bin; a .json goes beside it")
    parser.add_argument("--base", default=DEFAULT_BASE, help="base model whose tokenizer is used; default %(default)s")
    args = parser.parse_args()
    if os.path.exists(args.out) or os.path.exists(args.out + ".json") or not args.out.endswith(".bin"):
        raise InputError("--out: name a new file ending in .bin")
    make_directory(os.path.dirname(args.out) or ".")
    path, options = locate_base(args.base)
    tokens = open_tokens(args.sources, tokenizer_at(args.base, path, **options), args.out)
    print(f"{args.out} and {args.out}.json: {len(tokens)} tokens. Next: python train.py --base {args.base} "
          f"--data {args.out} --out out/run")


if __name__ == "__main__":
    run_command(main)
