"""evaluate.py --task ask: a reader's own text, read into a memory and asked about."""

import contextlib
import os
import sys
import time

from generator import Memory
from support.answers import answer, encode, load_models
from support.benchmarks import IN_CONTEXT_PROMPT, in_context_prompts
from support.costs import adapter_floats, kv_cache_floats, window
from support.files import InputError
from support.text import context_ids, user_turn

NEW_TOKENS = 60


def ask(args):
    """Read --context into a memory (that of --memory, streamed on and saved, where it exists), then answer --question,
    or questions typed in."""
    texts, began = [read_text(path) for path in args.context], time.time()
    memory = Memory.load(args.memory) if args.memory and os.path.exists(args.memory) else None
    if not texts and memory is None:
        raise InputError("--task ask has nothing to read: give a text with --context, or a --memory that exists")
    models, tokenizer = load_models(args)
    model = models[0][1]
    if memory is not None:
        model.lora(memory)                      # refused here, before anything is read, if another generator wrote it
        if len(memory.tokens) != 1:
            raise InputError(f"--memory {args.memory} holds {len(memory.tokens)} contexts side by side: "
                             "ask takes one of them")
    before, loaded = 0 if memory is None else int(memory.tokens), time.time()
    for text in texts:
        memory = encode(model, context_ids(tokenizer, text), memory)
    if args.memory and texts:
        memory.save(args.memory)
    if args.export:
        model.export_peft(memory, args.export)
        print(f"LoRA adapter of the context in {args.export}")
    tokens, seconds = int(memory.tokens), time.time() - loaded
    S, lora, cache = (floats / 1e6 for floats in (sum(state.numel() for state in memory.states.values()),
                                                  adapter_floats(model), kv_cache_floats(model.base, tokens)))
    print(f"{tokens - before} tokens read in {seconds:.1f} s (the model loaded in {loaded - began:.1f} s), {tokens} "
          f"remembered in {S:.2f} M floats of S or {lora:.2f} M of LoRA; their KV cache is {cache:.2f} M")
    for question in args.question or typed_questions():
        bare = user_turn(tokenizer, question)
        asked = [("adapter", bare, memory), *([("closed-book", bare, None)] if args.compare else [])]
        if args.compare and texts:
            prompts, lost = in_context_prompts(tokenizer, IN_CONTEXT_PROMPT, "\n\n".join(texts), [question],
                                               window(model.base) - NEW_TOKENS)
            cut = f" (the first {lost} tokens of the context do not fit)" if lost else ""
            asked.append(("in-context" + cut, prompts[0], None))
        for name, prompt, weights in asked:
            t0, ((words,), (new,)) = time.time(), answer(model, tokenizer, [prompt], weights, new_tokens=NEW_TOKENS)
            cost = f"   [{len(prompt)} prompt tokens, {new} new, {time.time() - t0:.1f} s]"
            print(f"{name}: {words}{cost}" if args.compare else words)
        if args.compare and before:
            print(f"in-context does not see the {before} tokens that {args.memory} remembers from before: "
                  "their text is not kept")


def typed_questions():
    """Lines typed in, until an empty one or the end of the input."""
    with contextlib.suppress(EOFError):
        while question := input("question> ").strip():
            yield question


def read_text(path):
    """The text of a file, or of standard input (-). Raises InputError when it is missing, not UTF-8, or empty."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if path == "-" else open(path, encoding="utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--context {path} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise InputError(f"--context {path} is empty: it needs at least one word")
    return text
