"""The table of an evaluation, its JSON and its figure. evaluate.py needs it."""

import json
import math
import os

from support.costs import COSTS

PANELS = {
    "nats": "answer, nats a token",
    "gap": "gap to other contexts, nats a token",
    "f1": "F1",
    "contextualisation_tflops": "contextualisation, TFLOPs",
    "inference_tflops": "inference, TFLOPs a query",
    "storage_mfloats": "storage, M floats",
    "ppl_reconstruction": "reconstruction perplexity",
    "ppl_completion": "completion perplexity",
}
NAMES = ("method", "checkpoint", "task", "span", "context_length", "shots")                 # what tells rows apart
AXES = {"context_length": "context length, tokens", "context_tokens": "context, tokens", "shots": "demonstrations"}


def write_table(args, rows, result):
    """Print scores, then costs, as Markdown tables; write them with their circumstances to --output; draw --plot."""
    keys = {}                                               # the row of the adapter, the longest, orders them
    for row in sorted(rows, key=len, reverse=True):
        keys |= dict.fromkeys(key for key in row if not key.endswith("_stderr") and key not in keys)
    costs = [*COSTS, "seconds"]
    scores = [key for key in keys if key not in costs]
    costs = [key for key in keys if key in NAMES or key in costs]
    for keys in (scores, costs):
        table = [keys, ["---"] * len(keys)]
        for row in rows:
            table.append([cell(row, key) for key in keys])
        widths = [max(map(len, column)) for column in zip(*table)]
        print()
        for line in table:
            print("|", " | ".join(text.ljust(width) for text, width in zip(line, widths)), "|")
    if args.output:
        with open(args.output + ".part", "w", encoding="utf-8") as file:
            json.dump({**result, "rows": rows}, file, indent=1, ensure_ascii=False)
        os.replace(args.output + ".part", args.output)
    if args.plot:
        plot(args.plot, rows)


def cell(row, key):
    """The text of a number, with its standard error where it has one."""
    value = row.get(key)
    error = row.get(key + "_stderr")
    if value is None:
        return ""
    if error:
        digits = max(0, 1 - math.floor(math.log10(error)))  # two of the error
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def plot(path, rows):
    """Fig. 2 and 3 (F1, nats and costs against context length), Fig. 4 to 6 (accuracy against shots, a panel for the
    averages and each task) or, where nothing varies, bars; with standard errors. A line is a method, of one checkpoint
    where there are several; one that no context reaches is dashed."""
    from matplotlib.figure import Figure                    # slow to import
    from matplotlib.ticker import LogLocator

    keys = {key for row in rows for key in row}
    x = None
    if "span" in keys:
        x = "context_tokens"
    if "context_length" in keys:
        x = "context_length"
    if "shots" in keys:
        x = "shots"
    panels = []                                             # (title, key, rows)
    if x == "shots":
        for task in dict.fromkeys(row["task"] for row in reversed(rows) if row["task"] != "all"):     # averages first
            panels.append((f"{task}: accuracy", "accuracy", [row for row in rows if row["task"] == task]))
    for key in PANELS:
        if key in keys and x != "shots":
            panels.append((PANELS[key], key, [row for row in rows if key in row]))
    checkpoints = {row["checkpoint"] for row in rows if "checkpoint" in row}

    def name_of(row):
        if len(checkpoints) > 1 and "checkpoint" in row:
            return f"{row['method']} {row['checkpoint']}"
        return row["method"]

    names = list(dict.fromkeys(map(name_of, rows)))
    across = math.ceil(len(panels) ** 0.5)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.5 * across, 3.2 * down + 0.4), layout="constrained")
    lines = {}
    for place, (title, key, drawn) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place, title=title, axisbelow=True)
        axes.grid(alpha=0.3)
        for n, name in enumerate(names):
            points = [row for row in drawn if name_of(row) == name]
            if not points or "shuffled" in name and key in COSTS:                           # those of the adapter
                continue
            points.sort(key=lambda row: row.get(x, 0))
            values = [row[key] for row in points]
            errors = [row.get(key + "_stderr") or 0 for row in points]
            places = [row.get(x) for row in points]
            style = {"color": f"C{n % 10}"}
            if x is None:
                axes.barh([name] * len(points), values, xerr=errors, **style)
            elif not places[0]:
                lines[name] = axes.axhline(values[0], linestyle="--", **style)
            else:
                style |= {"marker": "osD^vP*X<>"[n % 10], "linestyle": ":" if "shuffled" in name else "-"}
                lines[name] = axes.errorbar(places, values, errors, capsize=3, **style)
        if x is None:
            axes.invert_yaxis()
            continue
        axes.set(xscale="log", xlabel=AXES[x])
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        if min(row[key] for row in drawn) >= 0:
            axes.set_ylim(bottom=0)
    if lines:
        columns = 5
        if len(checkpoints) > 1:                            # their paths are long
            columns = 1
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)
