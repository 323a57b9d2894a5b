"""The baselines of appendix C: full fine-tuning of the base on questions (SFT) and on the documents first (CPT), then
evaluated closed-book. train.py --stage finetune hands over to it, evaluate.py for MetaICL's fine-tuned rows. Where the
paper has two learning rates, a base of model_type llama gets Llama2's, any other Mistral's.
"""

import functools
import json
import os
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import conversation, cut_into_passes, load_instructions
from model import find_blocks, load_base
from support.bases import save_base
from support.files import InputError, make_directory
from support.sharding import clip_gradients, gather, load_sharded, local, split_parameters
from support.text import context_ids, document_marks

PASS_TOKENS = 2048        # padded tokens of one forward and backward pass
PIECE = 1024              # tokens of a sample of CPT, at most
ANSWER = 512              # tokens of a question and its answer, at most
NO_TARGETS = [([0, 0], [-100, -100])]                  # for a process that makes a pass because others do


def losses(base, examples, rank, world):
    """Yield the loss of a process's share of examples (ids, labels), part by part; the sum over all parts and processes
    is the token mean. A process yields as many as any other: the last may have no targets."""
    targets = 0
    for _, labels in examples:
        targets += len(labels[1:]) - labels[1:].count(-100)
    examples = sorted(examples, key=lambda example: len(example[0]), reverse=True)
    lengths = [len(ids) for ids, _ in examples]
    mine = examples[rank::world]
    shares = [mine[part] for part in cut_into_passes(lengths[rank::world], PASS_TOKENS)]
    most = len(cut_into_passes(lengths[::world], PASS_TOKENS))      # the first process has the longest examples
    for part in shares + (most - len(shares)) * [NO_TARGETS]:
        ids = [torch.tensor(ids) for ids, _ in part]
        ids = pad_sequence(ids, batch_first=True).to(base.device)                               # (B, L)
        labels = [torch.tensor(labels)[1:] for _, labels in part]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(base.device)     # (B, L-1)
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        at = labels != -100                                 # few, and lm_head is for them alone
        logits = base.get_output_embeddings()(hidden[:, :-1][at]).float()                       # (T, V)
        yield F.cross_entropy(logits, labels[at], reduction="sum") / max(1, targets)


def fit_base(base, train, validation, lr, batch_size, epochs, patience, seed, rank=0, world=1):
    """Fine-tune ALL weights of base in place on examples (ids, labels), -100 is no target; the loss is the token mean
    of a batch. With validation examples it stops after `patience` epochs in a row without a better validation loss and
    leaves the best weights, which may be those it began with. Of `world` processes, over which the base is sharded,
    each takes its share of a batch. Returns the validation losses, before training and after each epoch."""
    precision = torch.get_float32_matmul_precision()
    if base.device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32
    base.requires_grad_(True)
    groups = [{"params": parameters} for parameters in split_parameters(base)]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)
    history = []
    best = {}
    for epoch in range(epochs + 1):
        if validation:
            with torch.no_grad():
                total = sum(loss.double() for loss in losses(base, validation, rank, world))
            if world > 1:                               # so all stop at the same epoch
                dist.all_reduce(total)
            history.append(total.item())
            since = epoch - history.index(min(history))     # epochs since the best
            if since == 0:
                best = {name: local(p).detach().cpu().clone() for name, p in base.named_parameters()}
            if since == patience:
                break
        if epoch == epochs:
            break
        order = random.Random(f"{seed} {epoch}").sample(train, len(train))
        steps = range(0, len(order), batch_size)
        for at in tqdm(steps, desc=f"epoch {epoch + 1} of {epochs}", leave=False, disable=rank > 0):
            for loss in losses(base, order[at:at + batch_size], rank, world):
                loss.backward()
            if not clip_gradients(base, 1.0).isfinite():
                raise InputError("fine-tuning: the gradient is not finite (train.py: lower --lr or use --dtype "
                                 "float32; evaluate.py: leave fine-tuned out with --method)")
            optimizer.step()
            optimizer.zero_grad()
    torch.set_float32_matmul_precision(precision)
    base.requires_grad_(False)
    for name, tensor in best.items():                   # none, where there is no validation
        local(base.get_parameter(name)).copy_(tensor)
    return history


def fit_task(base, tokenizer, train, validation, seed):
    """MetaICL's fine-tuned baseline (appendix C): fit the base to rows with question and golds, for at most 40 epochs,
    until the validation loss has not fallen for three. Each p.data becomes a new fp32 tensor: the caller keeps the old
    ones and puts them back."""
    limit = base.config.get_text_config().max_position_embeddings
    examples = []
    for row in train + validation:
        examples.append(conversation(tokenizer, [(row["question"], row["golds"][0])], limit))
    for p in base.parameters():                         # steps of 1e-5 would be lost in bfloat16
        p.data = p.data.to(torch.float32, copy=True)
    lr = 5e-6
    if base.config.model_type == "llama":
        lr = 1e-5
    count = len(train)
    fit_base(base, examples[:count], examples[count:], lr, batch_size=16, epochs=40, patience=3, seed=seed)


def finetune(args):
    """CPT: 8 epochs of log-likelihood over --documents, each a sample or, where it is longer than 1,024 tokens,
    several; batch 16. Then SFT: questions and answers, closed-book, until the validation loss rises. Writes a
    transformers directory. The device holds four copies of the weights: a 7B base takes 58 GB in bfloat16, 116 GB in
    float32. Under torchrun the processes share them out, but for embedding and lm_head."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if os.path.exists(args.out):
        raise InputError("--out exists already: name a new directory for the fine-tuned base")
    for name, value in {"dtype": "float32", "lr": 1e-5, "batch": 64, "epochs": 10}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    texts, _ = load_instructions(args.documents or [])
    documents, _ = load_instructions(args.data or [])
    if args.validation:
        held_out, _ = load_instructions(args.validation)
    else:                                               # other contexts, so that it measures what carries over
        random.Random(args.seed).shuffle(documents)
        held_out = documents[:len(documents) // 10]
        documents = documents[len(held_out):]
    load = load_base
    if world > 1:
        load = load_sharded
    base, tokenizer = load(args.base, getattr(torch, args.dtype), args.device)
    if args.cpt_lr is None:
        args.cpt_lr = 1e-5
        if base.config.model_type == "llama":
            args.cpt_lr = 3e-5
    samples = samples_of(texts, tokenizer)
    train = questions_of(documents, tokenizer)
    validation = questions_of(held_out, tokenizer)
    if (args.data or args.validation) and not (train and validation):
        raise InputError("--data and --validation: too few contexts with questions to train and validate on (10 where "
                         "--validation is left out)")
    part = args.out.rstrip("/") + ".part"
    if rank == 0:
        make_directory(part)                            # refused now rather than after hours

    _, blocks = find_blocks(base)
    for block in blocks[:args.checkpointing]:           # transformers' own is off in eval mode
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    history = []
    if samples:
        if rank == 0:
            print(f"continual pretraining on {len(samples)} samples, 8 epochs")
        fit_base(base, samples, [], args.cpt_lr, 16, 8, 0, args.seed, rank, world)
    if train:
        if rank == 0:
            print(f"supervised fine-tuning on {len(train)} questions, early stopping on {len(validation)}")
        history = fit_base(base, train, validation, args.lr, args.batch, args.epochs, 1, args.seed, rank, world)
        if rank == 0:
            print("validation nats an answer token, before and after each epoch:", history)
    weights = None                                      # the base's own
    if world > 1:
        weights = gather(base)
        dist.destroy_process_group()
    if rank > 0:
        return
    save_base(base, tokenizer, part, weights)
    with open(f"{part}/finetune.json", "w") as file:
        json.dump({"args": vars(args), "validation_nats": history}, file, indent=1)
    os.rename(part, args.out)
    print(f"fine-tuned base in {args.out}. Next: python evaluate.py --task squad --method closed-book --base "
          f"{args.out}")


def samples_of(documents, tokenizer):
    """Examples (ids, labels) of documents to learn by heart, without their questions."""
    _, after = document_marks(tokenizer)
    samples = []
    for _, text, _ in documents:
        ids = context_ids(tokenizer, text) + after
        for at in range(0, len(ids), PIECE):
            piece = ids[at:at + PIECE]
            samples.append((piece, piece))
    return samples


def questions_of(documents, tokenizer):
    """Examples (ids, labels) of all questions about documents, each alone and without its context."""
    examples = []
    for _, _, pairs in documents:
        for question, answers in pairs:
            examples.append(conversation(tokenizer, [(question, answers[0])], ANSWER))
    return examples
