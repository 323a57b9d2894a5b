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
NAMES = ("method", "task", "span", "context_length", "shots")                 # what tells rows apart
AXES = {"shots": "demonstrations", "context_length": "context length, tokens", "context_tokens": "context, tokens"}


def write_table(args, result):
    """Print the rows of a result, scores, then costs, as Markdown tables; write it to --output; draw --plot."""
    rows = result["rows"]
    keys = {}                                               # the row of the adapter, the longest, orders them
    for row in sorted(rows, key=len, reverse=True):
        keys |= dict.fromkeys(row)
    keys = [key for key in keys if not key.endswith("_stderr")]
    scores = [key for key in keys if key not in COSTS]
    costs = [key for key in keys if key in NAMES or key in COSTS]
    for keys in (scores, costs):
        table = [keys, ["---"] * len(keys)]
        for row in rows:
            line = []
            for key in keys:
                text = row.get(key, "")
                error = row.get(key + "_stderr")
                if error:
                    digits = max(0, 1 - math.floor(math.log10(error)))          # two of the error
                    text = f"{text:.{digits}f} ± {error:.{digits}f}"
                elif isinstance(text, float):
                    text = f"{text:.4g}"
                line.append(str(text))
            table.append(line)
        widths = [max(map(len, column)) for column in zip(*table)]
        print()
        for line in table:
            print("|", " | ".join(map(str.ljust, line, widths)), "|")
    if args.output:
        part = args.output + ".part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
        os.replace(part, args.output)
    if args.plot:
        plot(args.plot, rows)


def plot(path, rows):
    """Fig. 2 and 3 (F1, nats and costs against context length), Fig. 4 to 6 (accuracy against shots, for each mean over
    tasks), with standard errors. A line is a method; one that no context reaches is dashed."""
    from matplotlib.figure import Figure                    # slow to import

    for x in AXES:
        if any(row.get(x) for row in rows):
            break
    rows = sorted(rows, key=lambda row: row.get(x, 0))
    panels = []                                             # (title, what is drawn, rows)
    if "shots" in rows[0]:
        for task in ("all", "classification", "non-classification"):
            panels.append((f"{task}: accuracy", "accuracy", [row for row in rows if row["task"] == task]))
    else:
        for key, title in PANELS.items():
            panels.append((title, key, [row for row in rows if key in row]))
    panels = [panel for panel in panels if panel[2]]
    down = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(13.5, 3.2 * down + 0.4), layout="constrained")
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = {}
    for place, (title, key, drawn) in enumerate(panels, 1):
        axes = figure.add_subplot(down, 3, place, title=title, xlabel=AXES[x])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        for n, method in enumerate(methods):
            points = [row for row in drawn if row["method"] == method]
            if not points:
                continue
            values = [row[key] for row in points]
            style = {"color": f"C{n}", "linestyle": "--"}
            if not points[0].get(x):                        # no context reaches it
                lines[method] = axes.axhline(values[0], **style)
                continue
            errors = [row.get(key + "_stderr") or 0 for row in points]
            style |= {"marker": "osD^vP*"[n % 7], "linestyle": "-"}
            if "shuffled" in method:
                style["linestyle"] = ":"
            lines[method] = axes.errorbar([row[x] for row in points], values, errors, capsize=3, **style)
        if min(row[key] for row in drawn) >= 0:
            axes.set_ylim(bottom=0)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
