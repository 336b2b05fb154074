"""flash-attn 2.8's functions, names and meaning: `from llmfast.flash_attn import flash_attn_func` is the whole port, on
a CPU too.

q, k, v and o are (B, N, H, D), packed (T, H, D). causal and window_size (left, right), -1 open, count from the
bottom-right diagonal. `deterministic` and `num_splits` are accepted and change nothing: results are always
deterministic. `return_attn_probs` gives (o, lse, None) with lse (B, H, Nq) or (H, T). A row that sees no key has o = 0
and lse = -inf (flash-attn: +inf).
"""

import torch
from torch import Tensor

from . import arguments
from .functional import attention, attention_decode, attention_varlen


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """q (B, Nq, H, D), k and v (B, Nk, Hk, D) give o (B, Nq, H, D).

    >>> o = flash_attn_func(q, k, v, causal=True, window_size=(255, 0))
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    found = attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    return (found[0].transpose(1, 2), found[1], None) if return_attn_probs else found.transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn_func with kv (B, Nk, 2, Hk, D), read in place."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, *_unpack(kv, "kv", 5, 2), *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn_func with qkv (B, N, 3, H, D), read in place."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(*_unpack(qkv, "qkv", 5, 3), *options)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """q (Tq, H, D), k and v (Tk, Hk, D) of sequences one after another; cu_seqlens_q and cu_seqlens_k (B + 1,) int32.

    With block_table (B, pages) k and v are pages (P, page, Hk, D), which are gathered (the number of keys is read by
    the host).
    """
    if block_table is not None:
        k, v = _gather(k, v, cu_seqlens_k, block_table)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    found = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **options
    )
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn_varlen_func with kv (Tk, 2, Hk, D), read in place."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(
        q, *_unpack(kv, "kv", 4, 2), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn_varlen_func with qkv (T, 3, H, D), read in place."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(*_unpack(qkv, "qkv", 4, 3), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of new queries against a cache, which takes the new keys and values in place; without gradient.

    Args:
        q: (B, Nq, H, D).
        k_cache, v_cache: (rows, M, Hk, D), or pages (P, page, Hk, D) with block_table (B, pages) int32.
        k, v: (B, Nnew, Hk, D), written behind the first cache_seqlens entries, rotated first.
        rotary_cos, rotary_sin: (positions, R / 2): rotate the first R of D, pairs (0, 1), (2, 3) ... when
            rotary_interleaved, (0, R / 2), (1, R / 2 + 1) ... otherwise. q's rows count up from cache_seqlens with
            causal or a window, else all stand at cache_seqlens.
        cache_seqlens: int or (B,) int32, the entries before k is added; the whole cache by default.
        cache_batch_idx: (B,), the cache row of each sequence.
        cache_leftpad: (B,), where each sequence starts in its cache row.

    Returns:
        o (B, Nq, H, D); with return_softmax_lse also lse (B, H, Nq).

    >>> o = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    """
    B, device = q.shape[0], q.device
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise ValueError("block_table: a paged cache takes neither cache_batch_idx nor cache_leftpad")
    if (k is None) != (v is None):
        raise ValueError("k, v: give both or neither")
    if k is None and rotary_cos is not None:
        raise ValueError("rotary_cos: needs k and v, the keys that it rotates")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: says where in the cache k and v go, got None")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(cache_seqlens, int) and cache_seqlens < 0:
        raise ValueError(f"cache_seqlens: expected a number of cached entries, got {cache_seqlens}")
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full(
            (B,), capacity if cache_seqlens is None else cache_seqlens, dtype=torch.int32, device=device
        )
    arguments.lengths(cache_seqlens, "cache_seqlens", q, B)  # before the cache is written
    if rotary_cos is not None:
        moving = causal or tuple(window_size) != (-1, -1)
        q = _rotate(q, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, moving)
        k = _rotate(k, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, True)
    rows = block_table
    if cache_batch_idx is not None:
        rows = cache_batch_idx.to(torch.int32)[:, None]  # each row of the cache is one page
    if k is not None:
        at = cache_seqlens[:, None].long() + torch.arange(k.shape[1], device=device)  # (B, Nnew)
        if rows is None:
            where = (torch.arange(B, device=device)[:, None], at)
        else:
            page = k_cache.shape[1]
            where = (rows.long().gather(1, at // page), at % page)
        k_cache[where], v_cache[where] = k, v
        cache_seqlens = cache_seqlens + k.shape[1]
    mask = None
    if rows is None:
        k_cache, v_cache = k_cache[:B], v_cache[:B]
    if cache_leftpad is not None:
        mask = (torch.arange(capacity, device=device) >= cache_leftpad[:, None])[:, None, None]  # (B, 1, 1, M)
    found = attention_decode(
        q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), cache_seqlens, page_table=rows,
        causal=causal, window=_window(window_size), scale=softmax_scale, softcap=softcap, mask=mask,
        alibi_slopes=alibi_slopes, return_lse=return_softmax_lse,
    )  # fmt: skip
    return (found[0].transpose(1, 2), found[1]) if return_softmax_lse else found.transpose(1, 2)


def _options(dropout_p, scale, causal, window_size, softcap, alibi_slopes, return_lse):
    options = dict(dropout_p=dropout_p, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes)
    return options | dict(window=_window(window_size), return_lse=return_lse)


def _window(window_size):
    return None if tuple(window_size) == (-1, -1) else tuple(window_size)


def _unpack(packed, name, dims, count):
    if packed.dim() != dims or packed.shape[-3] != count:
        raise ValueError(
            f"{name}: expected {dims} dimensions (..., {count}, heads, D), got shape {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def _gather(k, v, cu_seqlens, block_table):
    """Packed (Tk, Hk, D) from pages (P, page, Hk, D)."""
    page, cu = k.shape[1], cu_seqlens.long()
    b = torch.repeat_interleave(cu.diff())  # the sequence of each key
    at = torch.arange(b.shape[0], device=k.device) - cu[b]
    where = (block_table.long()[b, at // page], at % page)
    return k[where], v[where]


def _rotate(x, start, cos, sin, interleaved, moving):
    """x (B, N, H, D) with its first 2 * cos.shape[1] entries turned by the angles of rows start (+ 0, 1, ... if
    moving).
    """
    at = start[:, None].long() + torch.arange(x.shape[1], device=x.device) * moving  # (B, N)
    cos, sin = (t[at][:, :, None].float() for t in (cos, sin))  # (B, N, 1, R / 2)
    R = 2 * cos.shape[-1]
    turn, rest = x[..., :R].float(), x[..., R:]
    a, b = (turn[..., ::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
