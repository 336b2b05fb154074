"""The public functions: their arguments become an AttentionSpec and Extras, nothing else happens here."""

import math

import torch
from torch import Tensor

from . import arguments, ops
from .backends import cpu, reference
from .spec import (
    NO_CROSS_ENTROPY_EXTRAS,
    NO_EXTRAS,
    NO_SOFTMAX_EXTRAS,
    OPEN,
    AttentionSpec,
    CrossEntropyExtras,
    CrossEntropySpec,
    Extras,
    SoftmaxExtras,
    SoftmaxSpec,
)

_compiling = ops.compiling


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, window: int | tuple[int, int] | None = None,
    scale: float | None = None, softcap: float = 0.0, mask: Tensor | None = None, bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """o = softmax(q k^T * scale) v, fused (FlashAttention-2, arXiv 2307.08691).

    Args:
        q: (B, H, Nq, D); float32, bfloat16, float16 or float64, any strides. On a GPU float32 is multiplied in tf32
            where torch.backends.cuda.matmul.fp32_precision says so.
        k, v: (B, Hk, Nk, D) and (B, Hk, Nk, Dv), Hk dividing H; q's dtype and device.
        causal: True aligns the diagonal bottom-right (the last query sees every key), "top_left" as PyTorch does.
        window: w sees w keys up to the diagonal with causal, |j - i| < w without; a pair is flash-attn's (left, right),
            -1 open. Positions count from the bottom-right diagonal (the top-left one with causal="top_left").
        scale: multiplies q k^T; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(scores / softcap); 0 turns it off.
        mask: bool, broadcasts to (B, H, Nq, Nk); True = may attend.
        bias: float, broadcasts to (B, H, Nq, Nk); added to the scores, -inf hides; differentiable.
        alibi_slopes: (H,) or (B, H) float32; adds -slope * |i + Nk - Nq - j|.
        sinks: (H,); one more logit in each row's denominator; differentiable.
        dropout_p: in [0, 1]; Philox-4x32-10, the same elements on every backend.
        seed: int or () int64 tensor; drawn from torch's generator on q's device by default.
        return_lse: also return lse.
        backend: one of llmfast.backends.ORDER; it runs there or raises.

    Returns:
        o (B, H, Nq, Dv) in q's dtype, its dimensions in memory in q's order; with return_lse also lse (B, H, Nq), the
        natural log of each row's denominator, float32 (float64 for float64), differentiable. A row that sees no key
        gives o = 0, lse = -inf and zero gradients. Hidden keys may hold anything finite; a NaN or inf in v may
        spoil rows that don't see it, as 0 * NaN is NaN.

    Raises:
        TypeError, ValueError: a wrong type; shapes, dtypes, devices or options that contradict each other.
        NotImplementedError: the named backend can't do this case; the message says why.

    >>> q, k, v = (torch.randn(1, 8, 1024, 64) for _ in range(3))
    >>> o = llmfast.attention(q, k, v, causal=True, window=256)
    """
    common = alibi_slopes is None and sinks is None and backend is None and not return_lse
    if common and dropout_p == 0.0 and not _compiling():
        o = cpu.attention_fast(q, k, v, causal, scale, True, window, softcap, mask, bias, None, None, None)
        if o is not None:
            return o
    q, k, v, bias = arguments.autocast(q, k, v, bias)
    H, Nq, Nk = arguments.qkv(q, k, v)
    left, right = OPEN, OPEN
    if causal is not False or window is not None:
        left, right = arguments.band(causal, window, Nq, Nk)
    spec = AttentionSpec(
        arguments.scale_or_default(scale, q), left, right, *arguments.softcap_and_dropout(softcap, dropout_p)
    )
    extras = NO_EXTRAS
    if mask is not None or bias is not None or alibi_slopes is not None or sinks is not None or dropout_p:
        shape = (q.shape[0], H, Nq, Nk)
        extras = Extras(
            mask=arguments.mask_of(mask, shape, q),
            bias=arguments.bias_of(bias, shape, q),
            alibi_slopes=arguments.slopes_of(alibi_slopes, q.shape[0], q),
            sinks=arguments.sinks_of(sinks, q),
            seed=arguments.seed_of(seed, dropout_p, q),
        )
    o, lse = ops.attention(q, k, v, spec, extras, backend, return_lse)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention, the same meaning: causal is top-left, any leading dimensions.

    Args:
        query: (..., H, Nq, D) or (N, Nq, D) or (Nq, D); key and value likewise, leading dimensions broadcast.
        attn_mask: bool (True = may attend) or float (added), broadcasts to (..., Nq, Nk).
        enable_gqa: key and value may have fewer heads, a divisor of query's.

    Raises:
        ValueError: attn_mask together with is_causal, mismatched shapes or dtypes.

    >>> o = llmfast.scaled_dot_product_attention(q, k, v, is_causal=True)
    """
    mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask: give attn_mask or is_causal, not both")
        if arguments.tensor(attn_mask, "attn_mask").dtype is torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    if dropout_p == 0.0 and not _compiling():
        causal = "top_left" if is_causal else False
        o = cpu.attention_fast(query, key, value, causal, scale, enable_gqa, None, 0.0, mask, bias, None, None, None)
        if o is not None:
            return o
    alike = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
    if not alike or key.shape[1] != value.shape[1] or not (enable_gqa or key.shape[1] in (1, query.shape[1])):
        return _any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return attention(
        query,
        key,
        value,
        causal="top_left" if is_causal else False,
        scale=scale,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
    )


def _any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Brings inputs of any rank, or with broadcast leading dimensions or heads, to four dimensions and back."""
    rank = max(query.dim(), key.dim(), value.dim())
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions (..., N, D), got shape {tuple(t.shape)}")
    full = lambda t: t[(None,) * (max(rank, 4) - t.dim())]
    batched = rank == 3 and not enable_gqa  # of GQA the third dimension from the end is heads
    if batched:
        full = lambda t: t[(None,) * (3 - t.dim())].unsqueeze(1)
    q, k, v = _heads(full(query), full(key), full(value), enable_gqa)
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    flat = lambda t: t.expand(*lead, *t.shape[-3:]).reshape(math.prod(lead), *t.shape[-3:])
    mask = attn_mask
    if mask is not None and rank != 4 and mask.dim() > 2:
        mask = flat(full(mask))
    o = scaled_dot_product_attention(flat(q), flat(k), flat(v), mask, dropout_p, is_causal, scale, enable_gqa)
    o = o.reshape(*lead, *o.shape[-3:])
    return o.squeeze(1) if batched else o.reshape(o.shape[-rank:]) if rank < 4 else o


def _heads(q, k, v, enable_gqa):
    """k and v with one number of heads, which attention shares among q's."""
    H, Hk, Hv = (t.shape[-3] for t in (q, k, v))
    if enable_gqa:
        if Hk != Hv and not any(n == 0 or H % n for n in (Hk, Hv)):
            k, v = (t.repeat_interleave(H // t.shape[-3], -3) for t in (k, v))
        return q, k, v
    n = next((n for n in (H, Hk, Hv) if n != 1), 1)
    if any(heads not in (1, n) for heads in (H, Hk, Hv)):
        raise ValueError(
            f"key, value: have {Hk} and {Hv} heads and query {H}; enable_gqa=True shares "
            "each key head among H / Hk queries"
        )
    grow = lambda t: t.expand(*t.shape[:-3], n, *t.shape[-2:])
    return q if n == H else grow(q), *((k, v) if Hk == Hv else (grow(k), grow(v)))


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, causal: bool = False, window: int | tuple[int, int] | None = None,
    scale: float | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over packed sequences: sequence b is rows cu_seqlens_q[b]:cu_seqlens_q[b + 1] of q.

    Args:
        q: (Tq, H, D); k, v: (Tk, Hk, D) and (Tk, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, starting at 0; read by the kernel, never by the host.
        max_seqlen_q, max_seqlen_k: accepted as flash-attn has them; not needed.
        causal: bottom-right in each sequence. The rest as in `attention`.

    Returns:
        o (Tq, H, Dv); with return_lse also lse (H, Tq). Rows that no sequence covers are zero.

    >>> cu = torch.tensor([0, 100, 164], dtype=torch.int32)
    >>> o = llmfast.attention_varlen(q, k, v, cu, cu, causal=True)
    """
    common = alibi_slopes is None and sinks is None and backend is None and not return_lse
    common = common and cu_seqlens_q is not None and (causal is True or causal is False)
    if common and dropout_p == 0.0 and not _compiling():
        o = cpu.attention_fast(
            q, k, v, causal, scale, True, window, softcap, None, None, None, cu_seqlens_q, cu_seqlens_k
        )
        if o is not None:
            return o
    for name, t in (("q", q), ("k", k), ("v", v)):
        if arguments.tensor(t, name).dim() != 3:
            raise ValueError(f"{name}: expected (T, heads, D) of packed sequences, got shape {tuple(t.shape)}")
    if causal == "top_left":
        raise ValueError('causal: "top_left" has no meaning for packed sequences; True aligns each one bottom-right')
    q, k, v, _ = arguments.autocast(q, k, v, None)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, D)
    arguments.qkv(q, k, v)
    arguments.lengths(cu_seqlens_q, "cu_seqlens_q", q)
    arguments.lengths(cu_seqlens_k, "cu_seqlens_k", q, cu_seqlens_q.shape[0])
    extras = Extras(
        alibi_slopes=arguments.slopes_of(alibi_slopes, cu_seqlens_q.shape[0] - 1, q),
        sinks=arguments.sinks_of(sinks, q),
        seed=arguments.seed_of(seed, dropout_p, q),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    spec = AttentionSpec(
        arguments.scale_or_default(scale, q),
        *arguments.band(causal, window, 0, 0),
        *arguments.softcap_and_dropout(softcap, dropout_p),
    )
    o, lse = ops.attention(q, k, v, spec, extras, backend, return_lse)
    o = o[0].transpose(0, 1)
    return (o, lse[0]) if return_lse else o


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens_k: Tensor, *, page_table: Tensor | None = None,
    causal: bool = True, window: int | tuple[int, int] | None = None, scale: float | None = None, softcap: float = 0.0,
    mask: Tensor | None = None, bias: Tensor | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of a few new queries against a key-value cache, without gradient.

    Args:
        q: (B, H, Nq, D), the newest tokens.
        k_cache, v_cache: (B, Hk, M, D), or pages (P, Hk, page, D) with page_table (B, pages) int32.
        seqlens_k: (B,) int32: how many keys count, the new ones included; read by the kernel, never by the host.
        causal: bottom-right: the last query sees seqlens_k keys. mask and bias broadcast to (B, H, Nq, M).

    Returns:
        o (B, H, Nq, Dv); with return_lse also lse (B, H, Nq). Keys from seqlens_k on never influence a result, NaN
        included.

    >>> o = llmfast.attention_decode(q, k_cache, v_cache, torch.tensor([517], dtype=torch.int32))
    """
    common = alibi_slopes is None and sinks is None and page_table is None and backend is None
    common = common and seqlens_k is not None and not return_lse and (causal is True or causal is False)
    if common and not _compiling():
        o = cpu.attention_fast(
            q, k_cache, v_cache, causal, scale, True, window, softcap, mask, bias, seqlens_k, None, None
        )
        if o is not None:
            return o
    if causal == "top_left":
        raise ValueError('causal: "top_left" has no meaning for a cache; True aligns the last query with the last key')
    if ops.needs_grad(q, k_cache, v_cache, bias, sinks):
        raise ValueError("q: attention_decode has no gradient; use attention, or torch.no_grad()")
    q, k, v, bias = arguments.autocast(q, k_cache, v_cache, bias)
    H, Nq, Nk = arguments.qkv(q, k, v, ("q", "k_cache", "v_cache"), paged=page_table is not None)
    B = q.shape[0]
    arguments.lengths(seqlens_k, "seqlens_k", q, B)
    if page_table is not None:
        arguments.tensor(page_table, "page_table")
        if page_table.dim() != 2 or page_table.shape[0] != B or page_table.dtype != torch.int32:
            raise ValueError(f"page_table: expected ({B}, pages) int32, got {arguments.say(page_table)}")
        arguments.same_device(page_table, "page_table", q)
        if k_cache.shape[0] == 0:  # no page to point at: no keys
            page_table = page_table[:, :0]
        Nk *= page_table.shape[1]
    extras = Extras(
        mask=arguments.mask_of(mask, (B, H, Nq, Nk), q),
        bias=arguments.bias_of(bias, (B, H, Nq, Nk), q),
        alibi_slopes=arguments.slopes_of(alibi_slopes, B, q),
        sinks=arguments.sinks_of(sinks, q),
        seqlens_k=seqlens_k,
        page_table=page_table,
    )
    spec = AttentionSpec(
        arguments.scale_or_default(scale, q),
        *arguments.band(causal, window, 0, 0),
        *arguments.softcap_and_dropout(softcap, 0.0),
    )
    o, lse = ops.attention(q, k, v, spec, extras, backend, return_lse)
    return (o, lse) if return_lse else o


def attention_weights(
    q: Tensor, k: Tensor, *, rows: Tensor | list[int] | None = None, top_k: int | None = None,
    causal: bool | str = False, window: int | tuple[int, int] | None = None, scale: float | None = None,
    softcap: float = 0.0, mask: Tensor | None = None, bias: Tensor | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The probabilities of `attention`, for looking at: one head at a time, only the rows asked for.

    Args:
        q: (B, H, Nq, D); k: (B, Hk, Nk, D). The options are attention's.
        rows: query indices to look at; all by default.
        top_k: keep only the largest of each row.

    Returns:
        (B, H, rows, Nk) in float32 or wider, rows summing to 1 (less with sinks, 0 where no key is seen); with top_k
        the pair (values, indices), each (B, H, rows, top_k).

    >>> p = llmfast.attention_weights(q, k, causal=True, rows=[0, 5])
    """
    q, k, _, bias = arguments.autocast(q, k, k, bias)
    H, Nq, Nk = arguments.qkv(q, k, k)
    B = q.shape[0]
    left, right = arguments.band(causal, window, Nq, Nk)
    rows = torch.arange(Nq, device=q.device) if rows is None else torch.as_tensor(rows, device=q.device)
    if (
        rows.dim() != 1
        or rows.dtype not in (torch.int64, torch.int32)
        or (rows.numel() and not (-Nq <= rows.min() and rows.max() < Nq))
    ):
        raise ValueError(f"rows: expected query indices below {Nq}, got {arguments.say(rows)}")
    rows = rows % max(Nq, 1)
    expand = lambda t: None if t is None else t.expand(B, H, Nq, Nk)
    mask, bias = expand(arguments.mask_of(mask, (B, H, Nq, Nk), q)), expand(arguments.bias_of(bias, (B, H, Nq, Nk), q))
    slopes, sinks = arguments.slopes_of(alibi_slopes, B, q), arguments.sinks_of(sinks, q)
    spec = AttentionSpec(arguments.scale_or_default(scale, q), OPEN, OPEN, *arguments.softcap_and_dropout(softcap, 0.0))
    distance = torch.arange(Nk, device=q.device) - rows[:, None] - (Nk - Nq)
    band = (distance >= -left) & (distance <= right)  # (rows, Nk)
    out = []
    for h in range(H):
        one = lambda t, h=h: None if t is None else t[:, h : h + 1, rows]
        b = one(bias)
        if slopes is not None:
            alibi = -slopes[..., h].reshape(-1, 1, 1, 1) * distance.abs()
            b = alibi if b is None else alibi + b
        seen = band if mask is None else band & one(mask)
        extras = Extras(mask=seen, bias=b, sinks=None if sinks is None else sinks[h : h + 1])
        hk = h * k.shape[1] // H
        p = reference.weights(q[:, h : h + 1, rows], k[:, hk : hk + 1], spec, extras)
        out.append(p if top_k is None else p.topk(min(top_k, Nk), -1))
    if top_k is not None:
        return tuple(torch.cat([x[i] for x in out], 1) for i in (0, 1))
    return torch.cat(out, 1)


def merge_attention(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the results over each; differentiable.

    Args:
        o_a, o_b: (..., Nq, Dv); lse_a, lse_b: (..., Nq), as `attention(..., return_lse=True)` gives them. Sinks belong
            to one of the two only.

    >>> o, lse = llmfast.merge_attention(*attention(q, k1, v1, return_lse=True), *attention(q, k2, v2, return_lse=True))
    """
    for name, o, lse in (("o_a", o_a, lse_a), ("o_b", o_b, lse_b)):
        if arguments.tensor(o, name).shape[:-1] != arguments.tensor(lse, f"lse{name[1:]}").shape:
            raise ValueError(f"{name}: expected shape (*{tuple(lse.shape)}, Dv) to match its lse, got {tuple(o.shape)}")
    if o_a.shape != o_b.shape:
        raise ValueError(f"o_b: expected o_a's shape {tuple(o_a.shape)}, got {tuple(o_b.shape)}")
    m = torch.maximum(lse_a, lse_b).detach()
    m = m.masked_fill(m == float("-inf"), 0.0)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    l = a + b
    empty = l == 0
    l = l.masked_fill(empty, 1.0)
    o = (o_a * a[..., None] + o_b * b[..., None]) / l[..., None]
    return o.to(o_a.dtype), (torch.log(l) + m).masked_fill(empty, float("-inf"))


def softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, mask: Tensor | None = None, bias: Tensor | None = None,
    causal: bool | str = False, out: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale * x + bias) over one dimension, hidden entries exactly 0.

    Args:
        x: any shape; float32, bfloat16, float16 or float64. Arithmetic is float32 or wider.
        dim: the dimension that sums to 1.
        mask: bool, broadcasts to x; True = counts.
        bias: float, broadcasts to x; -inf hides; differentiable.
        causal: column j of row i counts when j <= i + N - M (True) or j <= i ("top_left"); the rows are the last of the
            other dimensions.
        out: where to write; may be x itself, but not another part of its memory. Not with a gradient.

    Returns:
        x's shape and dtype. A row with nothing visible, or all -inf, gives zeros (PyTorch: NaN); a NaN spoils its row
        only.

    >>> p = llmfast.softmax(scores, scale=0.125, causal=True)
    """
    return _softmax(x, dim, scale, mask, bias, causal, out, backend, False)


def log_softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, mask: Tensor | None = None, bias: Tensor | None = None,
    causal: bool | str = False, out: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """log(softmax(scale * x + bias)); hidden entries and rows with nothing visible give -inf. Arguments as in
    `softmax`.

    >>> logp = llmfast.log_softmax(logits)
    """
    return _softmax(x, dim, scale, mask, bias, causal, out, backend, True)


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
    inplace_backward: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of logits and class indices; no float32 copy of the logits is made.

    Args:
        logits: (V,), (N, V) or (N, V, d1, ...).
        target: int64 of shape (), (N,) or (N, d1, ...). A target outside [0, V) that isn't ignore_index is an
            IndexError on a CPU; on a GPU or compiled, where the host doesn't read it, that row's loss is NaN.
        weight: (V,), a factor for each class; has no gradient.
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: in [0, 1]; the share of the target's probability spread over all classes.
        z_loss: adds z_loss * lse^2 to each row (PaLM, arXiv 2204.02311).
        softcap: logits become softcap * tanh(logits / softcap).
        reduction: "mean" (over the rows' class weights, as PyTorch), "sum" or "none".
        inplace_backward: the gradient of (N, V) logits is written over them, which saves their memory once more; using
            them again, or a second backward, is an error. Of other shapes it is written over a copy.

    Returns:
        The loss in float32 (float64 for float64 logits), also for half precision; () or target's shape.

    >>> loss = llmfast.cross_entropy(logits, target, label_smoothing=0.1)
    """
    if weight is None and backend is None and not _compiling():
        loss = cpu.cross_entropy_fast(
            logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction, inplace_backward
        )
        if loss is not None:
            return loss
    spec, extras, every = _cross_entropy_problem(
        logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )
    V = logits.shape[0 if logits.dim() == 1 else 1]
    rows = logits[None] if logits.dim() == 1 else logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, V)
    y = target.reshape(-1)
    loss = ops.cross_entropy(rows, y, spec, extras, backend, inplace_backward)
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "mean" and every and extras.weight is None:
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss.sum() / _count(y, spec, extras)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:  # fmt: skip
    """x weight^T + bias, as torch.nn.functional.linear; fast for the 1 to 16 rows of decoding.

    Args:
        x: (..., D); weight: (V, D); bias: (V,); one dtype and device.
        backend: one of llmfast.backends.ORDER; it runs there or raises.

    Returns:
        (..., V) in x's dtype, summed in float32. On a CPU, for 1 to 16 rows of float32, bfloat16 or float16 without a
        gradient, weight is read once for all rows and a row's bits don't depend on the other rows or on the threads.
        Everything else (more rows, a gradient, float64, other devices, torch.func transforms) is
        torch.nn.functional.linear itself.

    Raises:
        TypeError, ValueError: a wrong type; shapes, dtypes or devices that contradict each other.
        NotImplementedError: the named backend can't do this case; the message says why.

    >>> y = llmfast.linear(hidden, model.lm_head.weight)
    """
    if backend is None and not _compiling():
        y = cpu.linear_fast(x, weight, bias)
        if y is not None:
            return y
    for name, t in (("x", x), ("weight", weight)):
        if arguments.tensor(t, name).dtype not in arguments.FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected (V, {x.shape[-1] if x.dim() else 'D'}) to match x, got shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(arguments.tensor(bias, "bias").shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected ({weight.shape[0]},), got shape {tuple(bias.shape)}")
    x, weight, _, bias = arguments.autocast(x, weight, None, bias)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype is not x.dtype:
            raise ValueError(f"{name}: expected {x.dtype} as in x, got {t.dtype}")
        if t is not None:
            arguments.same_device(t, name, x, "x")
    return ops.linear(x, weight, bias, backend)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, class_weight: Tensor | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    reduction: str = "mean", chunk: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """cross_entropy(x weight^T + bias, target) in chunks of rows: the logits of two chunks never exist together.

    Args:
        x: (..., D) hidden states; weight: (V, D); target: (...) int64; bias: (V,). All differentiable but target, once.
        class_weight, ignore_index, label_smoothing, z_loss, softcap: as weight and the others in `cross_entropy`.
        reduction: "mean", "sum" or "none"; the gradient of "none" computes the logits a second time.
        chunk: rows at a time; by default even parts of at most 16 million logits, and in float16 of at most 2048 rows:
            their sum of numbers below 32 is a float16.

    Returns:
        The loss in float32 (float64 for float64 inputs); () or target's shape.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`; weight or bias that doesn't match x.
        NotImplementedError: under torch.func's transforms.

    >>> loss = llmfast.linear_cross_entropy(hidden, model.lm_head.weight, target)
    """
    for name, t in (("x", x), ("weight", weight), *(() if bias is None else (("bias", bias),))):
        if arguments.tensor(t, name).dtype not in arguments.FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        arguments.same_device(t, name, x, "x")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: expected a number of rows, at least 1, got {chunk!r}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected (V, {x.shape[-1] if x.dim() else 'D'}) to match x, got shape {tuple(weight.shape)}"
        )
    kept = weight
    x, weight, _, bias = arguments.autocast(x, weight, None, bias)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"x, weight, bias: expected one dtype, got {x.dtype}, {weight.dtype}"
            + (f", {bias.dtype}" if bias is not None else "")
        )
    V = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (V,):
        raise ValueError(f"bias: expected ({V},), got shape {tuple(bias.shape)}")
    if arguments.tensor(target, "target").shape != x.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(x.shape[:-1])} to match x, got {tuple(target.shape)}")
    rows, y = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), target.reshape(-1)
    logits = x.new_empty(()).expand(rows.shape[0], V)  # a shape to check against
    spec, extras, _ = _cross_entropy_problem(
        logits, y, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, "class_weight"
    )
    if ops.transforming():
        raise NotImplementedError(
            "linear_cross_entropy: torch.func's transforms are not supported; "
            "take cross_entropy(linear(x, weight, bias), target)"
        )
    if chunk is None:
        most = max(16, 2**24 // max(V, 1))
        parts = -(-rows.shape[0] // (min(most, 2048) if x.dtype == torch.float16 else most))
        chunk = -(-rows.shape[0] // max(parts, 1)) or 1
    if not ops.needs_grad(rows, kept, bias):  # a Function takes the gradients of what requires one, no_grad or not
        rows, kept, bias = (None if t is None else t.detach() for t in (rows, kept, bias))
    share = None if reduction == "none" else rows.new_ones((), dtype=ops.lse_dtype(rows))
    if reduction == "mean":
        share = share / _count(y, spec, extras)
    loss = ops.LinearCrossEntropy.apply(rows, kept, bias, y, share, spec, extras, backend, chunk)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _cross_entropy_problem(
    logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, name="weight"
):
    if arguments.tensor(logits, "logits").dtype not in arguments.FLOATS:
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    if arguments.tensor(target, "target").dtype is not torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {target.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits: expected (V,), (N, V) or (N, V, d1, ...), got a number")
    V = logits.shape[0 if logits.dim() == 1 else 1]
    want = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    if tuple(target.shape) != tuple(want):
        raise ValueError(f"target: expected shape {tuple(want)} to match logits, got {tuple(target.shape)}")
    arguments.same_device(target, "target", logits, "logits")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int64, got {ignore_index}")
    label_smoothing, z_loss = arguments.real(label_smoothing, "label_smoothing"), arguments.real(z_loss, "z_loss")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    softcap, _ = arguments.softcap_and_dropout(softcap, 0.0)
    extras = NO_CROSS_ENTROPY_EXTRAS
    if weight is not None:
        if tuple(arguments.tensor(weight, name).shape) != (V,):
            raise ValueError(f"{name}: expected ({V},), one for each class, got shape {tuple(weight.shape)}")
        if ops.needs_grad(weight):
            raise ValueError(f"{name}: has no gradient; detach it")
        arguments.same_device(weight, name, logits, "logits")
        extras = CrossEntropyExtras(weight.detach().to(ops.lse_dtype(logits)).contiguous())
    every = False  # whether every row is known to count
    if target.is_cpu and ops.plain(target) and target.numel():
        low, high = (int(x) for x in torch.aminmax(target))
        every = low >= 0 and high < V and not low <= ignore_index <= high
        if low < 0 or high >= V:
            low, high = (int(x) for x in torch.aminmax(target.where(target != ignore_index, 0)))
        if low < 0 or high >= V:
            raise IndexError(
                f"target: {low if low < 0 else high} is not one of {V} classes, nor ignore_index {ignore_index}"
            )
    return CrossEntropySpec(ignore_index, label_smoothing, z_loss, softcap), extras, every


def _count(target, spec, extras):
    """What a mean divides by: the class weights of the rows that count."""
    kept = target != spec.ignore_index
    if extras.weight is None:
        return kept.sum()
    y = target.where(kept, 0).clamp(
        0, max(extras.weight.shape[0] - 1, 0)
    )  # on a GPU a target may be no class: its loss is NaN
    return (extras.weight[y] * kept).sum()


def _softmax(x, dim, scale, mask, bias, causal, out, backend, log):
    if mask is None and bias is None and causal is False and out is None and backend is None and not _compiling():
        y = cpu.softmax_fast(x, dim, scale, log)
        if y is not None:
            return y
    if arguments.tensor(x, "x").dtype not in arguments.FLOATS:
        raise TypeError(f"x: expected a floating dtype of {arguments.dtype_names(arguments.FLOATS)}, got {x.dtype}")
    if out is None and x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # as PyTorch's autocast does on CUDA, not on CPU, and not with out
    rank = x.dim()
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise IndexError(f"dim: expected one of the {rank} dimensions of x, got {dim}")
    spec = SoftmaxSpec(arguments.real(scale, "scale"), OPEN, log)
    extras = NO_SOFTMAX_EXTRAS
    if out is not None:
        if arguments.tensor(out, "out").shape != x.shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(f"out: expected {arguments.say(x)}, got {arguments.say(out)}")
        if ops.needs_grad(x, bias, out):
            raise ValueError("out: can't be given where a gradient is needed")
        arguments.writable(out, "out", x, "x")
    if mask is not None or bias is not None:
        extras = SoftmaxExtras(arguments.mask_of(mask, x.shape, x), arguments.bias_of(bias, x.shape, x))
    move = back = lambda t: t
    if dim not in (-1, rank - 1):  # the last dimension, often the contiguous one, becomes M
        move, back = (lambda t: t.movedim(dim, -1)), (lambda t: t.movedim(-1, dim))

    def four(t):  # (L0, L1, M, N) with the softmax over N
        if t is None:
            return None
        if t is not x and t is not out:
            t = t.expand(x.shape) if rank > 4 else t[(None,) * (rank - t.dim())]
        t = move(t)
        return t.flatten(0, -4) if rank > 4 else t[(None,) * (4 - rank)]

    if causal is not False:
        if rank < 2:
            raise ValueError("causal: x needs a dimension of rows beside dim")
        M, N = move(x).shape[-2:]
        _, right = arguments.band(causal, None, M, N)
        spec = spec._replace(offset=right + N - M)
    if rank == 4 and dim in (-1, 3):
        return ops.softmax(x, out, spec, extras, backend)
    target = None if out is None else four(out)
    y = ops.softmax(four(x), target, spec, SoftmaxExtras(four(extras.mask), four(extras.bias)), backend)
    if out is not None:
        if rank > 4 and (_compiling() or target.data_ptr() != out.data_ptr()):  # those that can't be flattened in place
            out.copy_(back(y.reshape(move(x).shape)))
        return out
    return back(y.reshape(move(x).shape))
