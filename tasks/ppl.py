"""Table 2: perplexity of a document's first 1,024 tokens and of the next 1,024, once the first have been read.

Read:    the first L tokens of a document (--context-lengths, 1,024 by default).
Asked:   nothing. Scored: the same L tokens (reconstruction) and the L after them (completion), exp of the mean over
         documents of the token-mean nats; the first token of each is not predicted.
Control: the first L tokens of another document.

Documents with fewer than 2 L tokens, of the longest L, are left out, so that all lengths have the same documents.
"""

import itertools

import torch
import torch.nn.functional as F

from support.files import InputError, field, read_rows
from support.text import context_ids
from tasks.contexts import other_contexts

HUB_ID = None                                               # cerebras/SlimPajama-627B cannot be read any more
METHODS = ["closed-book", "in-context", "adapter", "adapter-shuffled"]
PROMPTS = dict.fromkeys(METHODS)                            # there is none
TARGETS = ["reconstruction", "completion"]
DOCUMENTS = 100
CONTEXT_LENGTH = 1024


def load(source, args, notes):
    """Rows with text, one after another, of which the first is read at once: a bad file is refused now."""
    rows = read_rows(source, split="validation")
    return itertools.chain([next(rows)], rows)


def settings(rows, model, tokenizer, args, notes):
    """Yield (setting, methods, [(context ids, other contexts, [target])]) for each length."""
    lengths = args.context_lengths or [CONTEXT_LENGTH]
    longest = max(lengths)
    if min(lengths) < 2:
        raise InputError("--context-lengths of --task ppl must be at least 2: the first token is no target")
    if 2 * longest > model.window:
        raise InputError(f"--context-lengths {longest}: context and completion must fit the base's window of "
                         f"{model.window} tokens together")
    documents = []
    for where, row in rows:
        ids = context_ids(tokenizer, field(row, "text", str, where))
        if len(ids) >= 2 * longest:
            documents.append(ids[:2 * longest])
        if len(documents) == (args.limit or DOCUMENTS):
            break
    if len(documents) < 2:
        raise InputError(f"{args.data}: ppl needs 2 documents of {2 * longest} tokens, found {len(documents)}; the "
                         "control is another one")
    others = other_contexts([{i} for i in range(len(documents))], args, [])
    for L in lengths:
        groups = []
        for i, ids in enumerate(documents):
            target = {"number": i, "cluster": f"{i} of {longest}",              # the documents depend on the longest
                      "reconstruction": ids[:L], "completion": ids[L:2 * L]}
            groups.append((ids[:L], [documents[others[i][0]][:L]], [target]))
        yield {"context_length": L}, METHODS, groups


@torch.no_grad()
def losses(model, method, context, document):
    """The record of a document: token-mean nats of its two targets, the context (ids) read or not."""
    memory = None
    if method.startswith("adapter"):
        memory = model.read(context)
    record = {"number": document["number"]}
    for name in TARGETS:
        ids = document[name]
        L = len(ids)
        if method == "in-context":
            ids = context + ids
        ids = torch.tensor([ids], device=model.base.device)                                 # (1, L or 2 L)
        start = ids.shape[1] - L                            # of the target
        logits = model(ids, memory=memory)[0, start:-1].float()                             # (L - 1, V)
        record[name] = F.cross_entropy(logits, ids[0, start + 1:]).item()
    return record
