"""`llmfast tune`: measures the tiles of every Triton kernel on the GPU that is there and keeps the best in a table.

Candidates that don't fit the GPU's shared memory with any option, or spill more than the tile that is built in, are
told by compiling and never timed. The others take turns, call by call; the median decides, among those whose result is
right by the rule of llmfast.cases. backends/triton.py reads the table at import; nothing is ever measured in a user's
call.
--dry-run compiles only: it needs no GPU.

>>> python -m llmfast tune --dry-run --arch sm_90 --kernel fwd_tma --size 128
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from . import cases
from .backends import reference
from .environment import tiles_path
from .inspect_kernels import DTYPES, architecture, driver_for, products, read
from .machine_code import SHARED, listed
from .spec import (
    NO_CROSS_ENTROPY_EXTRAS,
    NO_EXTRAS,
    NO_SOFTMAX_EXTRAS,
    AttentionSpec,
    CrossEntropySpec,
    Extras,
    SoftmaxSpec,
)

_POWERS = tuple(2**i for i in range(18))


def _rows(size, columns):
    """BLOCK_M, BLOCK_N, num_warps: a program takes whole rows while they are short, 32 elements a lane or fewer."""
    whole = [(max(1, e // size), size, w) for e in (2048, 4096, 8192) for w in (1, 2, 4, 8, 16, 32)]
    parts = [(1, n, w) for n in columns for w in (4, 8, 16, 32)]
    tiles = whole if size <= max(columns) else parts
    return [(m, n, w) for m, n, w in dict.fromkeys(tiles) if 4 <= m * n // (32 * w) <= 64]


class Kernel(NamedTuple):
    """What is tuned: the kernel that a launcher starts, the sizes that have a row, the candidates of a size."""

    name: str
    sizes: tuple[int, ...]
    candidates: Callable[[int], list[tuple[int, ...]]]
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32")


HEAD_DIMS, COLUMNS = (64, 128, 256), _POWERS[4:]
ELEMENTS = ("bf16", "fp16", "fp32")  # of kernels without a product
KERNELS = {  # of attention BLOCK_M, BLOCK_N, num_warps, num_stages; by TMA also the programs on an SM
    "fwd": Kernel("attention_fwd", HEAD_DIMS, lambda D: list(product((64, 128), (32, 64, 128), (4, 8), (2, 3)))),
    "fwd_tma": Kernel(
        "attention_fwd_tma",
        HEAD_DIMS,
        lambda D: [(*t, 2 if t[0] == 64 else 1) for t in product((64, 128), (32, 64, 128), (4, 8), (2, 3))],
        ("bf16", "fp16"),
    ),
    "dkdv": Kernel("attention_bwd_dkdv", HEAD_DIMS, lambda D: list(product((32, 64), (32, 64, 128), (4, 8), (1, 2)))),
    "dq": Kernel("attention_bwd_dq", HEAD_DIMS, lambda D: list(product((64, 128), (16, 32, 64, 128), (4, 8), (2,)))),
    "decode": Kernel("attention_decode", HEAD_DIMS, lambda D: list(product((16, 32, 64, 128), (4, 8), (2, 3, 4)))),
    "softmax_fwd": Kernel("softmax_fwd", COLUMNS[:13], lambda N: _rows(N, _POWERS[12:16]), ELEMENTS),
    "softmax_bwd": Kernel("softmax_bwd", COLUMNS[:12], lambda N: _rows(N, _POWERS[12:15]), ELEMENTS),
    "cross_entropy": Kernel("cross_entropy", COLUMNS[:11], lambda V: _rows(V, _POWERS[12:14]), ELEMENTS),
}


def _in_table(dtype):
    return dtype if dtype == "tf32" else str(DTYPES[dtype]).removeprefix("torch.")


def read_table(path: Path) -> dict[tuple, tuple[int, ...]]:
    """Tiles by (architecture, kernel, size, dtype); ValueError where a row is not one that tune could have written."""
    with open(path, "rb") as file:
        text = file.read(2**20 + 1)
    if len(text) > 2**20:
        raise ValueError("larger than 1 MiB")
    try:
        rows = json.loads(text)["tiles"]
        found = {(arch, name, size, dtype): tuple(tile) for arch, name, size, dtype, tile in rows}
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ValueError(f"no JSON with a list of tiles ({type(problem).__name__})") from None
    for (arch, name, size, dtype), tile in found.items():
        kernel = KERNELS.get(name) if isinstance(name, str) else None
        known = kernel and size in kernel.sizes and isinstance(arch, str)
        known = known and dtype in map(_in_table, kernel.dtypes)
        if not known or not all(type(n) is int for n in tile) or tile not in kernel.candidates(size):
            raise ValueError(f"{[arch, name, size, dtype, tile]!r:.200} is not a tile that tune tries")
    return found


def write_table(path: Path, found: dict[tuple, tuple[int, ...]], **about) -> None:
    """At once or not at all: a process that reads meanwhile sees the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n  ".join(json.dumps([*key, tile]) for key, tile in sorted(found.items()))
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(f'{json.dumps(about)[:-1]}{", " if about else ""}"tiles": [\n  {rows}\n]}}\n')
    os.replace(part, path)


class Problem(NamedTuple):
    """A call of a launcher, what it wrote by name, and the same of the reference in the dtype that truth is given."""

    run: Callable[[], object]
    results: Callable[[], dict[str, torch.Tensor]]
    truth: Callable[[Callable], dict[str, torch.Tensor]]


def problem(name: str, size: int, dtype: str, device="cpu", small=False) -> Problem:
    """16384 tokens in 16 heads, 64k keys of a cache, 2**26 elements in rows; small: for compiling and interpreting."""
    g = torch.Generator(device).manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g, device=device).to(DTYPES[dtype])
    return (_on_rows if name.startswith(("softmax", "cross")) else _on_heads)(name, size, rand, small)


def _on_heads(name, D, rand, small):
    from .kernels import attention, attention_backward, attention_tma, decode

    B, H, N = (1, 2, 128) if small else (8, 8, 8192) if name == "decode" else (4, 16, 4096)
    q, k, v, do = (rand(B, H, N, D) for _ in range(4))
    spec, first = AttentionSpec(2 / D**0.5, right=0), (slice(1), slice(1))
    if name == "decode":
        q = q[:, :, :1]
    o, lse, grads = (
        torch.empty_like(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        [torch.empty_like(q) for _ in "qkv"],
    )
    lengths = Extras(seqlens_k=torch.full((B,), N, dtype=torch.int32, device=q.device))

    def truth(wide):
        qkv = [wide(t[first]) for t in (q, k, v)]
        o, lse = reference.forward(*qkv, spec, NO_EXTRAS)
        if name not in ("dkdv", "dq"):
            return {"o": o, "lse": lse}
        delta = reference.rowdot(o, wide(do[first]))
        found = reference.backward(wide(do[first]), *qkv, o, lse, delta, spec, NO_EXTRAS)
        return {"dq": found.dq} if name == "dq" else {"dk": found.dk, "dv": found.dv}

    outputs = {"o": o, "lse": lse}
    run = {
        "fwd": lambda: attention.forward(q, k, v, o, lse, spec, NO_EXTRAS),
        "fwd_tma": lambda: attention_tma.forward(q, k, v, o, lse, spec, NO_EXTRAS),
        "decode": lambda: decode.forward(q, k, v, o, lse, spec, lengths),
    }.get(name)
    if run is None:
        delta = torch.empty_like(lse)
        attention.forward(q, k, v, o, lse, spec, NO_EXTRAS)
        attention_backward.rowdot(o, do, delta)
        run = lambda: attention_backward.backward(do, q, k, v, lse, delta, *grads, None, None, spec, NO_EXTRAS)
        outputs = {"dq": grads[0]} if name == "dq" else {"dk": grads[1], "dv": grads[2]}
    return Problem(run, lambda: {n: t[first] for n, t in outputs.items()}, truth)


def hardest(name: str, D: int, dtype: str) -> list[Callable[[], object]]:
    """Calls of an attention launcher that ask for the most shared memory: a mask and a bias, of either width, and in
    decode as many rows as a tile takes.
    """
    from .kernels import attention, attention_backward, decode

    N, wide = 128, torch.float32
    q, lse, mask = torch.empty(1, 2, N, D, dtype=DTYPES[dtype]), torch.empty(1, 2, N), torch.empty(1, 1, N, N).bool()
    spec, lengths = AttentionSpec(1.0, right=0), torch.empty(1, dtype=torch.int32)

    def call(mask, bias):
        extras = Extras(mask, bias)
        if name == "decode":
            few = lambda t: None if t is None else t[:, :, :64]
            extras = Extras(few(mask), few(bias), seqlens_k=lengths)
            decode.forward(few(q), q, q, few(q), None, spec, extras)
        elif name == "fwd":
            attention.forward(q, q, q, q, lse, spec, extras)
        else:
            attention_backward.backward(q, q, q, q, lse, lse, q, q, q, None, None, spec, extras)

    if name not in ("fwd", "dkdv", "dq", "decode"):
        return []
    options = [(mask, torch.empty(1, 2, N, N, dtype=t)) for t in dict.fromkeys((q.dtype, wide))]
    options += [(None, torch.empty(1, 2, N, N, dtype=wide))]
    return [lambda o=o: call(*o) for o in options]


def _on_rows(name, N, rand, small):
    from .kernels import cross_entropy, softmax

    M, few = (8 if small else 2**26 // N), slice(8)
    x, dy, found = rand(M, N), rand(M, N), {}
    if name == "cross_entropy":
        spec, y, dloss = CrossEntropySpec(), torch.arange(M, device=x.device) % N, torch.ones(M, device=x.device)
        loss, lse, dx = torch.empty_like(dloss), torch.empty_like(dloss), torch.empty_like(x)

        def run():
            cross_entropy.forward(x, y, loss, lse, spec, NO_CROSS_ENTROPY_EXTRAS)
            cross_entropy.backward(dloss, x, y, lse, dx, spec, NO_CROSS_ENTROPY_EXTRAS)

        def truth(wide):
            loss, lse = reference.cross_entropy_forward(wide(x[few]), y[few], spec, NO_CROSS_ENTROPY_EXTRAS)
            inputs = dloss[few].to(loss.dtype), wide(x[few]), y[few], lse
            return {"loss": loss, "dx": reference.cross_entropy_backward(*inputs, spec, NO_CROSS_ENTROPY_EXTRAS)}

        return Problem(run, lambda: {"loss": loss[few], "dx": dx[few]}, truth)
    x, dy = x[None, None], dy[None, None]
    y = reference.softmax_forward(x, None, SoftmaxSpec(), NO_SOFTMAX_EXTRAS)
    if name == "softmax_fwd":
        run = lambda: found.update(y=softmax.forward(x, y, SoftmaxSpec(), NO_SOFTMAX_EXTRAS))
        truth = lambda wide: reference.softmax_forward(wide(x[..., few, :]), None, SoftmaxSpec(), NO_SOFTMAX_EXTRAS)
    else:
        run = lambda: found.update(dx=softmax.backward(dy, y, SoftmaxSpec(), NO_SOFTMAX_EXTRAS)[0])
        of = lambda wide: (wide(t[..., few, :]) for t in (dy, y))
        truth = lambda wide: reference.softmax_backward(*of(wide), SoftmaxSpec(), NO_SOFTMAX_EXTRAS)[0]
    out = "y" if name == "softmax_fwd" else "dx"
    return Problem(run, lambda: {out: found[out][..., few, :]}, lambda wide: {out: truth(wide)})


class Figures(NamedTuple):
    """A candidate as it compiles for a GPU, and why it is not worth timing, or None."""

    kernel: str
    size: int
    dtype: str
    tile: list[int] | None  # None: the one that is built in
    registers: int
    stack: int
    shared: int
    why_not: str | None

    def __str__(self) -> str:
        tile = "built in" if self.tile is None else "x".join(map(str, self.tile))
        figures = f"{self.registers:3d} registers {self.stack:5d} B stack {self.shared:6d} B shared"
        return f"{tile:17s} {figures}  {self.why_not or ''}".rstrip()


def figures(arch: str, name: str, size: int, dtype: str) -> Iterator[Figures]:
    """The built-in tile and every candidate, compiled for a GPU that need not be there."""
    from .kernels import attention

    driver, kernel, built_in = driver_for(arch), KERNELS[name], None
    limit, work = SHARED[listed(arch)], problem(name, size, dtype, small=True)

    def compiled(run):
        driver.forget()
        with trying(attention, name, size, dtype, tile):
            run()
        return [f for f in driver.launched if f[0].startswith(kernel.name)]

    for tile in (None, *kernel.candidates(size)):
        if arch.startswith("gfx9") and tile and 32 in tile[2:3]:  # warps of 64 lanes: 1024 threads are 16
            continue
        most = max((read(*f, dtype, arch) for f in compiled(work.run)), key=lambda c: (c.stack, c.shared))
        built_in, why_not = built_in or most, None
        if most.shared > limit:
            why_not = f"over {limit} B"
        elif most.stack > built_in.stack:
            why_not = "spills"
        elif tile and (options := hardest(name, size, dtype)):
            asked = max(f[2].shared for run in options for f in compiled(run))
            why_not = f"over {limit} B with a mask or bias: {asked}" if asked > limit else None
        yield Figures(name, size, dtype, tile, most.registers, most.stack, most.shared, why_not)


@contextmanager
def trying(attention, name, size, dtype, tile):
    """Launches inside take this tile and, where dtype is tf32, round float32 to it."""
    key = attention.target(), name, size, _in_table(dtype)
    if tile is not None:
        attention.TUNED[key] = tuple(tile)
    try:
        with products(dtype):
            yield key
    finally:
        attention.TUNED.pop(key, None)


class Measured(NamedTuple):
    """A candidate's time and the largest error, relative to the largest number; wrong: where it breaks the rule."""

    tile: tuple[int, ...] | None
    median: float  # milliseconds
    spread: float  # between the quartiles, of the median
    error: float
    wrong: list[str]

    def __str__(self) -> str:
        tile = "built in" if self.tile is None else "x".join(map(str, self.tile))
        said = f"{self.median:9.3f} ms  +-{100 * self.spread / 2:4.1f} %  error {self.error:.1e}"
        return f"{tile:17s} {said}  {'; '.join(self.wrong)}".rstrip()


def measure(name, size, dtype, tiles, clock, device="cuda", rounds=30, small=False) -> list[Measured]:
    """Each tile's median over rounds in which every one has its turn; None is the tile that is built in."""
    from .kernels import attention

    with products(dtype):
        work = problem(name, size, dtype, device, small)
        truth, near = work.truth(torch.Tensor.double), work.truth(lambda t: t)
    times, found = {}, []
    for tile in tiles:
        with trying(attention, name, size, dtype, tile):
            work.run()
        results = work.results()
        wrong = [w for n, x in results.items() for w in _wrong(n, x, truth[n], near[n])]
        error = max(((x.double() - truth[n]).abs().max() / truth[n].abs().max()).item() for n, x in results.items())
        found.append(Measured(tile, 0.0, 0.0, error, wrong))
        times[tile] = []
    for _ in range(rounds):
        for tile, taken in times.items():
            with trying(attention, name, size, dtype, tile):
                taken.append(clock(work.run))
    for i, one in enumerate(found):
        low, median, high = statistics.quantiles(times[one.tile], n=4)
        found[i] = one._replace(median=median, spread=(high - low) / median)
    return found


def _wrong(name, x, truth, near):
    c = cases.C_GRADIENT if name.startswith("d") else cases.C_FORWARD
    return cases.breaks(name, x, truth, [near], c, x.dtype, by_head=False)


def best(found: list[Measured]) -> tuple[int, ...] | None:
    """The fastest tile that is right; None where the one that is built in is within the spread of it."""
    built_in = next(m for m in found if m.tile is None)
    fastest = min((m for m in found if not m.wrong), key=lambda m: m.median, default=built_in)
    gain = 1 - fastest.median / built_in.median
    return fastest.tile if built_in.wrong or gain > max(0.01, fastest.spread, built_in.spread) else None


def on_gpu(run) -> float:
    """Milliseconds of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compiled_elsewhere(arch, name, size, dtype) -> list[Figures]:
    """What figures says, from a process of its own: this one's Triton launches."""
    command = [sys.executable, "-W", "ignore", "-m", "llmfast", "tune", "--dry-run", "--json", "--arch", arch]
    command += ["--kernel", name, "--size", str(size), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {name} for {arch} failed: {done.stderr[-2000:]}")
    return [Figures(*json.loads(line)) for line in done.stdout.splitlines()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmfast tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=tuple(KERNELS), choices=KERNELS)
    parser.add_argument("--size", nargs="+", type=int, help="head dims, and columns of rows, that have a row")
    parser.add_argument("--dtype", nargs="+", default=("bf16",), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help=f"the table to write (default: {tiles_path()})")
    parser.add_argument("--dry-run", action="store_true", help="only compile the candidates and list them: no GPU")
    parser.add_argument("--arch", type=architecture, default="sm_90", help="with --dry-run: for this GPU")
    parser.add_argument("--json", action="store_true", help="with --dry-run: a JSON list a line")
    chosen = parser.parse_args(arguments)
    if reason := _cannot(chosen.dry_run):
        print(f"llmfast tune: {reason}", file=sys.stderr)
        return 2
    from .kernels import attention, attention_tma

    attention.TUNED.clear()
    arch = chosen.arch if chosen.dry_run else attention.target()
    path, table = chosen.out or tiles_path(), {}
    if not chosen.dry_run and path.exists():
        try:
            table = read_table(path)
        except (OSError, ValueError) as problem:
            said = f"{path} is not a table of llmfast tune: {problem}; remove it, or name another with --out"
            print(f"llmfast tune: {said}", file=sys.stderr)
            return 2
    for name, dtype in product(chosen.kernel, chosen.dtype):
        kernel = KERNELS[name]
        sizes = kernel.sizes if name != "fwd_tma" else tuple(attention_tma.table(arch))
        if dtype not in kernel.dtypes:
            continue
        for size in (s for s in sizes if s in (chosen.size or sizes)):
            if not chosen.json:
                print(f"{name} {size} {dtype} {arch}", flush=True)
            if chosen.dry_run:
                for row in figures(arch, name, size, dtype):
                    print(json.dumps(row) if chosen.json else f"  {row}", flush=True)
                continue
            rows = compiled_elsewhere(arch, name, size, dtype)
            fit = [None, *(tuple(f.tile) for f in rows if f.tile and not f.why_not)]
            found = measure(name, size, dtype, fit, on_gpu)
            print(*(f"  {row}" for row in found), sep="\n", flush=True)
            with trying(attention, name, size, dtype, None) as key:
                table.pop(key, None)
            if (tile := best(found)) is not None:
                table[key] = tile
            write_table(path, table, gpu=torch.cuda.get_device_name())
    return 0


def _cannot(dry_run):
    """Why nothing can be tuned here, in a sentence, or None."""
    if find_spec("triton") is None:
        return "triton is not installed."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and the interpreter neither compiles nor has a speed."
    if not dry_run and not torch.cuda.is_available():
        return "there is no GPU to measure on; --dry-run lists the candidates with what compiling tells of them."
    return None
