"""Every backend on every row of the case table, against float64 by the rule of llmfast.cases."""

import os
import random
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch

import llmfast
from llmfast import backends, cases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


PAIRED = ("Dv > D", "odd head")  # rows that bf16's pairs can break where float32 can't


def sampled(names, keep, keep_triton):
    """Rows of (name, dtype, backend): float32 for every name, of the other dtypes a seeded sample in the short tier."""
    draw = random.Random(0)
    for name in names:
        for dtype in DTYPES:
            drawn = draw.random()
            for backend in backends.ORDER:
                paired = dtype == "bf16" and name in PAIRED and backend != "triton"
                short = dtype == "fp32" or paired or drawn < (keep_triton if backend == "triton" else keep)
                marks = [] if short else pytest.mark.long
                yield pytest.param(name, dtype, backend, marks=marks, id=f"{name}-{dtype}-{backend}")


@lru_cache(1)  # the backends follow each other
def judge(name, dtype, device):
    p = cases.problem(cases.CASES[name], DTYPES[dtype], device=device)
    return p, cases.yardsticks(p)


@pytest.mark.parametrize(("name", "dtype", "backend"), list(sampled(cases.CASES, 0.35, 0.12)))
def test_agrees_with_float64(name, dtype, backend):
    p, yards = judge(name, dtype, device_of(backend))
    assert cases.disagreements(p, run_or_skip(p, backend), yards) == []


def device_of(backend):
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def runs(backend):
    """Whether a backend runs here at all: float32 rows are what every one takes."""
    x = torch.zeros(1, 2, device=device_of(backend))
    return backends.op("cross_entropy", backend).supports(x, x[:, 0].long(), None, None) is None


def triton_or_skip():
    """Skips where Triton can run nothing. The machine decides, not the backend: what that refuses is a fault."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or the interpreter")


def skip(reason, backend):
    """Where a backend runs at all, a refusal is a fault: cpu and reference have no empty cells, triton only float64."""
    if backend != "cuda" and runs(backend) and not (backend == "triton" and "dtype float64" in str(reason)):
        raise reason
    pytest.skip(str(reason))


def run_or_skip(p, backend):
    """The result, or a skip with the backend's own reason."""
    try:
        return cases.run(p, backend)
    except NotImplementedError as reason:
        skip(reason, backend)


@pytest.mark.parametrize("backend", backends.ORDER)
def test_batch_invariant(backend):
    """The bits of a (sequence, head) don't depend on the others, on the batch or on the run."""
    p = cases.problem(cases.Case(2, 3, 3, 70, 90, 32, 32, dict(causal=True)), torch.float32, device=device_of(backend))
    whole = run_or_skip(p, backend)
    again = run_or_skip(p, backend)
    one = run_or_skip(
        cases.Problem(*(t[1:2, 2:3].clone() for t in p[:3]), p.options, p.do[1:2, 2:3].clone(), None), backend
    )
    assert torch.equal(whole.o, again.o)
    assert torch.equal(whole.o[1:2, 2:3], one.o)
    assert torch.equal(whole.lse[1:2, 2:3], one.lse)
    for name, g in one.grads.items():
        assert torch.equal(whole.grads[name][1:2, 2:3], g), name


@pytest.mark.parametrize("backend", backends.ORDER)
def test_nan_stays_in_its_sequence(backend):
    p = cases.problem(cases.Case(2, 2, 2, 70, 70, 32, 32, {}), torch.float32, device=device_of(backend))
    clean = run_or_skip(p, backend)
    for t in p[:3]:
        t[0, 0, 3] = float("nan")
    spoiled = run_or_skip(p, backend)
    assert spoiled.o[0, 0, 3].isnan().all()
    assert torch.equal(spoiled.o[1], clean.o[1])
    assert torch.equal(spoiled.o[0, 1], clean.o[0, 1])


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_tiles_outside_the_window_are_not_visited(backend):
    """NaN there would reach every sum. Of tiles to 128 rows the first and last are NaN, then o of their neighbours and
    dk and dv of those beyond."""
    case = cases.Case(1, 1, 1, 1024, 1024, 16, 16, dict(window=(20, 20)))
    p = cases.problem(case, torch.float16, device=device_of(backend))
    clean = run_or_skip(p, backend)
    for t in (p.q, p.k, p.v, p.do):
        t[:, :, :128] = t[:, :, 896:] = float("nan")
    spoiled = run_or_skip(p, backend)
    for n, t in (("o", clean.o), *clean.grads.items()):
        got = spoiled.o if n == "o" else spoiled.grads[n]
        assert torch.equal(got[:, :, 384:640], t[:, :, 384:640]), n


@pytest.mark.parametrize("backend", backends.ORDER)
def test_merge_of_two_halves(backend):
    p = cases.problem(cases.Case(1, 2, 2, 70, 128, 32, 32, {}), torch.float32, device=device_of(backend))._replace(
        do=None
    )
    q, k, v = p[:3]
    run_or_skip(p, backend)
    half = lambda s: llmfast.attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend=backend)
    o, lse = llmfast.merge_attention(*half(slice(0, 50)), *half(slice(50, None)))
    assert cases.disagreements(p, cases.Result(o, lse, {})) == []
