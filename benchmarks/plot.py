"""The picture of a run: how many times faster than the baseline, by sequence length or vocabulary."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"float32": "#1b6ca8", "bfloat16": "#d1495b", "float16": "#66a182", "float64": "#8d96a3"}


def draw(run: dict, path) -> bool:
    """One panel for each kind of attention, softmax and cross entropy; a line for each dtype; the baseline at 1. False
    where a run has nothing to draw.
    """
    rows = [r for r in run["rows"] if "ratio" in r]
    panels = {}
    for r in rows:
        s = r["shape"]
        if r["family"] == "attention":
            key = f"attention {'backward' if s['backward'] else 'forward'}, {'causal' if s['causal'] else 'full'}"
        elif r["family"] == "softmax" and not s["causal"]:
            key = "softmax, output reused"
        elif r["family"] == "cross_entropy" and not s["D"]:
            key = f"cross entropy {'backward' if s['backward'] else 'forward'}, by vocabulary"
        else:
            continue
        if r["provider"].startswith("llmfast") or r["provider"] == "naive":
            panels.setdefault(key, {}).setdefault((r["provider"], s["dtype"]), []).append(
                (s.get("N") or s["V"], r["ratio"])
            )
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for (provider, dtype), points in series.items():
            x, y = zip(*sorted(points), strict=True)
            dashed = provider == "naive"
            axis.plot(
                x,
                y,
                "--" if dashed else "o-",
                color=COLOURS.get(dtype),
                lw=1 if dashed else 2,
                ms=4,
                label=f"{provider} {dtype}",
                alpha=0.6 if dashed else 1,
            )
        axis.axhline(1, color="black", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({n for p in series.values() for n, _ in p}))
        axis.xaxis.set_major_formatter(lambda n, _: f"{int(n)}")
        axis.tick_params(axis="x", rotation=45)
        axis.set_ylim(0, 1.6 * max(y for points in series.values() for _, y in points))
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("times PyTorch's speed")
    e = run["environment"]
    way = "CUDA events" if e["device"] == "cuda" else "one-thread CPU time"
    figure.suptitle(
        f"llmfast {e['commit']} against torch {e['torch']} on {e['machine']} ({way}, {e['time'][:10]})", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
