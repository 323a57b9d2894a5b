"""The baselines of appendix B and C: full fine-tuning of the base on questions (SFT) and on the documents first (CPT),
then evaluated closed-book. train.py --stage finetune needs it, and evaluate.py for MetaICL's fine-tuned rows."""

import functools
import json
import math
import os
import random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import conversation
from model import find_blocks, load_base
from support.costs import COSTS, base_flops, clock, window
from support.files import InputError, make_directory, read_json
from support.instructions import load_instructions, load_texts
from support.text import context_ids, document_marks


def fit_base(base, train, validation, lr, batch_size, epochs, patience, seed, pad, pass_tokens=2048):
    """Fine-tune ALL weights of base in place on examples (ids, labels), -100 is no target; the loss is the token mean
    of a batch. With validation examples it stops `patience` epochs after the best one and leaves the best weights,
    which may be those it began with. Returns the validation nats a token, before training and after each epoch.
    pass_tokens: padded tokens of one forward and backward pass."""
    def passes(examples):
        """The loss of examples in parts of like length, whose sum is the token mean over all."""
        targets = max(1, sum(label != -100 for _, labels in examples for label in labels[1:]))
        rest = sorted(examples, key=lambda example: len(example[0]), reverse=True)
        while rest:
            size = max(1, pass_tokens // len(rest[0][0]))
            part, rest = zip(*rest[:size]), rest[size:]
            ids, labels = (pad_sequence([torch.tensor(row) for row in rows], True, value).to(base.device)     # (B, L)
                           for rows, value in zip(part, (pad, -100)))
            hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]      # (B, L-1, d_h)
            at = labels[:, 1:] != -100                          # (B, L-1): few, and lm_head is for them alone
            logits = base.get_output_embeddings()(hidden[at]).float()                                  # (T, V)
            yield F.cross_entropy(logits, labels[:, 1:][at], reduction="sum") / targets

    @torch.no_grad()
    def score():
        return sum(nats.item() for nats in passes(validation)) if validation else math.nan

    def weights():
        return {name: p.detach().cpu().clone() for name, p in base.named_parameters()} if validation else {}

    optimizer = torch.optim.AdamW(base.requires_grad_(True).parameters(), lr=lr, weight_decay=0.01, fused=True)
    history, best = [score()], weights()
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(train, len(train))
        about = f"fine-tuning, epoch {epoch + 1} of {epochs}" + (f", {history[-1]:.3f} nats" if validation else "")
        for at in tqdm(range(0, len(order), batch_size), desc=about, unit="step", leave=False):
            for nats in passes(order[at:at + batch_size]):
                nats.backward()
            if not torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0).isfinite():
                raise InputError(f"fine-tuning: the gradient is not finite in epoch {epoch + 1} (train.py: lower "
                                 "--lr or use --dtype float32; evaluate.py: leave fine-tuned out with --method)")
            optimizer.step()
            optimizer.zero_grad()
        history.append(score())
        since = len(history) - 1 - history.index(min(history))        # epochs since the best
        if validation and since == 0:
            best = weights()
        if validation and since == patience:
            break
    base.requires_grad_(False).load_state_dict(best, strict=False)
    return history


def training_costs(base, began, fits):
    """What fits of a base cost, the first of which began at that clock. fits: (train, validation, history) of each; a
    backward pass costs two forward passes, and validation is one an epoch."""
    flops = 0
    for train, validation, history in fits:
        forward, scored = (sum(base_flops(base, len(ids)) for ids, _ in examples) for examples in (train, validation))
        flops += 3 * (len(history) - 1) * forward + len(history) * scored
    return {"contextualisation_tflops": flops / 1e12, "contextualisation_seconds": clock(base.device) - began,
            "storage_mfloats": sum(p.numel() for p in base.parameters()) / 1e6}


def fit_task(base, tokenizer, train, validation, seed):
    """Costs of MetaICL's fine-tuned baseline (appendix C), fitted on rows with question and golds. The parameters of
    the base get new data: the caller, who kept the old, puts it back."""
    began = clock(base.device)
    examples = [[conversation(tokenizer, [(row["question"], row["golds"][0])], window(base)) for row in rows]
                for rows in (train, validation)]
    for p in base.parameters():                         # steps of 1e-5 would be lost in bfloat16
        p.data = p.data.to(torch.float32, copy=True)
    history = fit_base(base, *examples, 1e-5, 16, epochs=40, patience=3, seed=seed, pad=tokenizer.pad_token_id)
    return training_costs(base, began, [(*examples, history)])


def cost_of_base(path):
    """What a base has cost that finetune wrote, as an evaluation counts it; zeros for another one."""
    path = os.path.join(path, "finetune.json")
    costs = read_json(path) if os.path.isfile(path) else {}
    return {key: costs.get(key, 0.0) for key in COSTS[1:]}


def lacking_memory(base):
    """Why all weights of a base cannot be trained on its device, as a sentence; None where they may fit: fp32 weights,
    gradient and two moments of Adam; on a CPU, of which all memory is counted, also the base and its best weights."""
    need, room = 16 * sum(p.numel() for p in base.parameters()), float("inf")
    if base.device.type == "cuda":
        room = torch.cuda.mem_get_info(base.device)[0]
    elif hasattr(os, "sysconf"):
        need, room = 1.5 * need, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"training all weights takes {need / 1e9:.0f} GB, the device has {room / 1e9:.0f}" if need > room else None


def finetune(args):
    """CPT: 8 epochs of log-likelihood over --documents in pieces of 1,024 tokens, batch 16; then SFT: questions and
    answers, closed-book, early stopping. Writes a transformers directory. One process, with four copies of the weights
    on its device: a 7B base takes 58 GB in bfloat16, 116 GB in float32."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--stage finetune runs in one process: start it without torchrun")
    if not (args.data or args.documents):
        raise InputError("--stage finetune needs --data (question-answer pairs), --documents, or both")
    if args.validation and not args.data:
        raise InputError("--validation is for questions: give --data too")
    if os.path.exists(args.out):
        raise InputError(f"--out {args.out} exists already: name a new directory for the fine-tuned base")
    for name, value in {"dtype": "float32", "lr": 1e-5, "batch": 64, "epochs": 10}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr <= 0 or min(args.batch, args.epochs, args.patience) < 1:
        raise InputError("--lr must be positive, --batch, --epochs and --patience at least 1")
    pairs, held_out = (load_instructions(files or [])[0] for files in (args.data, args.validation))
    texts = load_texts(args.documents or [])
    if args.data and not args.validation:               # of other contexts, so that it measures what carries over
        random.Random(args.seed).shuffle(pairs)
        held_out, pairs = pairs[:len(pairs) // 10], pairs[len(pairs) // 10:]
    if args.data and not (pairs and held_out):
        name, files = ("validation", args.validation) if pairs and args.validation else ("data", args.data)
        raise InputError(f"--{name} {' '.join(files)}: too few contexts with questions to train and validate on "
                         "(10 without --validation)")
    part = args.out.rstrip("/") + ".part"
    make_directory(part)                                # refused now rather than after hours
    base, tokenizer = load_base(args.base, getattr(torch, args.dtype), args.device)
    history, fits, pad, began = None, [], tokenizer.pad_token_id, clock(base.device)
    for block in find_blocks(base)[1][:args.checkpointing]:                # transformers' own is off in eval mode
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if texts:
        ids = [t for text in texts for t in context_ids(tokenizer, text) + document_marks(tokenizer)[1]]
        pieces = [(ids[at:at + 1024], ids[at:at + 1024]) for at in range(0, len(ids), 1024)]
        print(f"continual pretraining on {len(texts)} documents, {len(ids)} tokens, 8 epochs")
        fits.append((pieces, [], fit_base(base, pieces, [], args.lr, 16, 8, None, args.seed, pad)))
    if pairs:
        examples = [[conversation(tokenizer, [(q, answers[0])], 512) for _, _, qas in documents for q, answers in qas]
                    for documents in (pairs, held_out)]
        print(f"supervised fine-tuning on {len(examples[0])} questions, early stopping on {len(examples[1])}")
        history = fit_base(base, *examples, args.lr, args.batch, args.epochs, args.patience, args.seed, pad)
        fits.append((*examples, history))
        print("validation nats an answer token, before and after each epoch:", *(f"{nats:.4f}" for nats in history))
    base.save_pretrained(part)
    tokenizer.save_pretrained(part)
    costs = training_costs(base, began, fits)
    with open(os.path.join(part, "finetune.json"), "w") as file:
        json.dump({"args": vars(args), "validation_nats": history, **costs}, file, indent=1)
    os.rename(part, args.out)
    print(f"fine-tuned base in {args.out}: evaluate.py --base {args.out}")
