"""Triton's decode kernel against the reference in float64: lengths, pages, splits, every option, batch invariance."""

import pytest
import torch
from test_attention import DTYPES, device_of, skip, triton_or_skip

import llmfast
from llmfast import cases

OPTIONS = {
    "plain": {},
    "window": dict(window=40),
    "not causal": dict(causal=False),
    "softcap": dict(softcap=3.0),
    "alibi and sinks": dict(
        alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.02]), sinks=torch.tensor([1.0, -2.0, 0.5, 3.0])
    ),
    "mask": dict(mask=torch.rand(3, 1, 2, 1500, generator=torch.Generator().manual_seed(1)) > 0.5),
    "bias": dict(bias=torch.randn(4, 1, 1500, generator=torch.Generator().manual_seed(2))),
}
LENGTHS = (1500, 1, 1030)  # two splits, less than the queries, a second split of a few keys


def cache(dtype=torch.float32, M=1500):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, n, 40, generator=g).mul(1.5).to(dtype) for h, n in ((4, 2), (2, M), (2, M))]


def check_against_float64(name, dtype, backend):
    """What lies beyond a sequence's length holds NaN for the backend."""
    device = device_of(backend)
    q, k, v = (t.to(device) for t in cache(dtype))
    options = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in OPTIONS[name].items()}
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    call = lambda backend, *ts: llmfast.attention_decode(*ts, lengths, **options, return_lse=True, backend=backend)
    (x64, lse64), (math, lse_math) = call("reference", q.double(), k.double(), v.double()), call("reference", q, k, v)
    for b, n in enumerate(LENGTHS):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    o, lse = call(backend, q, k, v)
    assert cases.breaks("o", o, x64, [math], cases.C_FORWARD, o.dtype, by_head=False) == []
    assert cases.breaks("lse", lse, lse64, [lse_math], cases.C_FORWARD, torch.float32, by_head=False) == []


def in_pages(k, v):
    """The caches of three sequences in pages of 15 keys, in disorder, and their page_table."""
    table = torch.randperm(300, generator=torch.Generator().manual_seed(3)).reshape(3, 100).int()
    paged = lambda t: torch.empty(300, 2, 15, 40, dtype=t.dtype).index_put(
        (table.long().flatten(),), t.cpu().unflatten(2, (100, 15)).transpose(1, 2).flatten(0, 1)
    )
    return *(paged(t).to(t.device) for t in (k, v)), table.to(k.device)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_agrees_with_float64(name, dtype, backend):
    if backend == "triton":
        triton_or_skip()
    try:
        check_against_float64(name, DTYPES[dtype], backend)
    except NotImplementedError as reason:
        skip(reason, backend)


def test_pages_and_neighbours_change_no_bit():
    triton_or_skip()
    device = device_of("triton")
    q, k, v = (t.to(device) for t in cache())
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    o = llmfast.attention_decode(q, k, v, lengths, backend="triton")
    for b in range(3):
        one = llmfast.attention_decode(*(t[b : b + 1] for t in (q, k, v)), lengths[b : b + 1], backend="triton")
        assert torch.equal(o[b : b + 1], one)
    *pages, table = in_pages(k, v)
    assert torch.equal(o, llmfast.attention_decode(q, *pages, lengths, page_table=table, backend="triton"))


def test_many_queries_of_a_large_group():
    """More rows than one tile holds, and a call that has no cache lengths."""
    triton_or_skip()
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, n, 24, generator=g, device="cpu").to(device_of("triton"))
        for h, n in ((10, 13), (1, 90), (1, 90))
    )
    got = llmfast.attention(q, k, v, causal=True, backend="triton")
    torch.testing.assert_close(got, llmfast.attention(q, k, v, causal=True, backend="reference"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("H", "Hk", "Nq", "M", "D", "Dv", "dtype"),
    [(4, 2, 2, 300, 310, 99, "fp32"), (2, 1, 3, 300, 99, 310, "bf16"), (8, 1, 16, 300, 64, 64, "bf16")],
)
def test_wide_heads_and_many_rows_in_a_window(H, Hk, Nq, M, D, Dv, dtype):
    """Head dims beyond 256, more than 64 rows; keys left of the window's first tile and past the length hold NaN."""
    triton_or_skip()
    g, device, end = torch.Generator().manual_seed(0), device_of("triton"), M - 7
    q, k, v = (
        torch.randn(1, h, n, d, generator=g).to(DTYPES[dtype]).to(device)
        for h, n, d in ((H, Nq, D), (Hk, M, D), (Hk, M, Dv))
    )
    lengths = torch.tensor([end], dtype=torch.int32, device=device)
    call = lambda backend, *ts: llmfast.attention_decode(*ts, lengths, window=100, return_lse=True, backend=backend)
    (x64, lse64), (math, lse_math) = call("reference", q.double(), k.double(), v.double()), call("reference", q, k, v)
    for t in (k, v):
        t[:, :, end:], t[:, :, : end - 100 - Nq - 64] = float("nan"), float("nan")
    o, lse = call("triton", q, k, v)
    assert cases.breaks("o", o, x64, [math], cases.C_FORWARD, o.dtype, by_head=False) == []
    assert cases.breaks("lse", lse, lse64, [lse_math], cases.C_FORWARD, torch.float32, by_head=False) == []
