"""The baselines of appendix B and C: full fine-tuning of the base on questions (SFT) and on the documents first (CPT),
then evaluated closed-book. train.py --stage finetune hands over to it, evaluate.py for MetaICL's fine-tuned rows."""

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

from data import conversation, load_instructions, load_texts
from model import find_blocks, load_base
from support.costs import COSTS, base_flops, clock, window
from support.files import InputError, make_directory, read_json
from support.machine import prepare_cpu
from support.text import context_ids, document_marks

PATIENCE = 3              # epochs in a row without a better validation loss, then it stops
PASS_TOKENS = 2048        # padded tokens of one forward and backward pass
PIECE = 1024              # tokens of a piece of a document (CPT)


def losses(base, examples, pad):
    """Yield the loss of examples (ids, labels) in parts of like length; their sum is the token mean over all."""
    targets = 0
    for _, labels in examples:
        targets += len(labels[1:]) - labels[1:].count(-100)
    rest = sorted(examples, key=lambda example: len(example[0]), reverse=True)
    while rest:
        longest, _ = rest[0]
        size = max(1, PASS_TOKENS // len(longest))
        part, rest = rest[:size], rest[size:]
        ids = pad_sequence([torch.tensor(ids) for ids, _ in part], batch_first=True, padding_value=pad)
        labels = pad_sequence([torch.tensor(labels) for _, labels in part], batch_first=True, padding_value=-100)
        labels = labels[:, 1:].to(base.device)                                                  # (B, L-1)
        hidden = base.get_decoder()(input_ids=ids.to(base.device), use_cache=False).last_hidden_state
        at = labels != -100                                 # few, and lm_head is for them alone
        logits = base.get_output_embeddings()(hidden[:, :-1][at]).float()                       # (T, V)
        yield F.cross_entropy(logits, labels[at], reduction="sum") / max(1, targets)


@torch.no_grad()
def mean_loss(base, examples, pad):
    """The token mean over examples as a number, NaN where there are none."""
    if not examples:
        return math.nan
    return sum(loss.item() for loss in losses(base, examples, pad))


def fit_base(base, train, validation, lr, batch_size, epochs, seed, pad):
    """Fine-tune ALL weights of base in place on examples (ids, labels), -100 is no target; the loss is the token mean
    of a batch. With validation examples it stops PATIENCE epochs after the best one and leaves the best weights, which
    may be those it began with. Returns the validation losses, before training and after each epoch."""
    base.requires_grad_(True)
    optimizer = torch.optim.AdamW(base.parameters(), lr=lr, weight_decay=0.01, fused=True)
    history = [mean_loss(base, validation, pad)]
    best = {}
    for epoch in range(epochs):
        if validation and history[-1] == min(history):
            best = {name: p.detach().cpu().clone() for name, p in base.named_parameters()}
        order = random.Random(f"{seed} {epoch}").sample(train, len(train))
        for at in tqdm(range(0, len(order), batch_size), desc="fine-tuning", unit="step", leave=False):
            for loss in losses(base, order[at:at + batch_size], pad):
                loss.backward()
            if not torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0).isfinite():
                raise InputError(f"fine-tuning: the gradient is not finite in epoch {epoch + 1} (train.py: lower "
                                 "--lr or use --dtype float32; evaluate.py: leave fine-tuned out with --method)")
            optimizer.step()
            optimizer.zero_grad()
        history.append(mean_loss(base, validation, pad))
        if validation and history.index(min(history)) <= len(history) - 1 - PATIENCE:
            break
    if validation and history[-1] > min(history):
        base.load_state_dict(best, strict=False)
    base.requires_grad_(False)
    return history


def training_costs(base, began, fits):
    """What fits of a base cost, the first of which began at that clock. fits: (train, validation, history) of each; a
    backward pass costs two forward passes, and validation is one an epoch."""
    flops = 0
    for train, validation, history in fits:
        for ids, _ in train:
            flops += 3 * (len(history) - 1) * base_flops(base, len(ids))
        for ids, _ in validation:
            flops += len(history) * base_flops(base, len(ids))
    return {"contextualisation_tflops": flops / 1e12, "contextualisation_seconds": clock(base.device) - began,
            "storage_mfloats": base.num_parameters() / 1e6}


# ----------------------------------------------------------------------------------------------------------------------
# for evaluate.py


def fit_task(base, tokenizer, train, validation, seed):
    """Costs of MetaICL's fine-tuned baseline (appendix C), fitted on rows with question and golds. The parameters of
    the base get new data: the caller, who kept the old, puts it back."""
    began = clock(base.device)
    limit = window(base)
    train = [conversation(tokenizer, [(row["question"], row["golds"][0])], limit) for row in train]
    validation = [conversation(tokenizer, [(row["question"], row["golds"][0])], limit) for row in validation]
    for p in base.parameters():                         # steps of 1e-5 would be lost in bfloat16
        p.data = p.data.to(torch.float32, copy=True)
    history = fit_base(base, train, validation, lr=1e-5, batch_size=16, epochs=40, seed=seed, pad=tokenizer.pad_token_id)
    return training_costs(base, began, [(train, validation, history)])


def cost_of_base(path):
    """What a base has cost that finetune wrote, as an evaluation counts it; zeros for another one."""
    path = os.path.join(path, "finetune.json")
    costs = {}
    if os.path.isfile(path):
        costs = read_json(path)
    return {key: costs.get(key, 0.0) for key in COSTS[1:]}


def lacking_memory(base):
    """Why all weights of a base cannot be trained on its device, as a sentence; None where they may fit: fp32 weights,
    gradient and two moments of Adam; on a CPU, of which all memory is counted, also the base and its best weights."""
    need = 16 * base.num_parameters()
    if base.device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(base.device)
    elif hasattr(os, "sysconf"):
        need = 1.5 * need
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return None
    if need > memory:
        return f"training all weights takes {need / 1e9:.0f} GB, the device has {memory / 1e9:.0f}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# train.py --stage finetune


def finetune(args):
    """CPT: 8 epochs of log-likelihood over --documents in pieces of 1,024 tokens, batch 16; then SFT: questions and
    answers, closed-book, early stopping. Writes a transformers directory. One process, with four copies of the weights
    on its device: a 7B base takes 58 GB in bfloat16, 116 GB in float32."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--stage finetune runs in one process: start it without torchrun")
    if not args.data and not args.documents:
        raise InputError("--stage finetune needs --data (question-answer pairs), --documents, or both")
    if args.validation and not args.data:
        raise InputError("--validation is for questions: give --data too")
    if os.path.exists(args.out):
        raise InputError(f"--out {args.out} exists already: name a new directory for the fine-tuned base")
    for name, value in {"dtype": "float32", "lr": 1e-5, "batch": 64, "epochs": 10}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr <= 0 or min(args.batch, args.epochs) < 1:
        raise InputError("--lr must be positive, --batch and --epochs at least 1")
    texts = load_texts(args.documents or [])
    documents, _ = load_instructions(args.data or [])
    held_out, _ = load_instructions(args.validation or [])
    if args.data and not args.validation:               # of other contexts, so that it measures what carries over
        random.Random(args.seed).shuffle(documents)
        held_out = documents[:len(documents) // 10]
        documents = documents[len(held_out):]
    if args.data and not (documents and held_out):
        raise InputError("--data and --validation: too few contexts with questions to train and validate on (10 where "
                         "--validation is left out)")
    part = args.out.rstrip("/") + ".part"
    make_directory(part)                                # refused now rather than after hours

    base, tokenizer = load_base(args.base, getattr(torch, args.dtype), args.device)
    prepare_cpu(base, PIECE)
    _, blocks = find_blocks(base)
    for block in blocks[:args.checkpointing]:           # transformers' own is off in eval mode
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    pad = tokenizer.pad_token_id
    began = clock(base.device)
    fits, history = [], None
    if texts:
        ids = []
        for text in texts:
            ids += context_ids(tokenizer, text) + document_marks(tokenizer)[1]
        pieces = []
        for at in range(0, len(ids), PIECE):
            piece = ids[at:at + PIECE]
            pieces.append((piece, piece))
        print(f"continual pretraining on {len(ids)} tokens of {len(texts)} documents, 8 epochs")
        fits.append((pieces, [], fit_base(base, pieces, [], args.lr, 16, 8, args.seed, pad)))
    if documents:
        train = questions_of(documents, tokenizer)
        validation = questions_of(held_out, tokenizer)
        print(f"supervised fine-tuning on {len(train)} questions, early stopping on {len(validation)}")
        history = fit_base(base, train, validation, args.lr, args.batch, args.epochs, args.seed, pad)
        fits.append((train, validation, history))
        print("validation nats an answer token, before and after each epoch:", history)
    base.save_pretrained(part)
    tokenizer.save_pretrained(part)
    costs = training_costs(base, began, fits)
    with open(os.path.join(part, "finetune.json"), "w") as file:
        json.dump({"args": vars(args), "validation_nats": history, **costs}, file, indent=1)
    os.rename(part, args.out)
    print(f"fine-tuned base in {args.out}: evaluate.py --base {args.out}")


def questions_of(documents, tokenizer):
    """Examples (ids, labels) of all questions about documents, each alone and without its context."""
    examples = []
    for _, _, pairs in documents:
        for question, answers in pairs:
            examples.append(conversation(tokenizer, [(question, answers[0])], 512))
    return examples
