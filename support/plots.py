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
    """Print scores and costs; write them with their circumstances to --output; draw --plot."""
    costs = [*COSTS, "seconds"]
    keys = {}                                               # the row of the adapter, the longest, orders them
    for row in sorted(rows, key=len, reverse=True):
        keys |= dict.fromkeys(key for key in row if not key.endswith("_stderr") and key not in keys)
    print("\n" + markdown(rows, [key for key in keys if key not in costs]))
    print("\n" + markdown(rows, [key for key in keys if key in NAMES or key in costs]))
    if args.output:
        with open(args.output + ".part", "w", encoding="utf-8") as file:
            json.dump({**result, "rows": rows}, file, indent=1, ensure_ascii=False)
        os.replace(args.output + ".part", args.output)
    if args.plot:
        plot(args.plot, rows)


def markdown(rows, keys):
    """A Markdown table of these keys of rows, each with its standard error."""
    lines = [list(keys), ["---"] * len(keys)]
    for row in rows:
        line = []
        for key in keys:
            value = row.get(key)
            error = row.get(key + "_stderr")
            if value is None:
                line.append("")
            elif error:
                digits = max(0, 1 - math.floor(math.log10(error)))                          # two of the error
                line.append(f"{value:.{digits}f} ± {error:.{digits}f}")
            elif isinstance(value, float):
                line.append(f"{value:.4g}")
            else:
                line.append(str(value))
        lines.append(line)
    for k in range(len(keys)):
        width = max(len(line[k]) for line in lines)
        for line in lines:
            line[k] = line[k].ljust(width)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path, rows):
    """Fig. 2 and 3 (F1, nats and costs against context length), Fig. 4 to 6 (accuracy against shots, a panel for the
    averages and each task) or, where nothing varies, bars; with standard errors. A line is a method, of one checkpoint
    where there are several; one that no context reaches is dashed."""
    from matplotlib.figure import Figure                    # slow to import
    from matplotlib.ticker import LogLocator

    keys = {key for row in rows for key in row}
    x = None
    if "context_length" in keys or "shots" in keys:
        x = "shots" if "shots" in keys else "context_length"
    elif "span" in keys:
        x = "context_tokens"
    panels = []                                             # (title, key, rows)
    if x == "shots":
        for task in dict.fromkeys(row["task"] for row in reversed(rows) if row["task"] != "all"):     # averages first
            panels.append((f"{task}: accuracy", "accuracy", [row for row in rows if row["task"] == task]))
    for key in PANELS:
        if key in keys and x != "shots":
            panels.append((PANELS[key], key, [row for row in rows if key in row]))
    names = list(dict.fromkeys(name_of(row) for row in rows))
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
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(5, len(lines)), frameon=False)
    figure.savefig(path, dpi=110)


def name_of(row):
    """What a line of the figure is called: a method, and the checkpoint of its generator in --task ppl."""
    if "checkpoint" in row:
        return f"{row['method']} {row['checkpoint']}"
    return row["method"]
