"""evaluate.py --task ask: a reader's own text, read into a memory and asked about."""

import contextlib
import os
import sys
import time

from generator import Memory
from support.answers import answer, encode, load_models
from support.benchmarks import IN_CONTEXT_PROMPT, in_context_prompts
from support.costs import adapter_floats, kv_cache_floats, window
from support.files import InputError, bad_input
from support.text import context_ids, user_turn

NEW_TOKENS = 60


def ask(args):
    """Read --context into a memory (that of --memory, streamed on and saved, where it exists), then answer --question,
    or questions typed in."""
    texts, began = [read_text(path) for path in args.context], time.time()
    memory = Memory.load(args.memory) if args.memory and os.path.exists(args.memory) else None
    if not texts and memory is None:
        raise InputError("--task ask has nothing to read: give a text with --context, or a --memory that exists")
    ((_, model), *_), tokenizer = load_models(args)
    if memory is not None:
        model.lora(memory)                      # refused here, before anything is read, if another generator wrote it
        if len(memory.tokens) != 1:
            raise InputError(f"--memory {args.memory} holds {len(memory.tokens)} contexts side by side: ask takes one")
    before, loaded = 0 if memory is None else int(memory.tokens), time.time()
    for text in texts:
        memory = encode(model, context_ids(tokenizer, text), memory)
    if args.memory and texts:
        memory.save(args.memory)
    if args.export:
        model.export_peft(memory, args.export)
        print(f"LoRA adapter of the context in {args.export}")
    tokens, S = int(memory.tokens), sum(state.numel() for state in memory.states.values()) / 1e6
    print(f"{tokens - before} tokens read in {time.time() - loaded:.1f} s (model loaded in {loaded - began:.1f} s), "
          f"{tokens} remembered in {S:.2f} M floats of S or {adapter_floats(model) / 1e6:.2f} M of LoRA; their KV "
          f"cache is {kv_cache_floats(model.base, tokens) / 1e6:.2f} M")
    for question in args.question or typed_questions():
        bare = user_turn(tokenizer, question)
        asked = [("adapter", bare, memory), *([("closed-book", bare, None)] if args.compare else [])]
        if args.compare and texts:
            (prompt,), lost = in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, "\n\n".join(texts), [question],
                                                 window(model.base) - NEW_TOKENS)
            cut = f" (the first {lost} tokens of the context do not fit)" if lost else ""
            asked.append(("in-context" + cut, prompt, None))
        for name, prompt, weights in asked:
            t0, ((words,), (new,)) = time.time(), answer(model, tokenizer, [prompt], weights, new_tokens=NEW_TOKENS)
            cost = f"   [{len(prompt)} prompt tokens, {new} new, {time.time() - t0:.1f} s]"
            print(f"{name}: {words}{cost}" if args.compare else words)
        if args.compare and before:
            print(f"in-context does not see the {before} tokens that {args.memory} remembers from before")


def typed_questions():
    """Lines typed in, until an empty one or the end of the input."""
    with contextlib.suppress(EOFError):
        while question := input("question> ").strip():
            yield question


def read_text(path):
    """The text of a file, or of standard input (-)."""
    with bad_input(f"--context {path} cannot be read as UTF-8 text", OSError, UnicodeDecodeError):
        text = sys.stdin.buffer.read().decode("utf-8") if path == "-" else open(path, encoding="utf-8").read()
    if not text.strip():
        raise InputError(f"--context {path} is empty: it needs at least one word")
    return text
