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
