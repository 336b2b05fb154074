"""The CPU kernels for NEON: compiled for aarch64 and run under qemu on the case table, each call between guard pages.

The short tier compiles with -O2, which fuses multiply and add but takes half the time, and runs a seeded sample; the
long one runs every row, on what setup.py compiles too.
"""

import random

import jobs
import neon
import pytest
import test_cpu_forward
import test_cross_entropy
import test_linear
import test_softmax as test_softmax_of
import torch
from test_attention import DTYPES

import llmfast
from llmfast import cases
from llmfast.backends import cpu

if lacking := neon.lacking():  # of the whole module, so that no job begins
    pytest.skip(lacking, allow_module_level=True)


def on(level, *marks):
    return pytest.param(level, marks=[*marks, jobs.job(neon.driver, level)])


@pytest.fixture(scope="module", params=[on("O2"), on("O3", pytest.mark.long)])
def library(request):
    jobs.result(neon.driver, request.param)
    library = neon.Library(request.param)
    yield library
    library.child.stdin.close()
    assert library.child.wait() == 0


@pytest.fixture
def on_neon(library, monkeypatch):
    """The cpu backend runs on NEON."""
    monkeypatch.setattr(cpu, "_cpu", library)


def rows(table, dtypes, share):
    """A seeded sample of a table in the short tier, the rest in the long one."""
    draw = random.Random(0)
    for name in table:
        for dtype in dtypes:
            marks = [] if draw.random() < share else pytest.mark.long
            yield pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}")


@pytest.mark.parametrize(("name", "dtype"), list(rows(cases.CASES, DTYPES, 0.12)))
def test_attention(on_neon, name, dtype):
    p = cases.problem(cases.CASES[name], DTYPES[dtype])
    assert cases.disagreements(p, cases.run(p, "cpu")) == []


@pytest.mark.parametrize(
    ("heads", "dtype"), list(rows([(8, 1, 1), (6, 2, 3), (4, 4, 7), (12, 2, 1)], ["fp32", "bf16", "fp16"], 0.3))
)
def test_decode(on_neon, heads, dtype):
    for paged in (False, True):
        test_cpu_forward.test_decode_sees_only_its_keys(DTYPES[dtype], *heads, paged)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_number_of_16_bits_is_read_and_written(on_neon, dtype):
    """A query that sees one key gets its value, NaN and denormal numbers included."""
    v = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype]).view(1024, 1, 1, 64)
    for training in (False, True):  # decode, and the kernel of many queries
        q = torch.zeros(1024, 1, 1, 8, dtype=v.dtype, requires_grad=training)
        torch.testing.assert_close(llmfast.attention(q, q, v, backend="cpu"), v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), list(rows(cases.SOFTMAX_CASES, DTYPES, 0.2)))
def test_softmax(on_neon, name, dtype):
    test_softmax_of.test_agrees_with_float64(name, dtype, "cpu")


def test_nan_stays_in_its_row(on_neon):
    test_softmax_of.test_rows_of_infinities_and_nan("cpu")
    x = torch.randn(3, 9001)
    x[1, 5000] = float("nan")
    for log in (llmfast.softmax, llmfast.log_softmax):
        assert log(x, backend="cpu").isnan().any(1).tolist() == [False, True, False]
    q = torch.randn(1, 1, 20, 8)
    q[0, 0, 3, 0] = float("nan")
    for n in (5, 20):
        assert llmfast.attention(q[:, :, :n], q[:, :, 4:], q[:, :, 4:], backend="cpu").isnan().sum() == 8


SHAPES = [(1, 2), (7, 5), (33, 517), (5, 5003)]


@pytest.mark.parametrize(("name", "dtype"), list(rows(test_cross_entropy.OPTIONS, DTYPES, 0.3)))
def test_cross_entropy_agrees(on_neon, name, dtype):
    for shape in SHAPES:
        test_cross_entropy.test_agrees_with_float64(shape, name, dtype, "cpu")


@pytest.mark.parametrize("size", test_linear.SIZES, ids=str)
def test_linear_agrees(on_neon, size):
    for dtype in test_linear.DTYPES:
        p = test_linear.problem(*size, dtype)
        assert test_linear.disagreements(*p, llmfast.linear(*p, backend="cpu")) == []


def test_bits_do_not_depend_on_threads(on_neon):
    test_cpu_forward.test_bits_do_not_depend_on_threads(2)


def test_setup_builds_neon_alone(library):
    text = (neon.folder("O3") / "build.ninja").read_text()
    assert "neon.cpp" in text
    assert "baseline" not in text
    assert "-mavx" not in text
    assert library.supported() == "neon"


@pytest.mark.long
@jobs.job(neon.compiled, "O3")
def test_the_whole_extension_compiles_and_links():
    """Without a warning, for the machine that the ELF header names: 183 is aarch64."""
    jobs.result(neon.compiled, "O3")
    (built,) = (neon.BUILD / "O3" / "llmfast").glob("_cpu*.so")
    assert int.from_bytes(built.read_bytes()[18:20], "little") == 183
