"""evaluate.py --task ask: a reader's own text, read into a memory and asked about."""

import contextlib
import os
import sys
import time

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
    memory = None
    if args.memory and os.path.exists(args.memory):
        memory = Memory.load(args.memory)
    if not texts and memory is None:
        raise InputError("--task ask has nothing to read: give a text with --context, or a --memory that exists")
    model, tokenizer = evaluate.load_model(args)
    before = 0
    if memory is not None:
        model.lora(memory)                      # refused here, before anything is read, if another generator wrote it
        if len(memory.tokens) != 1:
            raise InputError(f"--memory {args.memory} holds {len(memory.tokens)} contexts side by side: ask takes one")
        before = int(memory.tokens)
    began = time.time()
    for text in texts:
        memory = model.read(context_ids(tokenizer, text), memory)
    tokens = int(memory.tokens)
    print(f"{tokens - before} tokens read in {time.time() - began:.1f} s, {tokens} remembered")
    if args.memory and texts:
        memory.save(args.memory)
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
            (words,), (new,) = evaluate.greedy_answers(model, tokenizer, [prompt], NEW_TOKENS, under)
            if args.compare:
                words = f"{name}: {words}   [{len(prompt)} prompt tokens, {new} new, {time.time() - began:.1f} s]"
            print(words)


def typed_questions():
    """Lines typed in, until an empty one or the end of the input."""
    with contextlib.suppress(EOFError):
        yield from iter(lambda: input("question> ").strip(), "")


def read_text(path):
    """The text of a file, or of standard input (-)."""
    with bad_input(f"--context {path} cannot be read as UTF-8 text", OSError, UnicodeDecodeError):
        if path == "-":
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
    if not text.strip():
        raise InputError(f"--context {path} is empty: it needs at least one word")
    return text
