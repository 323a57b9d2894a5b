"""Contexts in, answers out: what evaluate.py and evaluate.py --task ask share."""

import copy

import torch
import torch.nn.functional as F

from data import left_pad, split_into_chunks, tokenize
from generator import Memory


def encode(model, contexts, pad, memory=None):
    """Memory of contexts (lists of ids), one row each, streamed chunk by chunk; equal contexts of a batch are read
    once. memory: what was read before."""
    unique = list({tuple(ids): None for ids in contexts})
    ids, mask = split_into_chunks(unique, pad, model.config.chunk)                                 # (U, N, L)
    ids, mask = ids.to(model.base.device), mask.to(model.base.device)
    for t in range(ids.shape[1]):
        memory = model.contextualize(ids[:, t], mask[:, t], memory)
    rows = torch.tensor([unique.index(tuple(ids)) for ids in contexts])
    states = {name: S[rows.to(S.device)] for name, S in memory.states.items()}
    return Memory(states, memory.tokens[rows], memory.fingerprint)


def copies(cache, rows):
    """A KV cache of one row as one of many, the original unchanged."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def answer(model, tokenizer, prompts, memory=None, prefix=(), cache=None, new_tokens=20):
    """Greedy answers to prompts (lists of ids), and the number of tokens generated for each. memory: a Memory or the
    LoRA pairs of one; cache: the base's KV cache of prefix, ids with which every prompt begins."""
    ids, mask = left_pad([prompt[len(prefix):] for prompt in prompts], tokenizer.pad_token_id)
    if cache is not None:                                   # prefix, padding, rest: positions are counted by the mask
        B, P = len(prompts), len(prefix)
        ids = torch.cat([torch.tensor([prefix]).expand(B, -1), ids], 1)                            # (B, P + L)
        mask = torch.cat([torch.ones(B, P, dtype=torch.long), mask], 1)
        cache = copies(cache, B)
    device = model.base.device
    out = model.generate(ids.to(device), memory, attention_mask=mask.to(device), past_key_values=cache,
                         max_new_tokens=new_tokens, do_sample=False)
    new = out[:, ids.shape[1]:].tolist()
    ends = model.base.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    counts = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new]
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], counts


@torch.no_grad()
def answer_nats(model, tokenizer, prompts, golds, memory=None, prefix=(), cache=None):
    """Teacher-forced nats a token of each gold after its prompt, the end token left out: a list, from one forward pass.
    A gold without a token has none: None. memory, prefix, cache: as in answer."""
    golds = tokenize(tokenizer, [gold.strip() for gold in golds])
    rows = [prompt[len(prefix):] + gold for prompt, gold in zip(prompts, golds)]
    L, pad = max(map(len, rows)), tokenizer.pad_token_id            # padded on the right, where no token attends to it
    ids = torch.tensor([row + [pad] * (L - len(row)) for row in rows], device=model.base.device)   # (B, L)
    if cache is None:
        logits = model(ids, memory=memory)                                                         # (B, L, V)
    else:
        logits = model.base(input_ids=ids, past_key_values=copies(cache, len(rows))).logits
    nats = []
    for row, gold, target, z in zip(rows, golds, ids, logits):
        first, end = len(row) - len(gold), len(row)
        nats.append(F.cross_entropy(z[first - 1:end - 1].float(), target[first:end]).item() if gold else None)
    return nats
