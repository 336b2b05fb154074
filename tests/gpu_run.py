"""python tests/gpu_run.py [--out DIR] [--dry-run]: what a GPU machine without network can tell, in about 8 minutes.

Each stage has its own time limit and a log in DIR ($OUT, or build/gpu) that is written as it goes; summary.jsonl has a
line a stage. A stage that this machine can't run says why in that line. Exit status 1 where a stage failed or ran out
of time.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.resolve()


class Stage(NamedTuple):
    name: str
    seconds: int
    command: list[str]
    needs: tuple[str, ...] = ()  # programs to find; "gpu": a CUDA device


def stages(out):
    python = [sys.executable, "-u"]
    yield Stage("machine", 15, ["nvidia-smi"], ("nvidia-smi",))
    yield Stage("info", 20, [*python, "-m", "llmfast", "info"])
    yield Stage("build", 100, ["env", "LLMFAST_CUDA=1", *python, "setup.py", "-q", "build_ext", "--inplace"], ("nvcc",))
    yield Stage("conformance", 30, [*python, "tests/cuda_model/conformance.py"], ("nvcc", "g++", "gpu"))
    yield Stage("check", 45, [*python, "-m", "llmfast", "check"], ("gpu",))
    tests = [f"tests/test_{name}.py" for name in ("attention", "softmax", "cross_entropy", "triton_decode")]
    yield Stage("tests", 90, [*python, "-m", "pytest", "-q", *tests, f"--junitxml={out / 'tests.xml'}"], ("gpu",))
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"]
        yield Stage(tool, 45, [*command, *python, "tests/gpu_shapes.py"], ("compute-sanitizer", "gpu"))
    bench = [*python, "-m", "benchmarks", "run", "--device", "cuda"]
    yield Stage("benchmarks", 120, bench, ("gpu",))
    profile = ["ncu", "--set", "full", "--clock-control", "none", "-k", "regex:attention_(fwd|bwd)", "-c", "4"]
    yield Stage("profile", 30, [*profile, *python, "tests/gpu_shapes.py", "--profile"], ("ncu", "gpu"))


def missing(stage, has_gpu):
    """Why this machine can't run a stage, or None."""
    for need in stage.needs:
        if need == "gpu" and not has_gpu:
            return "no CUDA device"
        if need != "gpu" and shutil.which(need) is None:
            return f"{need} was not found"
    return None


def run(stage, out):
    """The exit status, or None when the time limit ended it; the log grows while it runs."""
    with open(out / f"{stage.name}.log", "w") as log:
        job = subprocess.Popen(stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return job.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "gpu")))
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--only", nargs="+", help="these stages")
    chosen = parser.parse_args()
    import torch

    out, failed = chosen.out.resolve(), 0
    plan = [s for s in stages(out) if not chosen.only or s.name in chosen.only]
    if chosen.dry_run:
        for s in plan:
            why = missing(s, torch.cuda.is_available())
            print(
                f"{s.name:12s} {s.seconds:4d} s  {' '.join(s.command)}{f'  [would not run here: {why}]' if why else ''}"
            )
        print(f"{sum(s.seconds for s in plan)} s at most, everything under {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "summary.jsonl", "w") as summary:
        for s in plan:
            start, why = time.monotonic(), missing(s, torch.cuda.is_available())
            status = None if why else run(s, out)
            said = {0: "ok", None: f"stopped after {s.seconds} s"}.get(status, f"failed ({status})")
            said = f"not run: {why}" if why else said
            failed += not why and status != 0
            row = {"stage": s.name, "result": said, "seconds": round(time.monotonic() - start, 1)}
            print(f"{s.name:12s} {row['seconds']:6.1f} s  {said}", flush=True)
            summary.write(json.dumps(row) + "\n")
            summary.flush()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
