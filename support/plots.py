"""The table of an evaluation, its JSON and its figures, of one run or of several. evaluate.py needs it."""

import json
import math
import os

from support.answers import average
from support.costs import COSTS
from support.files import InputError, read_json

PANELS = {"nats": "answer, nats a token", "gap": "gap to other contexts, nats a token", "f1": "F1",
          "contextualisation_tflops": "contextualisation, TFLOPs", "inference_tflops": "inference, TFLOPs a query",
          "storage_mfloats": "storage, M floats", "ppl_reconstruction": "reconstruction perplexity",
          "ppl_completion": "completion perplexity"}
NAMES = ("run", "method", "checkpoint", "task", "context", "context_length", "shots")       # what tells rows apart
AXES = {"context_length": "context length, tokens", "context_tokens": "context, tokens", "shots": "demonstrations"}


def mean_row(rows, **what):
    """Mean over the rows of several tasks; a standard error follows from theirs, n and seconds are sums."""
    row = dict(what)
    for key in (key for key in rows[0] if key not in what):
        values = [each.get(key) for each in rows]
        if key.endswith("_stderr"):
            row[key] = None if None in values else sum(e * e for e in values) ** 0.5 / len(rows)
        else:
            row[key] = sum(values) if key in ("n", "seconds") else average(values)
    return row


def markdown(rows, costs):
    """The scores of the rows as a Markdown table or, with costs, their costs; a metric has its standard error."""
    def cell(row, key):
        value, error = row.get(key), row.get(key + "_stderr")
        if error:
            digits = max(0, 1 - math.floor(math.log10(error)))               # two of the error
            return f"{value:.{digits}f} ± {error:.{digits}f}"
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    longest_first = sorted(rows, key=len, reverse=True)                      # the row of the adapter orders the columns
    keys = dict.fromkeys(key for row in longest_first for key in row if not key.endswith("_stderr"))
    keys = [key for key in keys if key in NAMES or key.endswith(("_tflops", "_mfloats", "seconds")) == costs]
    columns = [[key, "---", *(cell(row, key) for row in rows)] for key in keys]
    columns = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns))


def write_table(args, rows, result):
    """Print scores and costs; write them with their circumstances to --output; draw --plot."""
    print(f"\n{markdown(rows, False)}\n\n{markdown(rows, True)}")
    if args.output:
        with open(args.output + ".part", "w", encoding="utf-8") as file:
            json.dump({**result, "rows": rows}, file, indent=1, ensure_ascii=False)
        os.replace(args.output + ".part", args.output)
    if args.plot:
        plot(args.plot, rows)


def short_names(paths):
    """{path: its last part}, or the whole path where two end alike."""
    names = {path: os.path.basename(os.path.normpath(path)) for path in paths}
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}


def merge(paths):
    """(rows, circumstances) of the --output files of several runs of one task, each row with its run's name. Runs on
    other data, or on another part of it, are named."""
    results, rows = {path: read_json(path) for path in paths}, []
    names, tasks = short_names(results), {result.get("task") for result in results.values()}
    for path, result in results.items():
        table = result.get("rows")
        if not isinstance(table, list) or not all(isinstance(row, dict) and "method" in row for row in table):
            raise InputError(f"--merge {path} is not a table that --output wrote")
        rows += [{"run": os.path.splitext(names[path])[0], **row} for row in table]
    if len(tasks) > 1 or not rows:
        raise InputError(f"--merge takes rows of one task: these files hold {len(rows)} of {len(tasks)} tasks")
    for key in ("data", "limit", "seed"):
        if len(values := {json.dumps(result.get(key)) for result in results.values()}) > 1:
            print(f"NOTE: these runs differ in {key}: {', '.join(sorted(values))}")
    return rows, {"task": tasks.pop(), "merged": {path: {**result, "rows": None} for path, result in results.items()}}


def plot(path, rows):
    """Fig. 2 and 3 (F1, nats and costs against context length), Fig. 4 to 6 (accuracy against shots, a panel for the
    averages and each task) or, where nothing varies, bars; with standard errors. A line is a method, of one checkpoint
    and run where there are several; one that no context reaches is dashed."""
    from matplotlib.figure import Figure                    # slow to import

    checkpoints = short_names({row["checkpoint"] for row in rows if "checkpoint" in row})
    names = [" ".join([row["method"], *([checkpoints[row["checkpoint"]]] if "checkpoint" in row else []),
                       *([f"({row['run']})"] if "run" in row else [])]) for row in rows]
    rows = [{**row, "name": name} for row, name in zip(rows, names)]
    x = next((key for key in AXES if any(key in row for row in rows)), None)
    panels = [(title, key, [row for row in rows if row.get(key) is not None
                            and (key not in COSTS or row["method"] != "adapter-shuffled")])
              for key, title in PANELS.items()
              if any(key in row for row in rows) and not (key in COSTS and x == "context_tokens")]      # --evidence
    if x == "shots":
        first = ("classification", "non-classification")
        kinds = sorted({row["task"] for row in rows} - {"all"}, key=lambda task: (task not in first, task))
        panels = [(f"{kind}: accuracy", "accuracy", [row for row in rows if row["task"] == kind]) for kind in kinds]
    across, lines = len(panels) if len(panels) < 4 else math.ceil(len(panels) ** 0.5), {}
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.5 * across, 3.2 * down + 0.4), layout="constrained")
    for place, (title, key, drawn) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place, title=title, axisbelow=True)
        axes.grid(alpha=0.3)
        for n, name in enumerate(dict.fromkeys(names)):
            points = sorted((row for row in drawn if row["name"] == name), key=lambda row: row.get(x, 0))
            values, errors = [row[key] for row in points], [row.get(key + "_stderr") or 0 for row in points]
            if x is None:
                axes.barh([name] * len(points), values, xerr=errors, color=f"C{n % 10}")
            elif points and not points[0].get(x):
                lines[name] = axes.axhline(values[0], linestyle="--", color=f"C{n % 10}")
            elif points:
                style = {"marker": "osD^vP*X<>"[n % 10], "linestyle": ":" if "shuffled" in name else "-", "capsize": 3}
                lines[name] = axes.errorbar([row[x] for row in points], values, errors, color=f"C{n % 10}", **style)
        floor = 0 if all(row[key] >= 0 for row in drawn) else None
        if x:
            ticks = sorted({row[x] for row in drawn if row.get(x)})
            ticks = [tick for tick, before in zip(ticks, [0, *ticks]) if tick > 1.3 * before]      # no two in one place
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else tick for tick in ticks])
            axes.set(ylim=(floor, None), xlabel=AXES[x])
        else:
            axes.set(xlim=(floor, None), ylim=axes.get_ylim()[::-1])
    if x:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(5, len(lines)), frameon=False)
    figure.savefig(path, dpi=110)
