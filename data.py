"""Data: text packed once into a token file, the doubled sequence of pretraining, contexts cut into chunks, conversations with questions.

    python data.py corpus.parquet more.jsonl.gz notes.txt --out tokens.bin        # tokens of the default base; --base for another

A source is a .parquet, .jsonl(.gz) or .txt(.gz) file with a "text" field (a .txt file is one document), or a hub data set id, with its
configuration after a colon where it has several ("microsoft/ms_marco:v1.1"). Instruction tuning reads the schemas of Table 3's sets.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os

import numpy as np
import torch
from tqdm import tqdm

from support.files import InputError, count_rows, field, is_file_source, read_rows, run_command
from support.instructions import demonstration
from support.text import apply_template, context_ids, document_marks, tokenize, user_turn

CACHE = os.path.expanduser(os.environ.get("GENERATIVE_ADAPTER_CACHE", "~/.cache/generative-adapter"))

TARGET_TOKENS = 128       # a conversation may be this long even where chunks are shorter


# --------------------------------------------------------------------------------------------------------------------
# the packed token file


def tokenizer_facts(tokenizer):
    """What tells two tokenizers apart: a token file belongs to one."""
    probe = tokenizer("The quick brown fox, 1234.", add_special_tokens=False)["input_ids"]
    return {"vocabulary": len(tokenizer), "probe": probe, "marks": list(document_marks(tokenizer))}


def pack(sources, tokenizer, path, max_tokens=None):
    """Tokenise every document of sources into one flat file of uint16 (uint32 for a vocabulary beyond 65,536) and a .json beside it.
    The token file is written aside and renamed; 512 documents are in memory at a time. Raises InputError when the text holds no token."""
    if max_tokens is not None and max_tokens < 1:
        raise InputError("--max-tokens must be at least 1")
    before, after = document_marks(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 65_536 else np.uint32
    counts = [count_rows(source) for source in sources]
    total = max_tokens or (sum(counts) if None not in counts else None)
    tokens = documents = 0
    texts = (field(row, "text", str, where) for source in sources for where, row in read_rows(source))
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file, tqdm(total=total, unit="token" if max_tokens else "doc", unit_scale=True, desc="packing") as bar:
            while tokens != max_tokens and (batch := list(itertools.islice(texts, 512))):
                flat = [t for ids in tokenize(tokenizer, batch) for t in (*before, *ids, *after)]
                flat = flat[:max_tokens - tokens] if max_tokens else flat
                np.asarray(flat, dtype=dtype).tofile(file)
                tokens, documents = tokens + len(flat), documents + len(batch)
                bar.update(len(flat) if max_tokens else len(batch))
                bar.set_postfix(tokens=f"{tokens / 1e6:.1f}M")
        if tokens <= documents * (len(before) + len(after)):
            raise InputError(f"{', '.join(sources)}: no text to pack")
        with open(path + ".json", "w") as file:
            json.dump({"dtype": np.dtype(dtype).name, "tokens": tokens, "documents": documents, "sources": sources, **tokenizer_facts(tokenizer)}, file)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_tokens(path, tokenizer):
    """The token file as a read-only memory map (tokens,). Raises InputError when it is missing, cut short or of another tokenizer."""
    try:
        with open(path + ".json") as file:
            meta = json.load(file)
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']!r}")
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a packed token file: {error}") from None
    if len(tokens) != meta.get("tokens") or any(meta.get(key) != value for key, value in tokenizer_facts(tokenizer).items()):
        raise InputError(f"{path}: the token file is cut short or was packed with another tokenizer; pack the text again")
    return tokens


def open_tokens(sources, tokenizer, max_tokens=None):
    """Memory-mapped tokens of sources: a .bin file as it is, anything else packed once into the cache (GENERATIVE_ADAPTER_CACHE)."""
    if len(sources) == 1 and sources[0].endswith(".bin"):
        if max_tokens is not None:
            raise InputError(f"--max-tokens is for packing: {sources[0]} is packed already, so leave the flag out")
        return load_tokens(sources[0], tokenizer)
    for source in sources:
        if is_file_source(source) and not os.path.isfile(source):
            raise InputError(f"{source}: no such file")
    stamps = [(os.path.abspath(s), os.path.getsize(s), os.path.getmtime(s)) if os.path.isfile(s) else s for s in sources]
    key = hashlib.sha256(json.dumps([stamps, tokenizer_facts(tokenizer), max_tokens]).encode()).hexdigest()[:16]
    path = os.path.join(CACHE, key + ".bin")
    if not os.path.isfile(path):
        os.makedirs(CACHE, exist_ok=True)
        pack(sources, tokenizer, path, max_tokens)
    return load_tokens(path, tokenizer)


@functools.lru_cache(maxsize=2)
def epoch_order(n_tokens, length, seed, epoch):
    """Starts of the sequences of one epoch, shuffled; each epoch cuts the tokens at a fresh offset. Depends on nothing but its arguments."""
    random = np.random.default_rng((seed, epoch))
    offset = int(random.integers(length))
    return offset + length * random.permutation((n_tokens - length + 1) // length)


def sequences(tokens, length, first, count, seed):
    """Training sequences first .. first+count-1 of the endless stream of epochs: (count, length) long.
    Sequence i is the same for any number of processes, so the data position is one integer."""
    per_epoch = (len(tokens) - length + 1) // length
    if per_epoch < 1:
        raise InputError(f"the training text has {len(tokens)} tokens, fewer than two sequences of {length}: give more text, a shorter --chunk or fewer --chunks (without --validation, --eval-sequences are held out of it)")
    rows = []
    for i in range(first, first + count):
        start = epoch_order(len(tokens), length, seed, i // per_epoch)[i % per_epoch]
        rows.append(np.asarray(tokens[start:start + length], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


# --------------------------------------------------------------------------------------------------------------------
# segments


def doubled(tokens, C, pad, windows_seed=None):
    """The doubled sequence, both tasks of §2.3 in one pass: tokens (B, C L) -> segments (B, 2C, L), mask (B, 2C, L), visible (2C,).

    Chunk j is read under the adapter of the chunks before it (completion), then again under one that has seen it too (reconstruction):
    visible = 0, 1, .., C-1, 1, 2, .., C. The second half is a copy (the authors' README); with windows_seed, segment C+j is instead a random window of
    the first (j+1) L tokens, right-padded, as in the released code, which draws them once while these are drawn afresh from the seed.
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
    return torch.cat([chunks, second], 1), mask, torch.tensor([*range(C), *range(1, C + 1)])


def split_into_chunks(contexts, pad, chunk=1024):
    """Contexts (lists of ids) side by side, each split evenly: ceil(n / chunk) chunks of ceil(n / chunks) tokens -> (B, N, L), mask (B, N, L).
    The last chunk is right-padded, and so are shorter contexts; a chunk of padding adds nothing to S. Raises InputError for an empty context."""
    pieces = []
    for ids in contexts:
        if len(ids) == 0:
            raise InputError("the context is empty: it needs at least 1 token")
        n = -(-len(ids) // chunk)
        length = -(-len(ids) // n)
        pieces.append([ids[i:i + length] for i in range(0, len(ids), length)])
    N, L = max(map(len, pieces)), max(len(p) for chunks in pieces for p in chunks)
    out = torch.full((len(contexts), N, L), pad)
    mask = torch.zeros(len(contexts), N, L, dtype=torch.long)
    for b, chunks in enumerate(pieces):
        for j, piece in enumerate(chunks):
            out[b, j, :len(piece)] = torch.as_tensor(piece)
            mask[b, j, :len(piece)] = 1
    return out, mask


def left_pad(prompts, pad):
    """Prompts (lists of ids) as generate wants them: (B, L) left-padded, attention mask (B, L)."""
    L = max(map(len, prompts))
    ids = torch.tensor([[pad] * (L - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompts])


def conversation(tokenizer, pairs, limit):
    """Those questions and answers that fit into limit tokens, in the base's chat template: (ids, labels), labels -100 but for the answers and the token
    that ends each. The first question stands there exactly as user_turn shows it at test time. Where not one fits, the last is cut.
    A base without a template gets one question."""
    messages, ids, labels = [], [], []
    ends = {tokenizer.eos_token_id, *document_marks(tokenizer)[1]}
    for question, answer in pairs:
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if tokenizer.chat_template is None:
            prompt = user_turn(tokenizer, question)
            full = prompt + tokenize(tokenizer, [answer])[0] + [tokenizer.eos_token_id]
        else:
            prompt = apply_template(tokenizer, messages + turn[:1], add_generation_prompt=True)
            full = apply_template(tokenizer, messages + turn)
        if full[:len(ids)] != ids:                               # the template writes earlier turns differently: keep what stands
            break
        if len(full) > limit and (ids or (question, answer) != pairs[-1]):
            continue
        stop = next((i + 1 for i in range(len(prompt), len(full)) if full[i] in ends), len(full))
        labels = labels + [-100] * (len(prompt) - len(labels)) + full[len(prompt):stop] + [-100] * (len(full) - stop)
        ids, messages = full, messages + turn
        if tokenizer.chat_template is None:
            break
    return ids[:limit], labels[:limit]


def instruction_units(documents, tasks):
    """What an epoch goes through once: every document, and a task once for each 20 of its items."""
    return [*range(len(documents)), *(task for task, (_, items) in tasks.items() for _ in range(-(-len(items) // 20)) if len(items) > 1)]


def instruction_example(tokenizer, documents, tasks, unit, chunk, chunks, random):
    """(context ids, conversation ids, labels) of a unit. A document is set among others of its source, in random order, until a random length of
    up to chunks x chunk tokens is reached: distractors, whose questions may be asked too. A task gives demonstrations up to that length
    and four queries. Contexts are joined by blank lines and raw, as in evaluation."""
    room, limit = int(random.integers(chunk // 2, chunk * chunks + 1)), max(chunk, TARGET_TOKENS)

    def length(text):
        return len(tokenize(tokenizer, [text])[0])

    if isinstance(unit, str):
        definition, items = tasks[unit]
        order = [items[k] for k in random.permutation(len(items))[:68]]
        queries, demonstrations = order[:min(4, len(order) - 1)], order[min(4, len(order) - 1):]
        pieces = [definition] if definition else []
        pieces += [demonstration(text, outputs[0]) for text, outputs in demonstrations]
        pairs = [(demonstration(text, ""), outputs) for text, outputs in queries]
        used, kept = 0, []
        for piece in pieces:
            used += length(piece) + 2
            if used > room and kept:
                break
            kept.append(piece)
    else:
        source, context, pairs = documents[unit]
        kept, used = [context], length(context)
        for other in random.integers(len(documents), size=64):
            other_source, other_context, other_pairs = documents[other]
            if other_source != source or other_context in kept:
                continue
            used += length(other_context) + 2
            if used > room:
                break
            kept.append(other_context)
            pairs = pairs + other_pairs
        random.shuffle(kept)
        pairs = [pairs[k] for k in random.permutation(len(pairs))]
    pairs = [(question, answers[int(random.integers(len(answers)))]) for question, answers in pairs]
    return context_ids(tokenizer, "\n\n".join(kept))[:chunk * chunks], *conversation(tokenizer, pairs, limit)


def instruction_batch(examples, pad, chunk):
    """Examples (context ids, conversation ids, labels) -> segments (B, C+1, L), mask, visible (C+1,), labels (B, C+1, L): C context chunks, padded, then
    the conversation under the adapter of all of them: visible = 0, 1, .., C-1, C."""
    segments, mask = split_into_chunks([context for context, _, _ in examples], pad, chunk)      # (B, C, L)
    C, L = segments.shape[1], max(segments.shape[2], *(len(ids) for _, ids, _ in examples))
    segments = torch.nn.functional.pad(segments, (0, L - segments.shape[2], 0, 1), value=pad)     # (B, C+1, L)
    mask = torch.nn.functional.pad(mask, (0, L - mask.shape[2], 0, 1))
    labels = torch.full_like(segments, -100)
    for b, (_, ids, targets) in enumerate(examples):
        segments[b, C, :len(ids)], mask[b, C, :len(ids)], labels[b, C, :len(ids)] = torch.tensor(ids), 1, torch.tensor(targets)
    return segments, mask, torch.arange(C + 1), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", required=True, help="token file to write, ending in .bin; a .json with its facts goes beside it")
    parser.add_argument("--base", default=None, help="base model whose tokenizer is used")
    parser.add_argument("--max-tokens", type=int, default=None, help="stop after this many tokens")
    args = parser.parse_args()
    from model import DEFAULT_BASE, load_tokenizer
    if not args.out.endswith(".bin") or not os.path.isdir(os.path.dirname(args.out) or ".") or os.path.exists(args.out) or os.path.exists(args.out + ".json"):
        raise InputError(f"--out {args.out}: name a new file ending in .bin, in a directory that exists")
    pack(args.sources, load_tokenizer(args.base or DEFAULT_BASE), args.out, args.max_tokens)


if __name__ == "__main__":
    run_command(main)
