"""linear for few rows: every dtype and instruction set against float64, odd sizes, strides, batch-invariant bits."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import llmfast
from llmfast import cases
from llmfast.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
ISAS = cpu.details().get("instruction sets", "").split()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (1, 5, 33), (2, 17, 64), (3, 40, 1025), (7, 100, 59), (8, 64, 3072), (13, 33, 2000), (16, 19, 80)]


def problem(M, V, D, dtype, bias=True):
    g = torch.Generator().manual_seed(M + V + D)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    return rand(M, D), rand(V, D), rand(V) if bias else None


def disagreements(x, weight, bias, y):
    wide = lambda t: None if t is None else t.double()
    truth = F.linear(wide(x), wide(weight), wide(bias))
    yards = [F.linear(x, weight, bias), llmfast.linear(x, weight, bias, backend="reference")]
    return cases.breaks("y", y, truth, yards, cases.C_FORWARD, x.dtype, by_head=False)


@pytest.mark.parametrize("isa", [*ISAS[:1], *(pytest.param(isa, marks=pytest.mark.long) for isa in ISAS[1:])])
def test_every_instruction_set(isa):
    code = (
        "from tests.test_linear import DTYPES, SIZES, disagreements, problem\nimport llmfast\n"
        "for size in SIZES:\n"
        "  for dtype in DTYPES:\n"
        "    for bias in (False, True):\n"
        "      p = problem(*size, dtype, bias)\n"
        "      found = disagreements(*p, llmfast.linear(*p, backend='cpu'))\n"
        "      assert not found, (size, dtype, bias, found)\n"
    )
    env = {**os.environ, "LLMFAST_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_bits_depend_on_the_row_alone(dtype):
    x, weight, bias = problem(16, 700, 1500, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.cat([llmfast.linear(x[i : i + 1], weight, bias, backend="cpu") for i in range(16)])
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for M in (2, 3, 7, 8, 13, 16):
                assert torch.equal(llmfast.linear(x[:M], weight, bias, backend="cpu"), one[:M])
    finally:
        torch.set_num_threads(before)


def test_one_step_gives_the_long_way_s_bits():
    x, weight, bias = problem(6, 40, 70, torch.float32)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    wide = torch.zeros(6, 80)
    wide[:, :70] = x
    for one in (x, x[0], x.view(2, 3, 70), x.view(2, 1, 3, 70), x[:1].expand(6, 70), wide[:, :70], wide[::2, :70]):
        for b in (None, bias, bias.repeat_interleave(2)[::2]):
            y = cpu.linear_fast(one, parameter, b)
            assert torch.equal(y, llmfast.linear(one, weight, b, backend="cpu"))
    for other in (
        (x.T.contiguous().T, weight, bias),
        (x.view(2, 3, 70).transpose(0, 1), weight, bias),
        (x.double(), weight.double(), bias.double()),
        (x.repeat(3, 1), weight, bias),
        (x[:0], weight, bias),
        (x, weight[:0], bias[:0]),
        (x[:, :0], weight[:, :0], bias),
        (x[:, :1].expand(6, 70), weight, bias),
        (x, weight[:, :1].expand(40, 70), bias),
        (x, weight, bias.bfloat16()),
        (x, weight, bias[:39]),
        (x, weight[:, :69], bias),
        (x, weight.clone().requires_grad_(), bias),
        (x.tolist(), weight, bias),
    ):
        assert cpu.linear_fast(*other) is None


def test_one_number_for_a_whole_row():
    x, weight, bias = problem(6, 40, 70, torch.float32)
    for a, b in ((x[:, :1].expand(6, 70), weight), (x, weight[:, :1].expand(40, 70))):
        torch.testing.assert_close(llmfast.linear(a, b, bias), torch.nn.functional.linear(a, b, bias))


def test_strides_and_leading_dimensions():
    x, weight, bias = problem(6, 40, 70, torch.float32)
    want = llmfast.linear(x, weight, bias)
    shaped = llmfast.linear(x.view(2, 1, 3, 70), weight, bias)
    assert torch.equal(shaped.view(6, 40), want)
    assert torch.equal(llmfast.linear(x[2], weight, bias), want[2])
    assert torch.equal(llmfast.linear(x.T.contiguous().T, weight.T.contiguous().T, bias), want)
    padded = torch.full((40, 141), float("nan"))
    padded[:, 3:73] = weight
    assert torch.equal(llmfast.linear(x, padded[:, 3:73], bias.repeat_interleave(2)[::2]), want)
    repeated = llmfast.linear(x[:1].expand(4, 70), weight, bias)
    assert torch.equal(repeated, want[:1].expand(4, 40))


@pytest.mark.parametrize(("M", "V", "D"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty(M, V, D):
    x, weight, bias = problem(M, V, D, torch.float32)
    torch.testing.assert_close(llmfast.linear(x, weight, bias, backend="cpu"), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_nan_and_inf_stay_in_their_row_and_column(dtype):
    x, weight, bias = problem(5, 20, 45, dtype)
    clean = llmfast.linear(x, weight, bias)
    x[3, 44], weight[19, 0] = float("nan"), float("inf")
    y = llmfast.linear(x, weight, bias)
    assert y[3].isnan().all()
    assert not y[[0, 1, 2, 4], 19].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 4], :19], clean[[0, 1, 2, 4], :19])


def test_what_goes_to_pytorch():
    x, weight, bias = problem(17, 8, 9, torch.float32)
    assert torch.equal(llmfast.linear(x, weight, bias), F.linear(x, weight, bias))
    leaf = weight.clone().requires_grad_()
    g = torch.autograd.grad(llmfast.linear(x[:2], leaf, bias).sum(), leaf)[0]
    torch.testing.assert_close(g, x[:2].sum(0).expand(8, 9))
    found = llmfast.explain(llmfast.linear, x, weight)
    assert "torch.nn.functional.linear" in str(found)
    assert llmfast.explain(llmfast.linear, x[:16], weight).chosen == "cpu"
    with pytest.raises(NotImplementedError, match="17 rows are more than 16"):
        llmfast.linear(x, weight, backend="cpu")
    torch.testing.assert_close(
        torch.vmap(lambda row: llmfast.linear(row, weight))(x), F.linear(x, weight), rtol=1e-4, atol=1e-5
    )


def test_compiles():
    torch._dynamo.reset()
    x, weight, bias = problem(4, 30, 50, torch.bfloat16)
    fn = torch.compile(lambda x: llmfast.linear(x[:, None], weight, bias), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(fn(x), llmfast.linear(x[:, None], weight, bias))
    torch.library.opcheck(torch.ops.llmfast.linear.default, (x, weight, bias, -1))


def test_errors():
    x, weight, bias = problem(2, 5, 7, torch.float32)
    with pytest.raises(ValueError, match="weight: expected \\(V, 7\\)"):
        llmfast.linear(x, weight[:, :6])
    with pytest.raises(ValueError, match="bias: expected \\(5,\\)"):
        llmfast.linear(x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"weight: expected torch\.float32"):
        llmfast.linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        llmfast.linear(x.int(), weight)
