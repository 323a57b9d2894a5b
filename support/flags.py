"""The command line of evaluate.py: its flags, and what is refused before anything is loaded."""

import argparse
import os

from support.bases import DEFAULT_BASE
from support.benchmarks import METAICL_SEEDS
from support.files import InputError

SHOTS = [1, 2, 4, 8, 16]
QA = ["closed-book", "in-context", "adapter", "adapter-shuffled"]
METHODS = {"msc": ["closed-book", "full-conversation", "adapter", "adapter-shuffled"], "squad": QA, "streamingqa": QA,
           "ppl": QA, "metaicl": ["zero-shot", "few-shot", "fine-tuned", "adapter", "adapter-shuffled"]}
MORE_METHODS = {**dict.fromkeys(("msc", "squad", "streamingqa"), ["closed-book-instructed"]),
                "metaicl": ["zero-shot-instructed", "adapter-permuted"]}


def arguments(argv=None, doc=None):
    """The flags, checked. doc: the help text. Raises InputError naming the flag."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    either("--task", choices=["ask", *sorted(METHODS)])
    either("--merge", nargs="+", metavar="JSON", help="one table and plot from the --output of several runs")
    add("--base", help=f"hub id, directory or .gguf file of the base; default: the checkpoint's, or {DEFAULT_BASE}")
    add("--checkpoint", action="append", help="generator directory or hub id, or none, an untrained one; default: "
        "the shipped one, on another base none; ppl: repeatable")
    add("--data", help="hub id, .parquet or .jsonl; streamingqa: .csv; metaicl: hub id or directory")
    add("--method", action="append", help="repeatable; default: all of the task but -instructed and -permuted")
    add("--controls", type=int, default=4, help="other contexts under which the gold is scored; F1 takes the first")
    add("--evidence", action="store_true", help="msc: contexts cut round the turn that holds the gold")
    add("--context-lengths", type=int, nargs="+", help="tokens; squad, streamingqa: default 512 to 32768; ppl: 1024")
    add("--groups", type=int, help="squad, streamingqa: the first N groups of a length (the authors: a tenth)")
    add("--shots", type=int, nargs="+", default=SHOTS, help="metaicl: demonstrations")
    add("--demo-seeds", type=int, nargs="+", choices=METAICL_SEEDS, default=METAICL_SEEDS, help="metaicl: their files")
    add("--limit", type=int, help="conversations, documents (ppl: default 100) or, metaicl, test items a task")
    add("--seed", type=int, default=0, help="of the control and of the demonstrations drawn")
    add("--batch-size", type=int, default=4)
    add("--device", help="default: CUDA where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of the base; default: bfloat16 where the hardware has it")
    add("--output", help="write the table and its circumstances as JSON")
    add("--predictions", help="append every prediction to this JSONL; a run that was stopped continues from it")
    add("--plot", help="draw the table: .png, .svg or .pdf")
    add("--rows", action="append", default=[], metavar="NAME=FILE", help="another program's answers as .jsonl (id, "
        "prediction and, if known, inference_tflops, storage_mfloats, context_length or shots), scored beside ours")
    add("--context", action="append", default=[], help="ask: text file to read, - for standard input; repeatable")
    add("--question", action="append", help="ask: repeatable; without one, questions are typed in until an empty line")
    add("--memory", help="ask: .safetensors file of what was read; loaded if it exists, streamed on, saved")
    add("--export", help="ask: write the adapter of the context as a PEFT LoRA directory")
    add("--compare", action="store_true", help="ask: the closed-book and the in-context answer beside it")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """Also fills the default methods, and turns --rows into {name: file}."""
    task, asks, args.named, checkpoints = args.task, args.task == "ask", bool(args.method), args.checkpoint or []
    args.method = list(dict.fromkeys(args.method or METHODS.get(task, [])))
    known = METHODS.get(task, []) + MORE_METHODS.get(task, [])
    unknown = [method for method in args.method if method not in known]
    taken = {method for methods in (*METHODS.values(), *MORE_METHODS.values()) for method in methods}
    rows = [row.partition("=")[::2] for row in args.rows]
    outputs = {f"--{flag} {path}": path for flag in ("output", "predictions", "plot", "memory")
               if (path := getattr(args, flag))}
    unwritable = [name for name, path in outputs.items()
                  if os.path.isdir(path) or not os.path.isdir(folder := os.path.dirname(path) or ".")
                  or not os.access(folder, os.W_OK)]
    inputs = dict.fromkeys([args.data, *args.context, *(args.merge or []), *(file for _, file in rows)])
    files = [os.path.realpath(path) for path in (*outputs.values(), *inputs) if path]
    counts = [args.batch_size, args.controls, args.limit, args.groups, *(args.context_lengths or []), *args.shots]
    for wrong, words in (
            (args.merge and (args.base or args.data or args.method or checkpoints or args.limit or args.context_lengths
                             or args.context or rows or args.predictions),
             "--merge takes tables that are ready, --output and --plot, and no other flag"),
            (not asks and (args.context or args.question or args.memory or args.export or args.compare),
             f"--context, --question, --memory, --export and --compare belong to --task ask, not to --task {task}"),
            (asks and (args.data or args.method or args.limit or args.output or args.predictions or args.plot or rows
                       or len(checkpoints) > 1), "--task ask takes one --checkpoint, and no --data, --method, --limit, "
             "--output, --predictions, --plot or --rows"),
            (unknown, f"--method {' '.join(unknown)} is unknown for --task {task}: choose from {', '.join(known)}"),
            (unwritable, f"{' '.join(unwritable)} cannot be written: name a file in a directory that exists and can be "
             "written"),
            (len(set(files)) < len(files), "--data, --context, --memory, --output, --predictions, --plot, --rows and "
             "--merge must be different files"),
            (args.plot and not args.plot.endswith((".png", ".svg", ".pdf")), "--plot must be a .png, .svg or .pdf"),
            (args.export and os.path.exists(args.export), f"--export {args.export} exists already: name another"),
            ("-" in args.context and not args.question, "--context - reads standard input, so questions cannot be "
             "typed in: give them with --question"),
            (any(count is not None and count < 1 for count in counts), "--batch-size, --controls, --limit, --groups, "
             "--context-lengths and --shots must be at least 1"),
            (len(checkpoints) > 1 and task != "ppl", "--checkpoint is given more than once: only ppl compares them"),
            (args.evidence and task != "msc" or args.groups and task not in ("squad", "streamingqa"),
             "--evidence belongs to --task msc, --groups to squad and streamingqa"),
            (args.context_lengths and task not in ("squad", "streamingqa", "ppl"),
             "--context-lengths belongs to --task squad, streamingqa and ppl"),
            (task != "metaicl" and (args.shots != SHOTS or args.demo_seeds != METAICL_SEEDS),
             "--shots and --demo-seeds belong to --task metaicl"),
            (task == "ppl" and args.limit == 1, "--limit of --task ppl must be at least 2: the control is another "
             "document"),
            (not all(name and file and name not in taken for name, file in rows) or len(dict(rows)) < len(rows)
             or rows and task == "ppl", "--rows takes NAME=FILE.jsonl, each with a new name, in every task but ppl"),
            (task == "ppl" and 1 in (args.context_lengths or []),
             "--context-lengths of --task ppl must be at least 2: the first token is no target"),
            (task == "ppl" and not args.data, "--task ppl needs long documents: --data (.parquet, .jsonl or a hub id); "
             "the paper's cerebras/SlimPajama-627B cannot be read from the hub any more"),
            (task == "streamingqa" and not args.data,
             "--task streamingqa has no data set on the hub: name a .csv with --data")):
        if wrong:
            raise InputError(words)
    args.rows = dict(rows)
