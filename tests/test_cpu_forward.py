"""The CPU forward and decode kernels beyond the case table: every instruction set, threads, lengths, pages."""

import os
import subprocess
import sys

import pytest
import torch

import llmfast
from llmfast import cases
from llmfast.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
ISAS = cpu.details().get("instruction sets", "").split()
ROWS = (
    "one key",
    "ragged",
    "odd wide head",
    "causal fewer keys",
    "window pair",
    "mask",
    "softcap",
    "dropout",
    "everything",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Nq", [1, 40])
@pytest.mark.parametrize("H", [1, 4, 8])
def test_without_head_dim_all_keys_count_alike(H, Nq, dtype):
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, H, Nq, 0), torch.zeros(1, 1, 70, 0), torch.randn(1, 1, 70, 200)
    o = llmfast.attention(q.to(dtype), k.to(dtype), v.to(dtype), scale=1.0, backend="cpu").float()
    mean = v.to(dtype).float().mean(2, keepdim=True).expand(1, H, Nq, 200)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(o, mean, atol=4 * eps, rtol=eps)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = (
        "import torch\nfrom llmfast import cases\n"
        f"for name in {ROWS}:\n"
        "  for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    p = cases.problem(cases.CASES[name], dtype)._replace(do=None, dlse=None)\n"
        "    found = cases.disagreements(p, cases.run(p, 'cpu'))\n"
        "    assert not found, (name, dtype, found)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LLMFAST_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_decode_without_pages_has_no_keys(backend):
    pages, table = torch.randn(0, 4, 16, 64), torch.zeros(1, 4, dtype=torch.int32)
    lengths = torch.tensor([64], dtype=torch.int32)
    o, lse = llmfast.attention_decode(
        torch.randn(1, 4, 1, 64), pages, pages, lengths, page_table=table, return_lse=True, backend=backend
    )
    assert not o.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("H", "Hk", "Nq"), [(8, 1, 1), (6, 2, 3), (4, 4, 16), (12, 2, 1)])
@pytest.mark.parametrize("paged", [False, True], ids=["whole", "pages"])
def test_decode_sees_only_its_keys(dtype, H, Hk, Nq, paged):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    B, M, D, Dv, page = 3, 1152, 72, 40, 64
    lengths = torch.tensor([1150, 0, 517], dtype=torch.int32)
    q, k, v = rand(B, H, Nq, D), rand(B, Hk, M, D), rand(B, Hk, M, Dv)
    wide = [t.double() for t in (q, k, v)]
    o64, _ = llmfast.attention_decode(*wide, lengths, backend="reference", return_lse=True)
    want, want_lse = llmfast.attention_decode(q, k, v, lengths, return_lse=True, backend="reference")
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    table = None
    if paged:
        order = torch.randperm(B * M // page, generator=g)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        table = place.view(B, M // page).int()
        cut = lambda t: t.view(B, Hk, M // page, page, -1).transpose(1, 2).flatten(0, 1)[order].contiguous()
        k, v = cut(k), cut(v)
    o, lse = llmfast.attention_decode(q, k, v, lengths, page_table=table, return_lse=True, backend="cpu")
    assert cases.breaks("o", o, o64, [want], cases.C_FORWARD, dtype, by_head=False) == []
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("Nq", [2, 300])
def test_bits_do_not_depend_on_threads(Nq):
    p = cases.problem(cases.Case(2, 4, 2, Nq, 1500, 64, 64, dict(causal=True)), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(llmfast.attention(p.q, p.k, p.v, causal=True, return_lse=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(lse, results[0][1])


def _rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _short_calls(dtype):
    """name: a call that goes to the kernel directly; with backend="cpu" it takes the long way."""
    q, k = _rand(2, 5, 4, 24, dtype=dtype).transpose(1, 2), _rand(2, 2, 7, 24, dtype=dtype)  # B2 H4 Nq5, Hk2 Nk7
    packed, cu = _rand(9, 4, 24, dtype=dtype), torch.tensor([0, 3, 8], dtype=torch.int32)
    lengths, keep = torch.tensor([7, 3], dtype=torch.int32), _rand(5, 7) > 0
    attend = lambda **given: lambda **kw: llmfast.attention(q, k, k.flip(2), **given, **kw)
    decode = lambda **given: lambda **kw: llmfast.attention_decode(q, k, k.flip(2), lengths, **given, **kw)
    softmax = lambda x, **given: lambda **kw: llmfast.softmax(x, **given, **kw)
    return {
        "mask (Nq, Nk)": attend(mask=keep),
        "mask (H, 1, Nk), causal": attend(mask=_rand(4, 1, 7) > 0, causal=True, scale=-0.3),
        "bias (B, 1, Nq, Nk), top-left": attend(bias=_rand(2, 1, 5, 7), causal="top_left"),
        "bias and mask": attend(bias=_rand(1).to(torch.bfloat16), mask=keep.t().contiguous().t()),
        "decode": decode(),
        "decode, not causal, mask": decode(causal=False, mask=keep),
        "varlen": lambda **kw: llmfast.attention_varlen(packed, packed[:, :2], packed[:, 2:], cu, cu, **kw),
        "varlen causal": lambda **kw: llmfast.attention_varlen(*(packed,) * 3, cu, cu, causal=True, scale=2.0, **kw),
        "softmax (N,)": softmax(_rand(37, dtype=dtype)),
        "softmax (M, N)": softmax(_rand(5, 37, dtype=dtype), scale=-2.0, dim=1),
        "softmax of rows apart": softmax(_rand(5, 3, 64, dtype=dtype)[:, 1:, :37]),
        "log_softmax": lambda **kw: llmfast.log_softmax(_rand(2, 3, 4, 5, dtype=dtype), **kw),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", _short_calls(torch.float32))
def test_the_short_way_gives_the_same_bits(name, dtype, monkeypatch):
    call = _short_calls(dtype)[name]
    want = call(backend="cpu")
    for operation in ("attention", "softmax"):
        monkeypatch.setattr(llmfast.ops, operation, lambda *_: pytest.fail("took the long way"))
    got = call()
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert got.dtype == dtype
