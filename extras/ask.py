"""evaluate.py --task ask: a reader's own text, read into a memory and asked about."""

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open

import evaluate
from generator import Memory
from support.files import InputError, bad_input
from support.text import context_ids, user_turn
from tasks.qa import IN_CONTEXT_PROMPT

NEW_TOKENS = 60


def ask(args):
    """Read --context into a memory (that of --memory, streamed on and saved, where it exists), then answer --question,
    or questions typed in."""
    texts = [read_text(path) for path in args.context or []]
    if not texts and not (args.memory and os.path.exists(args.memory)):
        raise InputError("--task ask has nothing to read: give a text with --context, or a --memory that exists")
    lock = contextlib.nullcontext()
    if args.memory and texts:                   # from loading to saving, or what another one reads would be lost
        lock = FileLock(f"{args.memory}.lock", timeout=0)
    with bad_input(f"--memory {args.memory} is being read into by another process: wait for it", Timeout), lock:
        model, tokenizer, memory, before = remember(args, texts)
    if args.export:
        model.export_peft(memory, args.export)
        print(f"LoRA adapter of the context in {args.export}")

    for question in args.question or typed_questions():
        prompt = user_turn(tokenizer, question)
        asked = [("adapter", prompt, memory)]
        if args.compare:
            asked.append(("closed-book", prompt, None))
        if args.compare and texts:
            context = "\n\n".join(texts)
            (whole,), lost = evaluate.in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, context,
                                                         [{"question": question}], model.window - NEW_TOKENS)
            name = "in-context"
            if before or lost:
                name += f" (without {before} tokens remembered from before and {lost} that do not fit)"
            asked.append((name, whole, None))
        for name, prompt, under in asked:
            began = time.time()
            (words,), (new,), (cut,) = evaluate.greedy_answers(model, tokenizer, [prompt], NEW_TOKENS, under)
            if cut:
                words += " ..."
            if args.compare:
                words = f"{name}: {words}   [{len(prompt)} prompt tokens, {new} new, {time.time() - began:.1f} s]"
            print(words)


def remember(args, texts):
    """(model, tokenizer, memory, tokens in it that are not of these texts). A text that the memory file holds already
    is not read again: read twice it would weigh twice."""
    memory = None
    digests = []                                # of the texts in it
    if args.memory and os.path.exists(args.memory):
        memory = Memory.load(args.memory)
        with safe_open(args.memory, framework="pt") as file:
            digests = file.metadata().get("texts", "").split()
    model, tokenizer = evaluate.load_model(args)
    if memory is not None:
        model.lora(memory)                      # refused here, before anything is read, if another generator wrote it
    began = time.time()
    given = 0
    read = 0
    for path, text in zip(args.context or [], texts):
        ids = context_ids(tokenizer, text)
        given += len(ids)
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        if digest in digests:
            print(f"NOTE: the memory holds {path} already, so it is not read again")
            continue
        digests.append(digest)
        memory = model.read(ids, memory)
        read += len(ids)
    tokens = int(memory.tokens)
    print(f"{read} tokens read in {time.time() - began:.1f} s, {tokens} remembered")
    if args.checkpoint != "none" and tokens > model.config.chunk:
        print("NOTE:", evaluate.longer_than_trained(model.config.chunk, tokens))
    if args.memory and texts:
        memory.save(args.memory, texts=" ".join(digests))
        print(f"memory in {args.memory}")
    return model, tokenizer, memory, tokens - given


def typed_questions():
    """Lines typed in, until an empty one or the end of the input."""
    with contextlib.suppress(ImportError):      # Windows has none
        import readline  # noqa: F401           # with it input() has cursor keys and a history
    print("Type a question; an empty line or Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        yield from iter(lambda: input("question> ").strip(), "")


def read_text(path):
    """The text of a file, or of standard input (-)."""
    with bad_input(f"--context {path} cannot be read as UTF-8 text", OSError, UnicodeDecodeError):
        if path == "-":
            content = sys.stdin.buffer.read()
        else:
            content = Path(path).read_bytes()
        if content.startswith((b"%PDF", b"PK\3\4")) or b"\0" in content:
            raise InputError(f"--context {path} is no plain text but a PDF, an office document, UTF-16 or the like: "
                             "save it as UTF-8 text")
        text = content.decode("utf-8-sig").replace("\r\n", "\n")        # without the mark some editors write first
    if not text.strip():
        raise InputError(f"--context {path} is empty: it needs at least one word")
    return text
