"""flash-attn's functions against their definition, written out in float64."""

import pytest
import torch

import llmfast
from llmfast import flash_attn as fa

B, NQ, NK, H, HK, D = 2, 7, 11, 4, 2, 16
OPTIONS = [
    {}, dict(causal=True), dict(window_size=(3, 1)), dict(causal=True, window_size=(2, 5)), dict(window_size=(-1, 0)),
    dict(softcap=2.0), dict(softmax_scale=0.5), dict(alibi_slopes=torch.linspace(0.1, 0.5, H)),
    dict(alibi_slopes=torch.rand(B, H), causal=True), dict(deterministic=True, causal=True),
]  # fmt: skip


def definition(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, **_):
    """o (B, Nq, H, D) and lse (B, H, Nq) in float64; differentiable."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(s.shape[3]) - torch.arange(s.shape[2])[:, None] - (s.shape[3] - s.shape[2])
    if alibi_slopes is not None:
        s = s - alibi_slopes.double().reshape(-1, q.shape[1], 1, 1) * distance.abs()
    left, right = window_size
    hidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden | ((distance < -left) if left >= 0 else hidden) | ((distance > right) if right >= 0 else hidden)
    s = s.masked_fill(hidden, float("-inf"))
    p = s.softmax(-1).masked_fill(hidden.all(-1)[:, None], 0.0)
    return (p @ v).transpose(1, 2), s.logsumexp(-1)


def tensors(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes]


def same_gradients(got, want, leaves):
    do = torch.randn(got.shape, generator=torch.Generator().manual_seed(9))
    for a, b in zip(torch.autograd.grad(got, leaves, do), torch.autograd.grad(want, leaves, do.double()), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense(options):
    q, k, v = leaves = tensors((B, NQ, H, D), (B, NK, HK, D), (B, NK, HK, D))
    o, lse, dmask = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    want, want_lse = definition(q, k, v, **options)
    close(o, want)
    close(lse, want_lse)
    assert dmask is None
    assert o.is_contiguous()
    same_gradients(fa.flash_attn_func(q, k, v, **options), want, leaves)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed(options):
    q, kv = leaves = tensors((B, NQ, H, D), (B, NK, 2, HK, D))
    same_gradients(
        fa.flash_attn_kvpacked_func(q, kv, **options), definition(q, kv[:, :, 0], kv[:, :, 1], **options)[0], leaves
    )
    (qkv,) = leaves = tensors((B, NQ, 3, H, D))
    o, want = fa.flash_attn_qkvpacked_func(qkv, **options), definition(*qkv.unbind(2), **options)[0]
    close(o, want)
    same_gradients(o, want, leaves)


LENGTHS_Q, LENGTHS_K = (3, 0, 5), (6, 2, 5)
CU_Q, CU_K = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (LENGTHS_Q, LENGTHS_K))


def each_sequence(q, k, v, cu_q, cu_k, **options):
    slopes = options.pop("alibi_slopes", None)
    parts = []
    for b in range(cu_q.shape[0] - 1):
        one = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        parts.append(definition(q[None, rows], k[None, keys], v[None, keys], alibi_slopes=one, **options))
    return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("alibi_slopes", torch.ones(1)).dim() == 1], ids=str)
def test_varlen(options):
    q, k, v = leaves = tensors((8, H, D), (13, HK, D), (13, HK, D))
    o, lse, _ = fa.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 6, **options, return_attn_probs=True)
    want, want_lse = each_sequence(q, k, v, CU_Q, CU_K, **options)
    close(o, want)
    close(lse, want_lse)
    same_gradients(o, want, leaves)
    kv = torch.stack([k, v], 1)
    assert torch.equal(fa.flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 5, 6, **options), o)
    (qkv,) = leaves = tensors((8, 3, H, D))
    o = fa.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 5, **options)
    want, _ = each_sequence(*qkv.unbind(1), CU_Q, CU_Q, **options)
    close(o, want)
    same_gradients(o, want, leaves)


def test_varlen_pages():
    q, k, v = (t.detach() for t in tensors((8, H, D), (13, HK, D), (13, HK, D)))
    table = torch.tensor([[4, 1], [0, 0], [3, 5]], dtype=torch.int32)
    pages = torch.full((2, 6, 4, HK, D), float("nan"))
    for b, n in enumerate(LENGTHS_K):
        for j in range(n):
            for where, x in zip(pages, (k, v), strict=True):
                where[table[b, j // 4], j % 4] = x[CU_K[b] + j]
    got = fa.flash_attn_varlen_func(q, *pages, CU_Q, CU_K, 5, 6, causal=True, block_table=table)
    assert torch.equal(got, fa.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 6, causal=True))


def test_dropout():
    q, k, v = tensors((B, NQ, H, D), (B, NK, HK, D), (B, NK, HK, D))
    torch.manual_seed(0)
    first = fa.flash_attn_func(q, k, v, 0.3)
    torch.manual_seed(0)
    assert torch.equal(first, fa.flash_attn_func(q, k, v, 0.3))
    assert not torch.equal(first, fa.flash_attn_func(q, k, v))
    first.sum().backward()


def rotate(x, positions, cos, sin, interleaved):
    """One pair at a time, as the definition has it: x (N, H, D) at positions (N,)."""
    y, half = x.clone(), cos.shape[1]
    for n, at in enumerate(positions.tolist()):
        for r in range(half):
            a, b = (2 * r, 2 * r + 1) if interleaved else (r, r + half)
            y[n, :, a] = x[n, :, a] * cos[at, r] - x[n, :, b] * sin[at, r]
            y[n, :, b] = x[n, :, a] * sin[at, r] + x[n, :, b] * cos[at, r]
    return y


@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("layout", ["rows", "indexed", "leftpad", "pages"])
@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(causal=True, window_size=(3, 0)), dict(softcap=3.0)], ids=str
)
def test_kvcache(options, layout, rotary):
    """New keys go into the cache in place; what lies behind them is NaN and never read."""
    rows, M, new, lengths = 3, 16, 2, torch.tensor([5, 9], dtype=torch.int32)
    q, k, v, old_k, old_v = (
        t.detach() for t in tensors((B, new, H, D), (B, new, HK, D), (B, new, HK, D), (B, M, HK, D), (B, M, HK, D))
    )
    given, start = dict(cache_seqlens=lengths), torch.zeros(B, dtype=torch.int32)
    index = torch.tensor([2, 0]) if layout == "indexed" else torch.arange(B)
    cache = torch.full((2, rows, M, HK, D), float("nan"))
    for b in range(B):
        cache[0, index[b], : lengths[b]], cache[1, index[b], : lengths[b]] = (
            old_k[b, : lengths[b]],
            old_v[b, : lengths[b]],
        )
    if layout == "indexed":
        given["cache_batch_idx"] = index.to(torch.int32)
    if layout == "leftpad":
        given["cache_leftpad"] = start = torch.tensor([1, 3], dtype=torch.int32)
    if layout == "pages":
        given["block_table"] = table = torch.tensor([[7, 1, 4, 9], [0, 8, 3, 2]], dtype=torch.int32)
        paged = torch.full((2, 10, 4, HK, D), float("nan"))
        paged[:, table.long()] = cache[:, :B].unflatten(2, (4, 4))
        cache = paged
    angles = torch.rand(M, 4) * 3
    cos, sin = angles.cos(), angles.sin()
    if rotary:
        given |= dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=rotary == "interleaved")
    o, lse = fa.flash_attn_with_kvcache(q, *cache, k, v, **given, **options, num_splits=4, return_softmax_lse=True)
    read = cache[:, table.long()].flatten(2, 3) if layout == "pages" else cache[:, index]  # (2, B, M, HK, D)
    for b in range(B):
        n = lengths[b]
        at = n + torch.arange(new)
        mine_q, mine_k = q[b], k[b]
        if rotary:
            moving = bool(options.get("causal"))
            mine_q = rotate(mine_q, at if moving else n.expand(new), cos, sin, rotary == "interleaved")
            mine_k = rotate(mine_k, at, cos, sin, rotary == "interleaved")
        keys, values = torch.cat([old_k[b, :n], mine_k]), torch.cat([old_v[b, :n], v[b]])
        torch.testing.assert_close(read[0, b, : n + new], keys, atol=1e-6, rtol=1e-5)
        assert torch.equal(read[1, b, : n + new], values)
        want, want_lse = definition(mine_q[None], keys[None, start[b] :], values[None, start[b] :], **options)
        close(o[b], want[0])
        close(lse[b], want_lse[0])


def test_kvcache_without_new_keys():
    q, k, v = tensors((B, 1, H, D), (B, NK, HK, D), (B, NK, HK, D))
    close(fa.flash_attn_with_kvcache(q, k, v), definition(q, k, v)[0])
    close(fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=6), definition(q, k[:, :6], v[:, :6])[0])
    assert not fa.flash_attn_with_kvcache(q, k, v).requires_grad


def test_refuses():
    q = torch.randn(B, 3, H, D)
    table, cos = torch.zeros(B, 2, dtype=torch.int32), torch.ones(4, 4)
    bad = [
        (lambda: fa.flash_attn_qkvpacked_func(q), "qkv: expected 5 dimensions"),
        (lambda: fa.flash_attn_kvpacked_func(q, q[:, :, None]), "kv: expected 5 dimensions"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, q), "k, v: give both"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, q, q), "cache_seqlens: says where"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=-1), "cache_seqlens: expected a number"),
        (
            lambda: fa.flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=table[0, :1].expand(7)),
            "cache_seqlens: expected shape",
        ),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, rotary_cos=cos, rotary_sin=cos), "rotary_cos: needs k and v"),
        (
            lambda: fa.flash_attn_with_kvcache(q, q, q, block_table=table, cache_leftpad=table[:, 0]),
            "block_table: a paged cache",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_refuses_before_it_writes():
    q, cache, new = torch.randn(B, 1, H, D), torch.zeros(B, 8, H, D), torch.ones(B, 1, H, D)
    with pytest.raises(TypeError, match="cache_seqlens: expected int32"):
        fa.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=torch.zeros(B, dtype=torch.int64))
    assert not cache.any()


def test_a_row_that_sees_nothing():
    q, k = torch.randn(1, 5, H, D), torch.randn(1, 3, H, D)
    o, lse, _ = llmfast.flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (o[:, :2] == 0).all()
    assert (lse[:, :, :2] == float("-inf")).all()
