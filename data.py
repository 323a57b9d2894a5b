"""Data: from text to the batches of a training run (§2.3, appendix A, Table 3).

    python data.py corpus.parquet more.jsonl.gz notes.txt --out tokens.bin        # pack text; --base: whose tokenizer

A source is a .parquet, .jsonl(.gz) or .txt(.gz) file with a "text" field (a .txt file is one document), or a hub data
set id, with its configuration after a colon where it has several ("microsoft/ms_marco:v1.1"). Instruction tuning reads
the schemas of Table 3's sets (support/instructions.py).

Shapes: B rows of a batch, N segments of a pass, C context chunks of a row, L tokens of a segment.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import platform
from random import Random
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.bases import DEFAULT_BASE, locate_base, tokenizer_at
from support.files import (CACHE, InputError, bad_input, count_rows, field, is_file_source, read_rows, run_command,
                           stamps)
from support.instructions import demonstration, excerpt, instruction_units, load_instructions
from support.text import apply_template, context_ids, document_marks, tokenize, user_turn

TARGET_TOKENS = 128       # a conversation may be this long even where chunks are shorter
SENTENCE_TOKENS = 16      # the shortest contexts of instruction tuning
TEXT_SHARE = 3 / 8        # of the rows of an instruction batch: texts, where there are some


class Batch(NamedTuple):
    """One pass over all segments: segment j is adapted by the first visible[j] segments."""
    segments: torch.Tensor     # (B, N, L) token ids, right-padded
    mask: torch.Tensor         # (B, N, L) 1 for real tokens, 0 for padding
    visible: torch.Tensor      # (N,)
    labels: torch.Tensor       # (B, N, L) targets, -100 where there is none


# --------------------------------------------------------------------------------------------------------------------
# segments: the doubled sequence of pretraining, and contexts cut into chunks


def doubled(tokens, C, pad, windows_seed=None):
    """The doubled sequence, both tasks of §2.3 in one pass: tokens (B, C L) -> Batch of N = 2C segments.

    Chunk j is read under the adapter of the chunks before it (completion), then again under one that has seen it too
    (reconstruction): visible = 0, 1, .., C-1, 1, 2, .., C. The second half is a copy (the authors' README); with
    windows_seed, segment C+j is a random window of the first (j+1) L tokens, right-padded (released code: drawn once).
    """
    B, L = len(tokens), tokens.shape[1] // C
    chunks = tokens.view(B, C, L)                                              # (B, C, L)
    mask = torch.ones(B, 2 * C, L, dtype=torch.long)
    second = chunks.clone()                                                    # (B, C, L)
    if windows_seed is not None:
        second.fill_(pad)
        random = np.random.default_rng(windows_seed)
        for b in range(B):
            for j in range(C):
                start = int(random.integers((j + 1) * L))
                window = tokens[b, start:min(start + L, (j + 1) * L)]
                second[b, j, :len(window)] = window
                mask[b, C + j, len(window):] = 0
    segments = torch.cat([chunks, second], 1)                                  # (B, 2C, L)
    visible = torch.tensor([*range(C), *range(1, C + 1)])                      # (2C,)
    return Batch(segments, mask, visible, segments.masked_fill(mask == 0, -100))


def split_into_chunks(contexts, pad, chunk=1024):
    """Contexts (lists of at least 1 id), each split evenly into C = ceil(n / chunk) chunks of L = ceil(n / C) tokens
    -> ids (B, C, L), mask (B, C, L). The last chunk is right-padded, and so are shorter contexts; a chunk of padding
    adds nothing to S."""
    rows = []
    for ids in contexts:
        if len(ids) == 0:
            raise InputError("the context is empty: it needs at least 1 token")
        length = -(-len(ids) // -(-len(ids) // chunk))
        rows.append([ids[at:at + length] for at in range(0, len(ids), length)])
    B, C, L = len(rows), max(map(len, rows)), max(len(piece) for row in rows for piece in row)
    ids, mask = torch.full((B, C, L), pad), torch.zeros(B, C, L, dtype=torch.long)
    for b, row in enumerate(rows):
        for j, piece in enumerate(row):
            ids[b, j, :len(piece)], mask[b, j, :len(piece)] = torch.as_tensor(piece), 1
    return ids, mask


def trim(mask, visible, *tensors):
    """Drop the segments and the columns that are padding in every row: mask (B, N, L), visible (N,) and tensors (B, N)
    or (B, N, L) -> [mask, *tensors], visible."""
    kept = mask.any(-1).any(0)                                                 # (N,)
    seen = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])       # (N+1,) kept segments among the first v
    L = int(mask.any(0).any(0).nonzero().max()) + 1
    return [t[:, kept] if t.dim() == 2 else t[:, kept, :L] for t in (mask, *tensors)], seen[visible][kept]


# --------------------------------------------------------------------------------------------------------------------
# instruction tuning: a context and a conversation about it


class Example(NamedTuple):
    context: list              # ids of the context
    ids: list                  # ids of questions and answers in the chat template
    labels: list               # ids of the answers, -100 elsewhere
    texts: frozenset           # the documents or demonstrations in the context


def conversation(tokenizer, pairs, limit):
    """(ids, labels) of those questions and answers that fit into limit tokens, in the base's chat template. Labels are
    -100 but for the answers and the token that ends each. The first question stands there exactly as user_turn shows it
    at test time. If no pair fits, the last is truncated. A base without a template gets one question."""
    messages, ids, labels = [], [], []
    ends = {tokenizer.eos_token_id, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    for k, (question, answer) in enumerate(pairs, 1):
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if tokenizer.chat_template is None:
            prompt = user_turn(tokenizer, question)
            full = prompt + tokenize(tokenizer, [answer])[0] + [tokenizer.eos_token_id]
        else:
            prompt = apply_template(tokenizer, messages + turn[:1], add_generation_prompt=True)
            full = apply_template(tokenizer, messages + turn)
        if full[:len(ids)] != ids:             # the template writes earlier turns differently: keep what stands
            break
        if len(full) > limit and (ids or k < len(pairs)):
            continue
        stop = next((i + 1 for i in range(len(prompt), len(full)) if full[i] in ends), len(full))
        labels += [-100] * (len(prompt) - len(labels)) + full[len(prompt):stop] + [-100] * (len(full) - stop)
        ids, messages = full, messages + turn
        if tokenizer.chat_template is None:
            break
    return ids[:limit], labels[:limit]


def document_context(tokenizer, documents, index, room, random, excerpts):
    """(texts, pairs): a document, whole, and distractors, others of its source in random order, while all fit in room
    tokens; their questions may be asked too. With probability excerpts, a document longer than room is cut to the
    sentences around an answer."""
    source, text, pairs = documents[index]
    texts, used = [text], len(tokenize(tokenizer, [text])[0])
    if used > room and random.random() < excerpts:
        text, pairs = excerpt(tokenizer, text, pairs, room, random)
        texts = [text]
    others = [k for k, other in enumerate(documents) if other[0] == source and k != index] if used < room else []
    for k in random.permutation(others):
        _, text, more = documents[k]
        used += len(tokenize(tokenizer, [text])[0]) + 2                        # and the blank line before it
        if used > room:
            break
        texts, pairs = texts + [text], pairs + more
    random.shuffle(texts)
    return texts, [pairs[k] for k in random.permutation(len(pairs))]


def task_context(tokenizer, definition, items, room, random):
    """(texts, pairs) of a task: definition and demonstrations, the first whole, more while all fit in room; queries."""
    order = [items[k] for k in random.permutation(len(items))[:68]]            # up to 4 queries and 64 demonstrations
    queries, shown = order[:min(4, len(order) - 1)], order[min(4, len(order) - 1):]
    texts = [definition] if definition else []
    texts += [demonstration(text, outputs[0]) for text, outputs in shown]
    used = np.cumsum([len(ids) + 2 for ids in tokenize(tokenizer, texts)])
    return texts[:max(1, int((used <= room).sum()))], [(demonstration(text, ""), outputs) for text, outputs in queries]


def instruction_example(tokenizer, documents, tasks, unit, chunk, chunks, random, excerpts=0.0):
    """Example of a unit: index of a document, name of a task, or ids of a text to reconstruct (eq. 5). The room for its
    context is log-uniform between a sentence and chunks x chunk tokens: each doubling has an equal share (longer
    documents: see document_context). Texts are joined by blank lines and raw, as in evaluation."""
    limit = chunk * chunks
    room = int(np.exp(random.uniform(np.log(min(SENTENCE_TOKENS, limit)), np.log(limit + 1))))
    if isinstance(unit, list):
        return Example(unit[:room], unit[:room], unit[:room], frozenset())
    if isinstance(unit, str):
        texts, pairs = task_context(tokenizer, *tasks[unit][1:], room, random)
    else:
        texts, pairs = document_context(tokenizer, documents, unit, room, random, excerpts)
    context = context_ids(tokenizer, "\n\n".join(texts))[:limit]
    pairs = [(question, answers[int(random.integers(len(answers)))]) for question, answers in pairs]
    return Example(context, *conversation(tokenizer, pairs, max(chunk, TARGET_TOKENS)), frozenset(texts))


def instruction_batch(examples, pad, chunk):
    """Batch of N = C+1 segments: C context chunks, then the conversation under the adapter of all of them,
    visible = 0, 1, .., C-1, C."""
    segments, mask = split_into_chunks([example.context for example in examples], pad, chunk)      # (B, C, L)
    C, L = segments.shape[1], max(segments.shape[2], *(len(example.ids) for example in examples))
    segments = F.pad(segments, (0, L - segments.shape[2], 0, 1), value=pad)                        # (B, C+1, L)
    mask = F.pad(mask, (0, L - mask.shape[2], 0, 1))                                               # (B, C+1, L)
    labels = torch.full_like(segments, -100)                                                       # (B, C+1, L)
    for b, (_, ids, targets, _) in enumerate(examples):
        segments[b, C, :len(ids)], labels[b, C, :len(ids)] = torch.tensor(ids), torch.tensor(targets)
        mask[b, C, :len(ids)] = 1
    return Batch(segments, mask, torch.arange(C + 1), labels)


# --------------------------------------------------------------------------------------------------------------------
# the batches of a run: whole global batches, the same on every process


class Batches(NamedTuple):
    training: Callable         # step -> Batch
    validation: Batch          # fixed
    controls: list             # for each validation item, the item whose context is its control, or None
    epoch: float               # instruction tuning: steps of an epoch
    about: str                 # what they hold, in words
    text: np.ndarray = None    # pretraining: the packed tokens


def control_items(documents):
    """For each item the index of another whose context shares no document with its own, None where each shares one.
    documents: the documents of each item's context, as sets. Neighbours may be alike: item i takes from i + n/2 on."""
    n = len(documents)
    return [next((j % n for j in range(i + n // 2, i + n // 2 + n) if not documents[i] & documents[j % n]), None)
            for i in range(n)]


def pretraining_batches(tokenizer, sources, validation, *, chunk, chunks, batch_size, seed, eval_sequences,
                        max_tokens=None, windows=False):
    """Batches of doubled sequences of chunks x chunk tokens over packed text. validation: sources, or None to hold the
    last eval_sequences sequences out of training. windows: see doubled."""
    length = chunks * chunk
    tokens = open_tokens(sources, tokenizer, max_tokens)
    end = max(len(tokens) - eval_sequences * length, 0)
    tokens, held_out = (tokens, open_tokens(validation, tokenizer)) if validation else (tokens[:end], tokens[end:])
    sequences(tokens, length, 0, 1, seed)               # too little text: say so before anything is computed or written
    count = min(eval_sequences, len(held_out) // length)
    if count < 2:
        raise InputError(f"validation needs at least 2 sequences of {length} tokens, the text gives {count}: "
                         "give more text or shorter --chunks")
    starts = np.linspace(0, len(held_out) - length, count).astype(int)       # fixed, and spread over the text
    held_out = torch.from_numpy(np.stack([np.asarray(held_out[s:s + length], dtype=np.int64) for s in starts]))

    def training(step):
        rows = sequences(tokens, length, step * batch_size, batch_size, seed)                      # (B, C L)
        return doubled(rows, chunks, tokenizer.pad_token_id, (seed, step) if windows else None)

    controls = control_items([{start} for start in starts])
    return Batches(training, doubled(held_out, chunks, tokenizer.pad_token_id), controls, None,
                   f"{len(tokens) / 1e6:.2f} M tokens", tokens)


def instruction_batches(tokenizer, sources, validation, *, chunk, chunks, batch_size, seed, eval_sequences,
                        weights=(), excerpts=0.0, texts=None):
    """Batches of instruction data: contexts of up to chunks x chunk tokens, then a conversation about each. validation:
    sources, or None to hold eval_sequences documents out of training; it asks about whole documents. weights: see
    instruction_units. excerpts: see document_context. texts: sources of texts of up to chunk tokens to reconstruct."""
    limit, text_rows = chunk * chunks, round(TEXT_SHARE * batch_size) if texts else 0
    rows, tokens = batch_size - text_rows, open_tokens(texts, tokenizer) if texts else None
    if texts:
        sequences(tokens, chunk, 0, 1, seed)            # too little text: say so before anything is computed or written
    everything, tasks = load_instructions(sources)

    def short_enough(documents):                        # the end of a longer one is truncated, and some answers with it
        encoded, bos = tokenize(tokenizer, [context for _, context, _ in documents]), document_marks(tokenizer)[0]
        return [document for document, ids in zip(documents, encoded) if len(bos + ids) <= limit]

    dropped = len(everything) - len(documents := short_enough(everything))
    Random(seed).shuffle(documents)
    held_out = short_enough(load_instructions(validation)[0]) if validation else documents[:eval_sequences]
    documents = documents if validation else documents[eval_sequences:]
    Random(seed).shuffle(held_out)
    units = instruction_units(documents, tasks, weights)

    def example(documents, unit, excerpts, *number):
        random = np.random.default_rng((seed, *number))
        return instruction_example(tokenizer, documents, tasks, unit, chunk, chunks, random, excerpts)

    def training(step):
        examples = []
        for i in range(step * rows, (step + 1) * rows):
            epoch, k = divmod(i, len(units))
            examples.append(example(documents, units[epoch_order(len(units), 1, seed, epoch)[k]], excerpts, 1, i))
        for i in range(step * text_rows, (step + 1) * text_rows):
            examples.append(example(documents, sequences(tokens, chunk, i, 1, seed)[0].tolist(), 0.0, 3, i))
        return instruction_batch(examples, tokenizer.pad_token_id, chunk)

    items = [example(held_out, k, 0.0, 2, k) for k in range(min(eval_sequences, len(held_out)))]
    items = [e for e in items if any(label != -100 for label in e.labels[1:])]    # else the question fills the segment
    if len(items) < 2 or len(units) < 1:
        raise InputError(f"need 1 unit to train on, 2 documents to validate on, found {len(units)}, {len(items)} of at "
                         f"most {limit} tokens: give more data, --validation, longer --chunks, fewer --eval-sequences")
    controls = control_items([e.texts for e in items])
    about = f"{len(documents)} documents ({dropped} longer than {limit} tokens left out) and {len(tasks)} tasks"
    if None in controls:
        about += f", {controls.count(None)} of {len(items)} validation items without a control of other documents"
    return Batches(training, instruction_batch(items, tokenizer.pad_token_id, chunk), controls, len(units)/rows, about)


# --------------------------------------------------------------------------------------------------------------------
# packing: text -> one memory-mapped token file, and sequences out of it


def tokenizer_facts(tokenizer):
    """What tells two tokenizers apart: a token file belongs to one."""
    probe = tokenizer("The quick brown fox, 1234.", add_special_tokens=False)["input_ids"]
    return {"vocabulary": len(tokenizer), "probe": probe, "marks": list(document_marks(tokenizer))}


def pack(sources, tokenizer, path, max_tokens=None):
    """Tokenise every document of sources into one flat file of uint16 (uint32 for a vocabulary beyond 65,536) and a
    .json beside it. The token file is written aside and renamed; 512 documents are in memory at a time."""
    if max_tokens is not None and max_tokens < 1:
        raise InputError("--max-tokens must be at least 1")
    before, after = document_marks(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 65_536 else np.uint32
    counts = [count_rows(source) for source in sources]
    total, unit = (max_tokens, "token") if max_tokens else (None if None in counts else sum(counts), "doc")
    tokens, documents, empty = 0, 0, True
    texts = (field(row, "text", str, where) for source in sources for where, row in read_rows(source))
    part = f"{path}.{platform.node()}.{os.getpid()}.part"      # machines may share the directory
    try:
        with open(part, "wb") as file, tqdm(total=total, unit=unit, unit_scale=True, desc="packing") as bar:
            while tokens != max_tokens and (some := list(itertools.islice(texts, 512))):
                encoded = tokenize(tokenizer, some)
                empty = empty and not any(encoded)
                flat = [t for ids in encoded for t in (*before, *ids, *after)][:max_tokens and max_tokens - tokens]
                np.asarray(flat, dtype=dtype).tofile(file)
                tokens, documents = tokens + len(flat), documents + len(some)
                bar.update(len(flat) if max_tokens else len(some))
                bar.set_postfix(tokens=f"{tokens / 1e6:.1f}M")
        if empty:
            raise InputError(f"{', '.join(sources)}: no text to pack")
        with open(path + ".json", "w") as file:
            json.dump({"dtype": np.dtype(dtype).name, "tokens": tokens, "documents": documents, "sources": sources,
                       **tokenizer_facts(tokenizer)}, file)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_tokens(path, tokenizer):
    """The token file as a read-only memory map (tokens,)."""
    with bad_input(f"{path} is not a packed token file"), open(path + ".json") as file:
        meta = json.load(file)
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']!r}")
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
    facts = {"tokens": len(tokens), **tokenizer_facts(tokenizer)}
    if any(meta.get(key) != value for key, value in facts.items()):
        raise InputError(f"{path}: the token file is cut short or was packed with another tokenizer; pack it again")
    return tokens


def open_tokens(sources, tokenizer, max_tokens=None):
    """Memory-mapped tokens of sources: a .bin file as it is, anything else packed once into CACHE."""
    if len(sources) == 1 and sources[0].endswith(".bin"):
        if max_tokens is not None:
            raise InputError(f"--max-tokens is for packing: {sources[0]} is packed already, so leave the flag out")
        return load_tokens(sources[0], tokenizer)
    if missing := [source for source in sources if is_file_source(source) and not os.path.isfile(source)]:
        raise InputError(f"{missing[0]}: no such file")
    files = [stamps(source)[0] if os.path.isfile(source) else source for source in sources]
    key = hashlib.sha256(json.dumps([files, tokenizer_facts(tokenizer), max_tokens]).encode()).hexdigest()[:16]
    path = os.path.join(CACHE, key + ".bin")
    if not os.path.isfile(path):
        os.makedirs(CACHE, exist_ok=True)
        pack(sources, tokenizer, path, max_tokens)
    return load_tokens(path, tokenizer)


@functools.lru_cache(maxsize=2)
def epoch_order(n_tokens, length, seed, epoch):
    """Starts of one epoch's sequences, shuffled, from a fresh offset below length. With length 1, a permutation."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(length)) + length * random.permutation((n_tokens - length + 1) // length)


def sequences(tokens, length, first, count, seed):
    """Training sequences first .. first+count-1 of the endless stream of epochs: (count, length) long.
    Sequence i is the same for any number of processes, so the data position is one integer."""
    per_epoch = (len(tokens) - length + 1) // length                           # as many as fit at any offset
    if per_epoch < 1:
        raise InputError(f"the training text has {len(tokens)} tokens, fewer than two sequences of {length}: give more "
                         "text or a shorter --chunk or --chunks (without --validation, --eval-sequences are held out)")
    places = [divmod(i, per_epoch) for i in range(first, first + count)]
    starts = [epoch_order(len(tokens), length, seed, epoch)[k] for epoch, k in places]
    return torch.from_numpy(np.stack([np.asarray(tokens[s:s + length], dtype=np.int64) for s in starts]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", required=True, help="token file to write, ending in .bin; a .json goes beside it")
    parser.add_argument("--base", default=DEFAULT_BASE, help="base model whose tokenizer is used")
    parser.add_argument("--max-tokens", type=int, help="stop after this many tokens")
    args = parser.parse_args()
    written = os.path.exists(args.out) or os.path.exists(args.out + ".json")
    if written or not args.out.endswith(".bin") or not os.path.isdir(os.path.dirname(args.out) or "."):
        raise InputError(f"--out {args.out}: name a new file ending in .bin, in a directory that exists")
    path, options = locate_base(args.base)
    pack(args.sources, tokenizer_at(args.base, path, **options), args.out, args.max_tokens)


if __name__ == "__main__":
    run_command(main)
