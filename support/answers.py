"""Prompts in, answers and nats out, kept in a predictions file: what the tasks of evaluate.py share, --task ask too."""

import copy
import hashlib
import json
import os
import statistics

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import split_into_chunks
from generator import GeneratorConfig
from model import AdaptedLM, load_base
from support.bases import DEFAULT_BASE
from support.benchmarks import prompt_template
from support.costs import base_flops, kv_cache_floats, released_flops
from support.formats import checkpoint_base, locate_checkpoint
from support.text import tokenize

DEFAULT_CHECKPOINT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "smollm2-135m")
NEW_TOKENS = 20           # greedy, cut at the first newline; MetaICL 10
KV_FLOATS = 4e9           # of the copies of a KV cache that stand in memory at once


def load_models(args):
    """([(name, AdaptedLM)] for each --checkpoint on one base, tokenizer). Without --base it is the base that the first
    checkpoint was trained for. Without --checkpoint it is the shipped generator on the default base, on another one (as
    with --checkpoint none) an untrained one, with a note."""
    names = args.checkpoint or [DEFAULT_CHECKPOINT if args.base in (None, DEFAULT_BASE) else "none"]
    directories = [None if name == "none" else locate_checkpoint(name) for name in names]
    args.base = args.base or next(filter(None, map(checkpoint_base, filter(None, directories))), DEFAULT_BASE)
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype) if args.dtype else None, args.device)
    if "none" in names:
        print("NOTE: the generator is untrained (A1 = 0), so the adapter rows equal closed-book; train one with "
              "train.py and name it with --checkpoint")
    torch.manual_seed(args.seed)
    models = [AdaptedLM.from_pretrained(base, directory) if directory else AdaptedLM(base, GeneratorConfig())
              for directory in directories]
    return list(zip(names, models)), tokenizer


def encode(model, ids, memory=None):
    """Memory of a context (list of ids), streamed chunk by chunk. memory: what was read before."""
    ids, mask = (t.to(model.base.device) for t in split_into_chunks([ids], 0, model.config.chunk))     # (1, N, L)
    for chunk, real in zip(ids.unbind(1), mask.unbind(1)):
        memory = model.contextualize(chunk, real, memory)
    return memory


def copies(cache, rows):
    """A KV cache of one row as one of many, the original unchanged."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def answer(model, tokenizer, prompts, memory=None, prefix=(), cache=None, new_tokens=NEW_TOKENS):
    """Greedy answers to prompts (lists of ids), and the number of tokens generated for each. memory: a Memory or the
    LoRA pairs of one; cache: the base's KV cache of prefix, ids with which every prompt begins."""
    rows = [torch.tensor(prompt[len(prefix):]) for prompt in prompts]
    ids = pad_sequence(rows, True, tokenizer.pad_token_id, "left")                             # (B, L)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")               # (B, L)
    if cache is not None:                                   # prefix, padding, rest: positions are counted by the mask
        ids = torch.cat([torch.tensor([prefix]).expand(len(ids), -1), ids], 1)                     # (B, P + L)
        mask = F.pad(mask, (len(prefix), 0), value=1)
        cache = copies(cache, len(ids))
    device, ends = model.base.device, model.base.generation_config.eos_token_id
    out = model.generate(ids.to(device), memory, attention_mask=mask.to(device), past_key_values=cache,
                         max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0)  # Qwen2.5's own: above 1
    new, ends = out[:, ids.shape[1]:].tolist(), ends if isinstance(ends, list) else [ends]
    counts = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new]
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], counts


@torch.no_grad()
def answer_nats(model, tokenizer, prompts, golds, memory=None, prefix=(), cache=None):
    """Teacher-forced nats a token of each gold after its prompt, the end token left out: a list, from one forward pass.
    A gold without a token has none: None. memory, prefix, cache: as in answer."""
    golds = tokenize(tokenizer, [gold.strip() for gold in golds])
    rows = [torch.tensor(prompt[len(prefix):] + gold) for prompt, gold in zip(prompts, golds)]
    ids = pad_sequence(rows, True, tokenizer.pad_token_id).to(model.base.device)           # (B, L), padded on the right
    if cache is None:
        logits = model(ids, memory=memory)                                                         # (B, L, V)
    else:
        logits = model.base(input_ids=ids, past_key_values=copies(cache, len(rows))).logits
    nats = []
    for row, gold, target, z in zip(rows, golds, ids, logits):
        first, end = len(row) - len(gold), len(row)
        nats.append(F.cross_entropy(z[first - 1:end - 1].float(), target[first:end]).item() if gold else None)
    return nats


def solve(run, method, items, prompts, costs, memory=None, controls=(), prefix=(), cache=None):
    """Records of a batch: greedy answers, their scores, nats of the shortest gold under memory (for the control: the
    mean over all controls) and costs. A KV cache too large to copy for the whole batch serves a part at a time."""
    model, tokenizer, task, records = run.model, run.tokenizer, run.args.task, []
    fit = max(1, int(KV_FLOATS / kv_cache_floats(model.base, len(prefix)))) if cache is not None else len(prompts)
    for at in range(0, len(prompts), fit):
        part, golds = prompts[at:at + fit], [min(item["golds"], key=len) for item in items[at:at + fit]]
        answers = answer(model, tokenizer, part, memory, prefix, cache, 10 if task == "metaicl" else NEW_TOKENS)
        nats = [answer_nats(model, tokenizer, part, golds, m, prefix, cache) for m in (memory, *controls)]
        for item, cost, gold, prompt, text, new, each in zip(items[at:], costs[at:], golds, part, *answers, zip(*nats)):
            past = cost.get("past", 0)        # the KV cache of a context is reused, as in Table 1; an adapter is merged
            tokens = len(prompt) - past + new
            record = {**item, "gold": gold, "prediction": text, **run.score(text, item["golds"]), "nats": average(each),
                      "inference_tflops": base_flops(model.base, tokens, past) / 1e12, **cost}
            if task == "msc":
                record["released_tflops"] = released_flops(model.base, tokens, past) / 1e12
            records.append({**record, "control_nats": each} if method == "adapter-shuffled" else record)
    return records


def predict(run, read_contexts, method, groups, **where):
    """Records of the answers to groups; from the predictions file where it has them. A group is (contexts, items): one
    context for all its items or one each; an item has number, id, question, golds and cluster (label of its context).
    A batch is computed whole if one answer is missing: padded as in an unbroken run, it gives the same to the last bit.
    """
    name, records = " ".join([method, *map(str, where.values())]), []
    digest, size, base = fingerprint(run, method), run.args.batch_size, run.model.base
    with tqdm(total=sum(len(items) for _, items in groups), desc=name, unit="question", leave=None) as bar:
        for group, (contexts, items) in enumerate(groups):
            read, weights = None, [p.data for p in base.parameters()]
            for at in range(0, len(items), size):
                batch, part = items[at:at + size], slice(at, at + size)
                keys = [f"{run.args.task} {name} group {group} item {item['number']} {digest}" for item in batch]
                if not all(key in run.done for key in keys):
                    prompts, kept, costs = read = read or read_contexts(run, method, contexts, items)
                    for key, record in zip(keys, solve(run, method, batch, prompts[part], costs[part], **kept)):
                        run.write({"key": key, "task": run.args.task, "method": method, **where, **record})
                records += [{**run.done[key], **run.score(run.done[key]["prediction"], item["golds"])}
                            for key, item in zip(keys, batch)]
                bar.update(len(keys))
            for p, data in zip(base.parameters(), weights):                  # fine-tuned has changed them
                p.data = data
    if lost := sum(record.get("lost", 0) > 0 for record in records):
        row = " ".join([method, *(f"{key} {value}" for key, value in where.items())])
        run.note(f"{row}: {lost} of {len(records)} prompts do not fit the base's window and lose the beginning of "
                 "their context")
    return records


def fingerprint(run, method):
    """Hash of what an answer depends on beside its question: base, data and flags, and for adapters the generator."""
    facts = [*run.facts, prompt_template(run.args.task, method),
             run.model.generator.fingerprint() if method.startswith("adapter") else "",
             [run.args.controls, run.args.groups] if method == "adapter-shuffled" else 0]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def average(values):
    """Mean of the values that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None
