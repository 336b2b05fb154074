"""python -m benchmarks run [family ...] | compare A.json B.json --fail 5% | plot A.json"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import llmfast
from benchmarks import measure, memory
from llmfast import cases, check

FAMILIES = ("attention", "softmax", "cross_entropy", "linear", "models", "encoder", "overhead")
DEFAULT = ("attention", "softmax", "encoder")  # a few minutes, ending on real input
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="check the kernels, then measure; a table, a JSON and a plot")
    p.add_argument(
        "families",
        nargs="*",
        choices=[*FAMILIES, []],
        help=f"of {', '.join(FAMILIES)}; by default {', '.join(DEFAULT)}",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--lengths", type=_numbers, default=(128, 256, 512, 1024, 2048, 4096), metavar="N,N,...")
    p.add_argument("--dtypes", type=lambda s: tuple(s.split(",")), default=("float32", "bfloat16"), metavar="D,D,...")
    p.add_argument("--forward-only", action="store_true", help="leave the backward out")
    p.add_argument("--budget", type=float, default=0.2, help="seconds for each contender of a row (default 0.2)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the wall-time column")
    p.add_argument("--no-check", action="store_true", help="don't run the case table first")
    p.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the JSON and the plot")
    p = commands.add_parser("compare", help="two runs row by row; fails when a row of llmfast got slower")
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--fail", default="5%", help="how much slower a row may get (default 5%%)")
    p = commands.add_parser("plot", help="draw a run again")
    p.add_argument("json", type=Path)
    p.add_argument("--out", type=Path, help="the PNG; beside the JSON by default")
    chosen = parser.parse_args()
    sys.exit({"run": run, "compare": compare, "plot": plot}[chosen.command](chosen))


def _numbers(text):
    return tuple(int(n) for n in text.split(","))


def run(chosen) -> int:
    console = Console()
    families = chosen.families or DEFAULT
    if chosen.device == "cuda" and not torch.cuda.is_available():
        console.print("no CUDA device is visible to torch", style="red")
        return 2
    environment = describe(chosen)
    console.print(f"[bold]llmfast[/] {environment['commit']} on {environment['machine']}, torch {environment['torch']}")
    if not chosen.no_check and not checked(console, chosen.device):
        return 1
    rows = []
    with progress(console) as bar:
        jobs = [(f, import_module(f"benchmarks.bench_{f}")) for f in families]
        args = (chosen.device, chosen.lengths, chosen.dtypes, not chosen.forward_only)
        shapes = [(f, m, s) for f, m in jobs for s in m.shapes(*args)]
        task = bar.add_task("peak", total=len(shapes) + 1)
        environment["peaks"] = measure.peaks(chosen.device)
        bar.advance(task)
        found = environment["peaks"]
        bar.console.print(
            f"peak: {found['float32'] / 1e9:.0f} GFLOP/s float32, {found['bfloat16'] / 1e9:.0f} bfloat16, "
            f"copy {found['bytes'] / 1e9:.0f} GB/s" + (" (one core)" if chosen.device == "cpu" else "")
        )
        last = None
        for family, module, shape in shapes:
            if family != last:
                bar.console.print(header(family, chosen.device))
                last = family
            bar.update(task, description=str(shape))
            rows += measured(module, family, shape, chosen, environment["peaks"], bar.console)
            bar.advance(task)
    for family in families:
        summary(console, [r for r in rows if r["family"] == family], family)
    if "attention" in families and not chosen.forward_only:
        N = 8 * max(chosen.lengths)
        environment["memory"] = {"N": N, "bytes": memory.measured(N, chosen.device)}
        console.print(
            f"[bold]memory[/]: {N} tokens, forward and backward, {environment['memory']['bytes'] / 2**20:.0f} MiB "
            f"beyond inputs and outputs (the matrix of scores would be {N**2 * 2 / 2**20:.0f} MiB)",
            highlight=False,
        )
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    console.print(f"rows in {path}")
    chosen.json, chosen.out = path, None
    return plot(chosen)


def progress(console):
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def checked(console, device) -> bool:
    """The case table in float32 and bfloat16 on every backend that this device has."""
    names = ("cpu",) if device == "cpu" else ("triton", "cuda")
    for name in names:
        with progress(console) as bar:
            task = bar.add_task(f"checking {name} against float64", total=len(cases.CASES))
            right, wrong = check.run_all(name, progress=lambda bar=bar, task=task: bar.advance(task))
        for problem in wrong:
            console.print(problem, style="red")
        console.print(f"{name}: {right} cases agree with float64, {len(wrong)} do not")
        if wrong:
            return False
    return True


COLUMNS = (
    ("", 15),
    ("median", 9),
    ("IQR", 5),
    ("wall", 10),
    ("rate", 14),
    ("peak", 6),
    ("ratio", 8),
    ("error", 9),
)  # 78 wide


def line(*cells):
    _, *rest = (f"{cell:>{width}s}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return f"  {cells[0]:{COLUMNS[0][1]}s}" + "".join(rest)


def header(family, device):
    wall = "" if device == "cuda" else ": one-thread CPU time decides; wall is all threads, * = machine loaded"
    return f"\n[bold]{family}[/]{wall}\n" + line(*(name for name, _ in COLUMNS))


def measured(module, family, shape, chosen, peaks, console):
    """The rows of one shape: every provider, a failing one with its reason."""
    tensors = module.inputs(shape, chosen.device)
    want = module.truth(shape, tensors)
    calls, errors, failed = {}, {}, {}
    for name, provider in module.providers(chosen.device).items():
        if module.skip(name, shape):
            continue
        try:
            calls[name] = module.call(provider, shape, tensors)
            errors[name] = measure.error(calls[name](), want)
        except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as problem:  # a row that says why
            calls.pop(name, None)
            failed[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:90]}"
    timings = measure.interleave(list(calls.values()), chosen.device, chosen.budget, chosen.threads)
    amount, unit = module.work(shape)
    peak = peaks["bytes"] if unit == "B/s" else peaks[shape.dtype] if unit == "FLOP/s" else None
    base = timings[0].median
    console.print(str(shape), style="cyan", highlight=False)
    rows = []
    for (name, _), t in zip(calls.items(), timings, strict=True):
        row = {"family": family, "case": str(shape), "shape": shape._asdict(), "provider": name, "seconds": t.median}
        row |= {
            "low": t.low,
            "high": t.high,
            "wall": t.wall,
            "loaded": t.loaded,
            "rate": amount / t.median,
            "unit": unit,
        }
        row |= {"share": amount / t.median / peak if peak else None, "ratio": base / t.median, "error": errors[name]}
        rows.append(row)
        wall = "" if t.wall is None else f"{_time(t.wall)}{'*' if t.loaded else ' '}"
        share = f"{row['share']:.0%}" if peak else ""
        cells = (name, _time(t.median), f"{(t.high - t.low) / t.median:.0%}", wall, _rate(row["rate"], unit), share)
        text = line(*cells, f"{row['ratio']:.2f}x", f"{errors[name]:.1e}")
        console.print(text, style="bold" if name.startswith("llmfast") else "", highlight=False)
    for name, why in failed.items():
        rows.append({"family": family, "case": str(shape), "shape": shape._asdict(), "provider": name, "failed": why})
        console.print(f"  {name:15s}{why}", highlight=False, markup=False)
    return rows


def _time(seconds):
    return (
        f"{seconds * 1e6:.1f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def _rate(rate, unit):
    if unit == "calls/s":
        return f"{rate / 1e3:.1f} kcall/s"
    if unit in ("sentences/s", "tokens/s"):
        return f"{rate:.1f} {unit[:4]}/s"
    return f"{rate / 1e12:.1f} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.1f} G{unit}"


def summary(console, rows, family):
    """Geometric mean and lowest ratio of each llmfast provider over the baseline."""
    import statistics

    for name in dict.fromkeys(r["provider"] for r in rows if r["provider"].startswith("llmfast")):
        mine = [r for r in rows if r["provider"] == name and "ratio" in r]
        if not mine:
            continue
        low = min(mine, key=lambda r: r["ratio"])
        base = next(r["provider"] for r in rows if "ratio" in r)
        console.print(
            f"[bold]{family}: {name} is {statistics.geometric_mean(r['ratio'] for r in mine):.2f}x {base}[/] "
            "in geometric mean of "
            f"{len(mine)} rows, lowest {low['ratio']:.2f}x ({low['case']})",
            highlight=False,
        )
    if family == "cross_entropy":
        from benchmarks import bench_cross_entropy

        for dtype, name, megabytes in bench_cross_entropy.memory(dict.fromkeys(r["shape"]["dtype"] for r in rows)):
            console.print(f"linear {dtype} 2048x32000: {name} holds {megabytes:.0f} MB at its peak", highlight=False)
    if family == "encoder":
        from benchmarks import bench_encoder

        if bench_encoder.folder() is None:
            console.print("the pretrained encoder is not installed: these are random weights of its shape")
        for case, cosine in bench_encoder.agreement(dict.fromkeys(r["shape"]["dtype"] for r in rows)):
            console.print(f"{case}: the embeddings agree with PyTorch's, lowest cosine {cosine:.7f}", highlight=False)


def describe(chosen) -> dict:
    """What a number needs beside it: machine, versions, commit, load."""
    git = lambda *a: subprocess.run(["git", *a], cwd=HERE, capture_output=True, text=True).stdout.strip()
    commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    found = llmfast.info()
    machine = (
        found["gpu"]["name"]
        if chosen.device == "cuda"
        else f"{found['cpu']}, {os.cpu_count()} cores, {found.get('instruction set')}"
    )
    return {
        "commit": commit,
        "machine": machine,
        "torch": torch.__version__,
        "device": chosen.device,
        "load": os.getloadavg(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "node": re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-").lower(),
        "kernel": platform.release(),
        "threads": chosen.threads,
        "info": found,
    }


def compare(chosen) -> int:
    """0 when no row of llmfast is slower than allowed, as a ratio to its baseline in the same run."""
    allowed = float(chosen.fail.rstrip("%")) / 100
    before, after = (
        {(r["case"], r["provider"]): r for r in json.loads(p.read_text())["rows"] if "ratio" in r}
        for p in (chosen.before, chosen.after)
    )
    table = Table("case", "provider", "before", "after", "change")
    slower = 0
    for key in before.keys() & after.keys():
        if not key[1].startswith("llmfast"):
            continue
        change = after[key]["ratio"] / before[key]["ratio"] - 1
        slower += change < -allowed
        table.add_row(
            *key,
            f"{before[key]['ratio']:.2f}x",
            f"{after[key]['ratio']:.2f}x",
            f"{change:+.1%}",
            style="red" if change < -allowed else "",
        )
    Console().print(table)
    print(f"{slower} rows slower by more than {allowed:.0%}; {len(before.keys() ^ after.keys())} rows in one run only")
    return int(slower > 0)


def plot(chosen) -> int:
    from benchmarks.plot import draw

    path = chosen.out or chosen.json.with_suffix(".png")
    drawn = draw(json.loads(chosen.json.read_text()), path)
    print(f"plot in {path}" if drawn else "no plot: it shows attention, softmax and cross entropy")
    return 0


main()
