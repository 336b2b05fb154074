"""How things are timed: contenders interleaved call by call in one process, medians with spread, accuracy beside speed.

On a CPU one-thread thread-CPU time decides: it holds on a loaded machine, where all-thread wall time doesn't. The wall
time stands beside it, flagged when the one-thread calls were preempted. On a GPU CUDA events time each call.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one contender: median and quartiles of the deciding time, all-thread wall median (CPU only), load."""

    median: float
    low: float
    high: float
    wall: float | None
    loaded: bool


def interleave(
    contenders: Sequence[Callable], device: str = "cpu", budget: float = 0.3, threads: int = 1
) -> list[Timing]:
    """Times each callable, one call of each in turn, until the budget in seconds is spent; at least 5 rounds, 3
    where one takes ten times the budget."""
    if device == "cuda":
        return _interleave_cuda(contenders, budget)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cpu, wall = _rounds(contenders, budget)
        loaded = sum(map(sum, wall)) > 1.15 * sum(map(sum, cpu))  # preempted: somebody else wanted the core
        torch.set_num_threads(threads)
        _, all_threads = _rounds(contenders, budget / 2, least=3) if threads > 1 else (cpu, wall)
    finally:
        torch.set_num_threads(before)
    return [_timing(c, statistics.median(w), loaded) for c, w in zip(cpu, all_threads, strict=True)]


def _rounds(contenders, budget, least=5, most=200):
    """CPU and wall seconds of each contender's calls. The first round only warms up, unless it takes ten times the
    budget: then it counts, and two follow."""
    cpu, wall = [[] for _ in contenders], [[] for _ in contenders]

    def once():
        for f, c, w in zip(contenders, cpu, wall, strict=True):
            c0, w0 = time.thread_time(), time.perf_counter()
            f()
            c.append(time.thread_time() - c0)
            w.append(time.perf_counter() - w0)

    start = time.perf_counter()
    once()
    if time.perf_counter() - start > 10 * budget * len(contenders):
        least = 3
    else:
        for times in (*cpu, *wall):
            times.clear()
    start = time.perf_counter()
    while (time.perf_counter() - start < budget * len(contenders) or len(cpu[0]) < least) and len(cpu[0]) < most:
        once()
    return cpu, wall


def _interleave_cuda(contenders, budget, least=10, most=200):
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than the H200's 50 MB L2
    for f in contenders:
        f()
    torch.cuda.synchronize()
    times = [[] for _ in contenders]
    start = time.perf_counter()
    while (time.perf_counter() - start < budget * len(contenders) or len(times[0]) < least) and len(times[0]) < most:
        for f, t in zip(contenders, times, strict=True):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            f()
            end.record()
            end.synchronize()
            t.append(begin.elapsed_time(end) / 1e3)
    return [_timing(t, None, False) for t in times]


def _timing(times, wall, loaded):
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return Timing(statistics.median(times), low, high, wall, loaded)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where pytest-benchmark runs


def record(benchmark, module, shape, provider) -> None:
    """One provider of a family's table on one shape under pytest-benchmark, with the family's rate beside it."""
    run = module.call(module.providers(DEVICE)[provider], shape, module.inputs(shape, DEVICE))
    benchmark.group = str(shape)
    if DEVICE == "cuda":
        benchmark.pedantic(lambda: (run(), torch.cuda.synchronize()), rounds=20, warmup_rounds=3)
    else:
        benchmark(run)
    amount, unit = module.work(shape)
    benchmark.extra_info[unit] = amount / benchmark.stats["median"]


def error(got, want) -> float:
    """Relative error in the norm, the largest over the tensors; infinite when something isn't finite."""
    got, want = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.double(), b.double()
        if not torch.isfinite(a).all():
            return float("inf")
        worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-30)).item())
    return worst


def peaks(device: str = "cpu") -> dict[str, float]:
    """What this machine reaches: FLOP/s of one core (or the GPU's matrix product) by dtype, and bytes/s of a copy."""
    if device == "cuda":
        found = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
            found[str(dtype)[6:]] = 2 * 8192**3 / interleave([lambda a=a, b=b: a @ b], "cuda")[0].median
        x = torch.randn(1 << 28, device="cuda")
        y = torch.empty_like(x)
        found["bytes"] = 2 * x.nbytes / interleave([lambda: y.copy_(x)], "cuda")[0].median
        return found
    from llmfast.backends.cpu import peak

    x = torch.randn(1 << 24)
    y = torch.empty_like(x)
    found = {dtype: peak(dtype) for dtype in ("float32", "bfloat16", "float16", "float64")}
    return found | {"bytes": 2 * x.nbytes / interleave([lambda: y.copy_(x)])[0].median}
