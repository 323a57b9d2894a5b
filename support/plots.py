"""The figures of an evaluation, drawn from the rows of its table. evaluate.py --plot needs it."""

import os

COSTS = ("inference_tflops", "contextualisation_tflops", "storage_mfloats", "contextualisation_seconds")
PANELS = {"f1": "F1", "contextualisation_tflops": "contextualisation, TFLOPs",
          "inference_tflops": "inference, TFLOPs a query", "storage_mfloats": "storage, M floats",
          "ppl_reconstruction": "reconstruction perplexity", "ppl_completion": "completion perplexity"}


def plot(path, rows):
    """Fig. 2 and 3 (F1 and costs against context length), Fig. 4 (accuracy against shots) or, where nothing varies,
    bars; with standard errors. A method that no context reaches is a dashed line."""
    from matplotlib.figure import Figure

    x = next((key for key in ("context_length", "shots") if key in rows[0]), None)
    panels = [(title, key, [row for row in rows if key not in COSTS or row["method"] != "adapter-shuffled"])
              for key, title in PANELS.items() if key in rows[0]]
    if x == "shots":
        panels = [(f"{label}: accuracy", "accuracy", part) for label in ("classification", "non-classification")
                  if (part := [row for row in rows if row["task"] == label])]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shape = (-(-len(panels) // 2), min(2, len(panels)))
    figure = Figure(figsize=(9, 3.2 * shape[0] + 0.4), layout="constrained")
    for (title, key, drawn), axes in zip(panels, figure.subplots(*shape, squeeze=False).flat):
        for n, method in enumerate(methods):
            points = [row for row in drawn if row["method"] == method and key in row]
            values, errors = [row[key] for row in points], [row.get(key + "_stderr") or 0 for row in points]
            if x is None:
                axes.barh([f"{method} {os.path.basename(os.path.normpath(row['checkpoint']))}" if "checkpoint" in row
                           else method for row in points], values, xerr=errors)
            elif points and points[0][x] == 0:
                axes.axhline(values[0], linestyle="--", color=f"C{n}", label=method)
            elif points:
                style = {"marker": "osD^v"[n], "linestyle": ":" if method.endswith("shuffled") else "-",
                         "color": f"C{n}", "label": method}
                axes.errorbar([row[x] for row in points], values, errors, capsize=3, **style)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if x:
            ticks = sorted({row[x] for row in drawn} - {0})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else tick for tick in ticks])
            axes.set(ylim=(0, None), xlabel="context length, tokens" if x == "context_length" else "demonstrations")
        else:
            axes.set(xlim=(0, None), ylim=axes.get_ylim()[::-1])
    if x:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods),
                      frameon=False)
    figure.savefig(path, dpi=110)
