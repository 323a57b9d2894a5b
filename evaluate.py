"""The paper's evaluation (§4, §5): one table, one JSON, each method beside its controls.

    python evaluate.py --task msc                                   # Table 1: memory of conversations; default base, built-in sample
    python evaluate.py --task msc --data MemGPT/MSC-Self-Instruct --checkpoint out/run/step-000280 --output msc.json
    python evaluate.py --task ppl --data validation.parquet --checkpoint out/run/step-000280      # Table 2

Methods: closed-book (bare question), full-conversation / in-context (context in the prompt), adapter (bare question, context in the
weights) and adapter-shuffled, the control: the adapter of ANOTHER context. What a generator remembers is the gap between the last two;
one that has only learnt an answer style scores the same with both.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import random
import re
import string
import time

import torch
import transformers
from tqdm import tqdm

from data import (IN_CONTEXT_PROMPT, MSC_HUB_ID, MSC_SAMPLE, context_ids, field, hub_reachable, left_pad, load_msc, read_rows, run_command,
                  split_into_chunks, user_turn)
from generator import GeneratorConfig, InputError, Memory
from model import DEFAULT_BASE, AdaptedLM, find_blocks, load_base

CHUNK = 1024              # tokens; the paper's chunk at test time
NEW_TOKENS = 20           # greedy, cut at the first newline
DEFAULT_CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "smollm2-135m")
METHODS = {"msc": ["closed-book", "full-conversation", "adapter", "adapter-shuffled"],
           "ppl": ["closed-book", "in-context", "adapter", "adapter-shuffled"]}
PPL_HUB_ID = "cerebras/SlimPajama-627B"


# --------------------------------------------------------------------------------------------------------------------
# metrics, 0 to 1


def normalize_text(text):
    """Lower case, no ASCII punctuation, single spaces."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def normalize_answer(text):
    """SQuAD's normalisation: normalize_text without the articles."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", normalize_text(text)).split())


def f1_score(prediction, gold):
    """SQuAD F1 over normalised words; 0 where they share none, also when both are empty."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


def exact_match(prediction, gold):
    return float(normalize_answer(prediction) == normalize_answer(gold))


def recall(prediction, gold):
    """Does the answer contain the gold, word for word after SQuAD's normalisation? No answer style can game it."""
    words = f" {normalize_answer(gold)} "
    return float(bool(words.strip()) and words in f" {normalize_answer(prediction)} ")


def rouge_l_recall(prediction, gold):
    """Longest common subsequence of words over the distinct words of the gold, as the package the authors used counts; 0 if a side is empty."""
    predicted, wanted = normalize_text(prediction).split(), normalize_text(gold).split()
    if not predicted or not wanted:
        return 0.0
    best, common = [[0] * (len(wanted) + 1) for _ in range(len(predicted) + 1)], []
    for i, p in enumerate(predicted, 1):
        for j, w in enumerate(wanted, 1):
            best[i][j] = best[i - 1][j - 1] + 1 if p == w else max(best[i - 1][j], best[i][j - 1])
    i, j = len(predicted), len(wanted)
    while i and j:
        if predicted[i - 1] == wanted[j - 1]:
            common.append(wanted[j - 1])
            i, j = i - 1, j - 1
        elif best[i - 1][j] > best[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return len(set(common)) / len(set(wanted))


def mean_and_stderr(values):
    """(mean, standard error) of a list; the error of fewer than two values is None."""
    n = len(values)
    mean = sum(values) / n
    return mean, (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else None


# --------------------------------------------------------------------------------------------------------------------
# cost (Table 1, Fig. 3), from shapes: 2 FLOPs a weight and token, and attention over the keys before it


def head_dim(c):
    """Width of an attention head, from a transformers config."""
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def base_flops(base, tokens, past=0, head=True):
    """FLOPs of the base for that many tokens after `past` cached ones; embeddings are looked up. head: whether lm_head is needed, which
    reading a context without asking for its logits is not."""
    c = base.config.get_text_config()
    blocks = find_blocks(base)[1]
    weights = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear))
    weights += base.get_output_embeddings().weight.numel() if head else 0
    keys = tokens * past + tokens * (tokens + 1) / 2
    return 2 * weights * tokens + 4 * len(blocks) * c.num_attention_heads * head_dim(c) * keys                   # 2 for q k, 2 for the values


def generator_flops(model, tokens, chunks):
    """FLOPs of the generator's matrix products for a context: projections and S for each token, norm and LoRA pair for each chunk.
    The four products with S in norm are counted (svd; svd-exact has none), factorisations (QR, SVD) are not."""
    d_r, r, total = model.config.d_r, model.config.adapter_rank, 0
    norm = 8 * d_r * d_r * r if model.config.norm == "svd" else 0
    for layer in model.generator.layers:
        d_out, d_in, d_h = len(layer.A1), layer.B2.shape[1], len(layer.g)
        total += tokens * (4 * d_h * d_r + 2 * d_r * d_r) + chunks * (norm + 2 * r * d_r * (d_in + d_out))
    return total


def kv_cache_floats(base, tokens):
    c = base.config.get_text_config()
    return 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim(c) * tokens


def adapter_floats(model):
    """Floats of one LoRA adapter, r (d_in + d_out) a target layer: what has to be kept of a context to answer about it.
    To go on streaming, keep S: d_r^2 a target."""
    return sum(model.config.adapter_rank * (layer.B2.shape[1] + len(layer.A1)) for layer in model.generator.layers)


# --------------------------------------------------------------------------------------------------------------------
# contexts and answers


def encode(model, contexts, pad):
    """Memory of contexts (lists of ids), one row each, streamed chunk by chunk; equal contexts of a batch are read once."""
    unique = list({tuple(ids): None for ids in contexts})
    ids, mask = split_into_chunks(unique, pad, CHUNK)                              # (U, N, L)
    ids, mask, memory = ids.to(model.base.device), mask.to(model.base.device), None
    for t in range(ids.shape[1]):
        memory = model.contextualize(ids[:, t], mask[:, t], memory)
    rows = torch.tensor([unique.index(tuple(ids)) for ids in contexts])
    return Memory({name: S[rows.to(S.device)] for name, S in memory.states.items()}, memory.tokens[rows], memory.fingerprint)


def answer(model, tokenizer, prompts, memory=None):
    """Greedy answers to prompts (lists of ids), and the number of tokens generated for each."""
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    out = model.generate(ids.to(model.base.device), memory, attention_mask=mask.to(model.base.device), max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[:, ids.shape[1]:].tolist()
    ends = model.base.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    counts = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new]
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], counts


def in_context_prompt(tokenizer, context, question, window):
    """Ids of the Fig. 7 prompt; a context that does not fit the base's window loses its beginning, as in the paper."""
    prompt = user_turn(tokenizer, IN_CONTEXT_PROMPT.format(context=context, question=question))
    excess = len(prompt) + NEW_TOKENS - window
    while excess > 0:
        ids = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"a question alone fills the base's window of {window} tokens")
        context = tokenizer.decode(ids[excess:])
        prompt = user_turn(tokenizer, IN_CONTEXT_PROMPT.format(context=context, question=question))
        excess = len(prompt) + NEW_TOKENS - window
    return prompt


def other_contexts(keys, seed):
    """For each item the index of one that shares no part of its context, drawn at random; None where there is none. keys: a set an item."""
    draw, order, others = random.Random(seed), list(range(len(keys))), []
    for own in keys:
        draw.shuffle(order)
        others.append(next((j for j in order if not own & keys[j]), None))
    return others


# --------------------------------------------------------------------------------------------------------------------
# tasks: each yields the rows of its table, one a method


def evaluate_msc(args, everything, model, tokenizer, log):
    """Table 1. The adapter, its control and closed-book see the identical prompt, the bare question; only full-conversation reads the text."""
    others = other_contexts([set(row["sessions"]) for row in everything], args.seed)
    rows = everything[:args.limit]
    contexts = ["\n\n".join(row["sessions"]) for row in everything]
    window, pad = model.base.config.get_text_config().max_position_embeddings, tokenizer.pad_token_id
    for method in args.method:
        asked = [i for i in range(len(rows)) if method != "adapter-shuffled" or others[i] is not None]
        if not asked:
            tqdm.write(f"{method} is left out: no two conversations without a session in common")
            continue
        scores, costs, began = [], [], time.time()
        for batch in tqdm([asked[i:i + args.batch_size] for i in range(0, len(asked), args.batch_size)], desc=method, unit="batch"):
            t0, memory = time.time(), None
            if method.startswith("adapter"):
                read = [context_ids(tokenizer, contexts[others[i] if method == "adapter-shuffled" else i]) for i in batch]
                memory = encode(model, read, pad)
            context_seconds = time.time() - t0
            prompts = bare = [user_turn(tokenizer, rows[i]["question"]) for i in batch]
            if method == "full-conversation":
                prompts = [in_context_prompt(tokenizer, contexts[i], rows[i]["question"], window) for i in batch]
            answers, generated = answer(model, tokenizer, prompts, memory)
            for k, i in enumerate(batch):
                gold = rows[i]["answer"]
                score = {"f1": f1_score(answers[k], gold), "em": exact_match(answers[k], gold), "recall": recall(answers[k], gold),
                         "rougeL_recall": rouge_l_recall(answers[k], gold)}
                scores.append(score)
                log({"task": "msc", "method": method, "id": rows[i]["id"], "question": rows[i]["question"], "gold": gold, "prediction": answers[k], **score})
                # the KV cache of the conversation is reused, as in Table 1; the adapter is merged into the weights and costs nothing more
                past = len(prompts[k]) - len(bare[k])
                costs.append({
                    "inference_tflops": base_flops(model.base, len(bare[k]) + generated[k], past) / 1e12,
                    "contextualisation_tflops": (context_flops(model, len(read[k])) if memory is not None else base_flops(model.base, past, head=False)) / 1e12,
                    "storage_mfloats": (adapter_floats(model) if memory is not None else kv_cache_floats(model.base, past)) / 1e6,
                    **({"contextualisation_seconds": context_seconds / len(batch)} if memory is not None else {})})
        yield {"method": method, "n": len(scores), **summary(scores), **{key: mean_and_stderr([c[key] for c in costs])[0] for key in costs[0]}, "seconds": time.time() - began}


def context_flops(model, tokens):
    """FLOPs of contextualising: the base without lm_head, chunk by chunk with chunk-local attention, and the generator."""
    chunks = -(-tokens // CHUNK)
    sizes = [tokens // chunks + (i < tokens % chunks) for i in range(chunks)]
    return sum(base_flops(model.base, n, head=False) for n in sizes) + generator_flops(model, tokens, chunks)


def summary(scores):
    """Mean and standard error of every metric, 0 to 100."""
    row = {}
    for key in scores[0]:
        mean, error = mean_and_stderr([s[key] for s in scores])
        row[key], row[key + "_stderr"] = 100 * mean, None if error is None else 100 * error
    return row


@torch.no_grad()
def evaluate_ppl(args, texts, model, tokenizer, log):
    """Table 2: perplexity of a document's first 1,024 tokens (reconstruction) and of the next 1,024 (completion), exp of the mean over
    documents of the token-mean nats. A document of fewer than 2,048 tokens gives what is left; the first token of a segment is no target."""
    documents = []
    for where, row in texts:
        if len(documents) == (args.limit or 100):
            break
        ids = context_ids(tokenizer, field(row, "text", str, where))[:2 * CHUNK]
        if len(ids) > 1:
            documents.append(torch.tensor(ids, device=model.base.device))
    if len(documents) < 2:
        raise InputError(f"{args.data}: ppl needs at least 2 documents of 2 tokens or more, found {len(documents)}")
    others, L = other_contexts([{i} for i in range(len(documents))], args.seed), CHUNK

    def segment(*pieces):
        """Pieces joined and right-padded to the longest that a pass needs: ids (n,), mask (n,)."""
        ids = torch.cat(pieces)
        n = L * len(pieces)
        return torch.nn.functional.pad(ids, (0, n - len(ids)), value=tokenizer.pad_token_id), (torch.arange(n, device=ids.device) < len(ids)).long()

    for method in args.method:
        scores, began = [], time.time()
        for i, ids in enumerate(tqdm(documents, desc=method, unit="document")):
            context, completion = ids[:L], ids[L:]
            if method == "in-context":
                passes = [[segment(context, target)] for target in (context, completion)]
                skip, visible = len(context) + 1, [0]                      # the context and the target's first token are no targets
            else:
                source = documents[others[i]][:L] if method == "adapter-shuffled" else context
                passes, skip = [[segment(source), segment(context), segment(completion)]], 0
                visible = [0, 0, 0] if method == "closed-book" else [0, 1, 1]
            nats = []
            for segments in passes:
                tokens, mask = (torch.stack(part)[None] for part in zip(*segments))            # (1, N, L)
                labels = tokens.masked_fill(mask == 0, -100)
                labels[:, :, :skip] = -100
                total, count = model.segment_losses(tokens, mask, visible, labels)
                nats += [t.item() / n.item() if n else None for t, n in zip(total[0], count[0])]
            reconstruction, target = nats[-2:]
            scores.append((reconstruction, target))
            log({"task": "ppl", "method": method, "document": i, "reconstruction_nats": reconstruction, "completion_nats": target})
        row = {"method": method, "n": len(scores)}
        for key, values in zip(("ppl_reconstruction", "ppl_completion"), zip(*scores)):
            values = [v for v in values if v is not None]
            if values:
                mean, error = mean_and_stderr(values)
                row[key] = torch.tensor(mean).exp().item()
                row[key + "_stderr"] = None if error is None else row[key] * error                # delta method
        yield {**row, "seconds": time.time() - began}


# --------------------------------------------------------------------------------------------------------------------
# command line


def load_model(args):
    """(AdaptedLM, tokenizer) for --base and --checkpoint; without a checkpoint the generator is untrained and says so."""
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype) if args.dtype else None, args.device)
    if args.checkpoint is None and args.base == DEFAULT_BASE and os.path.isdir(DEFAULT_CHECKPOINT):
        args.checkpoint = DEFAULT_CHECKPOINT
    if args.checkpoint in (None, "none"):
        args.checkpoint = "none"
        print("NOTE: the generator is untrained (A1 = 0), so the adapter rows equal closed-book; train one with train.py and name it with --checkpoint")
        torch.manual_seed(args.seed)
        return AdaptedLM(base, GeneratorConfig()), tokenizer
    return AdaptedLM.from_pretrained(base, args.checkpoint), tokenizer


def markdown(rows):
    """The rows as a Markdown table; a metric stands with its standard error."""
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if not key.endswith("_stderr")]
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    for row in rows:
        cells = []
        for key in keys:
            value, error = row.get(key), row.get(key + "_stderr")
            cell = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(cell + (f" ± {error:.2g}" if error is not None else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=sorted(METHODS), required=True)
    add("--base", default=DEFAULT_BASE, help="frozen base model: hub id, directory or .gguf file")
    add("--checkpoint", help="generator directory, the authors' format included; none: an untrained generator")
    add("--data", help="hub id, .parquet or .jsonl in the data set's own schema")
    add("--method", action="append", help="repeatable; default: all of the task")
    add("--limit", type=int, help="msc: conversations; ppl: documents (default 100)")
    add("--seed", type=int, default=0, help="of the shuffled control")
    add("--batch-size", type=int, default=4)
    add("--device")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; default bfloat16 on CUDA, float32 elsewhere")
    add("--output", help="write the table and its circumstances as JSON")
    add("--predictions", help="write every prediction as JSONL")
    args = parser.parse_args(argv)
    args.method = args.method or METHODS[args.task]
    for method in args.method:
        if method not in METHODS[args.task]:
            raise InputError(f"--method {method} is unknown for --task {args.task}: choose from {', '.join(METHODS[args.task])}")
    for path in (args.output, args.predictions):
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            raise InputError(f"{path} cannot be written: name a file in a directory that exists")
    files = [os.path.realpath(path) for path in (args.data, args.output, args.predictions) if path]
    if len(set(files)) < len(files):
        raise InputError("--data, --output and --predictions must be different files")
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise InputError("--batch-size and --limit must be at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    note = None
    if args.task == "msc" and args.data is None:
        if hub_reachable():
            args.data = MSC_HUB_ID
        else:
            args.data = MSC_SAMPLE
            note = f"the hub is out of reach: this is the built-in sample of {len(load_msc())} conversations, NOT the paper's benchmark ({MSC_HUB_ID})"
            print(f"NOTE: {note}")
    if args.task == "msc":                               # data before model: a bad file should not have to wait for it to load
        data = load_msc(args.data)
    else:
        args.data = args.data or PPL_HUB_ID
        texts = read_rows(args.data, split="validation")
        data = itertools.chain([next(texts)], texts)
    model, tokenizer = load_model(args)
    log = open(args.predictions, "w", encoding="utf-8") if args.predictions else None

    def write(record):
        if log:
            log.write(json.dumps(record, ensure_ascii=False) + "\n")
            log.flush()

    task = {"msc": evaluate_msc, "ppl": evaluate_ppl}[args.task]
    rows = list(task(args, data, model, tokenizer, write))
    if not rows:
        raise InputError(f"{args.data}: no method could be evaluated on it")
    print("\n" + markdown(rows))
    if note:
        print(f"NOTE: {note}")
    if args.output:
        bare = "the question alone, as one user turn" if args.task == "msc" else "none: the text itself is scored"
        prompts = {m: IN_CONTEXT_PROMPT if m == "full-conversation" else "context + text" if m == "in-context" else bare for m in args.method}
        result = {"task": args.task, "data": os.path.relpath(args.data) if args.data and os.path.exists(args.data) else args.data, "note": note,
                  "n": max(row["n"] for row in rows), "limit": args.limit, "seed": args.seed, "base": args.base, "checkpoint": args.checkpoint, "dtype": str(model.base.dtype).split(".")[-1],
                  "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
                  "prompts": prompts, "rows": rows}
        part = args.output + ".part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
        os.replace(part, args.output)


if __name__ == "__main__":
    run_command(main)
