"""Attention and softmax written as their definition, in float32 or wider. Every other backend is tested against this
one.

q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv), o (B, H, Nq, Dv), lse and delta (B, H, Nq). N x N matrices are
held whole. The forward is differentiable by autograd, which serves double backward; the backward is the formula the
kernels use (Dao, FlashAttention-2, arXiv 2307.08691).
"""

import torch

from ..spec import NO_EXTRAS, Grads
from . import Op


def forward(q, k, v, spec, extras, need_lse=True):
    if not extras.packed and extras.seqlens_k is None:
        return _dense_forward(q, k, v, spec, extras)
    parts = [_dense_forward(*tensors, spec, e, b) for b, _, _, tensors, e in _sequences(q, k, v, extras)]
    if not extras.packed:
        return (
            tuple(torch.cat(p) for p in zip(*parts, strict=True)) if parts else _dense_forward(q, k, v, spec, NO_EXTRAS)
        )
    o = q.new_zeros(*q.shape[:3], v.shape[3])  # rows that no sequence covers stay zero
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide(q).dtype)
    for (_, rows, _, _, _), (o_part, lse_part) in zip(_sequences(q, k, v, extras), parts, strict=True):
        o[:, :, rows], lse[:, :, rows] = o_part, lse_part
    return o, lse


def backward(do, q, k, v, o, lse, delta, spec, extras):
    if not extras.packed:
        return _dense_backward(do, q, k, v, lse, delta, spec, extras)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    dsinks = None if extras.sinks is None else torch.zeros_like(extras.sinks)
    for b, rows, keys, tensors, e in _sequences(q, k, v, extras):
        mine = (t[:, :, rows] for t in (lse, delta))
        g = _dense_backward(do[:, :, rows], *tensors, *mine, spec, e, b)
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = g[:3]
        if dsinks is not None:
            dsinks += g.dsinks
    return Grads(dq, dk, dv, None, dsinks)


def rowdot(o, do):
    """delta = rowsum(o * do): (B, H, Nq) in float32 or wider."""
    return (wide(o) * wide(do)).sum(-1)


def _dense_forward(q, k, v, spec, extras, batch=0):
    s, _ = scores(q, k, spec, extras)
    lse, p = _softmax(s, extras.sinks)
    o = _drop(p, spec, extras, batch) @ wide(_expand(v, q))
    return o.to(q.dtype), lse


def _dense_backward(do, q, k, v, lse, delta, spec, extras, batch=0):
    wq, wk, wv, do = wide(q), wide(_expand(k, q)), wide(_expand(v, q)), wide(do)
    s, dcap = scores(q, k, spec, extras)
    p = torch.exp(s - _finite(lse)[..., None])  # (B, H, Nq, Nk); zero in a row that sees no key
    dv = _drop(p, spec, extras, batch).mT @ do
    ds = p * (_drop(do @ wv.mT, spec, extras, batch) - delta[..., None])
    dbias = None if extras.bias is None else ds.sum_to_size(extras.bias.shape).to(extras.bias.dtype)
    dsinks = None
    if extras.sinks is not None:
        psink = torch.exp(wide(extras.sinks)[:, None] - _finite(lse))
        dsinks = -(psink * delta).sum((0, 2)).to(extras.sinks.dtype)
    ds = ds * dcap * spec.scale
    return Grads((ds @ wk).to(q.dtype), _fold(ds.mT @ wq, k), _fold(dv, v), dbias, dsinks)


def scores(q, k, spec, extras):
    """scale * q k^T, softcap, bias, ALiBi, mask and band: (B, H, Nq, Nk), and the derivative of the softcap."""
    nq, nk = q.shape[-2], k.shape[-2]
    s = wide(q) @ wide(_expand(k, q)).mT * spec.scale
    dcap = 1.0
    if spec.softcap:
        t = torch.tanh(s / spec.softcap)
        s, dcap = spec.softcap * t, 1 - t * t
    if extras.bias is not None:
        s = s + wide(extras.bias)
    distance = torch.arange(nk, device=q.device) - torch.arange(nq, device=q.device)[:, None] - (nk - nq)  # (Nq, Nk)
    if extras.alibi_slopes is not None:
        s = s - extras.alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    hidden = (distance < -spec.left) | (distance > spec.right)
    if extras.mask is not None:
        hidden = hidden | ~extras.mask
    return s.masked_fill(hidden, float("-inf")), dcap


def weights(q, k, spec, extras):
    """The probabilities (B, H, Nq, Nk) in float32 or wider, before dropout."""
    return _softmax(scores(q, k, spec, extras)[0], extras.sinks)[1]


def philox(counter, key):
    """Philox-4x32-10 (Salmon et al., 2011): four words from a 4-word counter and a 2-word key, all int64 tensors or
    ints.
    """
    low, high = lambda x: x & 0xFFFFFFFF, lambda x: (x >> 32) & 0xFFFFFFFF
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64-bit products; low and high drop the sign
        c = [high(b) ^ c[1] ^ k0, low(b), high(a) ^ c[3] ^ k1, low(a)]
        k0, k1 = low(k0 + 0x9E3779B9), low(k1 + 0xBB67AE85)
    return c


def keep(seed, p, B, H, Nq, Nk, device, batch=0):
    """Which probabilities (B, H, Nq, Nk) survive dropout: those whose word is >= floor(p * 2**32).

    key = the two halves of the seed, counter = (column // 4, row, head, batch), the word is column % 4.
    """
    shape = (B, H, Nq, (Nk + 3) // 4)
    index = lambda dim, start=0: (
        torch.arange(start, start + shape[dim], device=device).view(-1, *(1,) * (3 - dim)).expand(shape)
    )
    words = philox((index(3), index(2), index(1), index(0, batch)), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return torch.stack(words, -1).flatten(-2)[..., :Nk] >= int(p * 2**32)


def _drop(p, spec, extras, batch):
    if spec.dropout_p == 0:
        return p
    kept = keep(extras.seed, spec.dropout_p, *p.shape, p.device, batch)
    return torch.where(kept, p / (1 - spec.dropout_p), 0.0) if spec.dropout_p < 1 else p * 0.0


def _softmax(s, sinks):
    m = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    if sinks is not None:
        m = torch.maximum(m, wide(sinks.detach())[:, None].to(m.dtype))
    m = _finite(m)
    e = torch.exp(s - m[..., None])
    l = e.sum(-1)
    if sinks is not None:
        l = l + torch.exp(wide(sinks)[:, None] - m)
    empty = l == 0
    l = l.masked_fill(empty, 1.0)
    return (torch.log(l) + m).masked_fill(empty, float("-inf")), e / l[..., None]


def _sequences(q, k, v, extras):
    """Each sequence of a packed batch or of a decode cache as a dense problem: index, rows, keys, tensors, extras."""
    same = NO_EXTRAS._replace(sinks=extras.sinks, seed=extras.seed)
    for b in range(q.shape[0] if not extras.packed else extras.cu_seqlens_q.shape[0] - 1):
        slopes = extras.alibi_slopes
        e = same._replace(alibi_slopes=slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes)
        if extras.packed:
            rows, keys = _range(extras.cu_seqlens_q, b, q.shape[2]), _range(extras.cu_seqlens_k, b, k.shape[2])
            yield b, rows, keys, (q[:, :, rows], k[:, :, keys], v[:, :, keys]), e
            continue
        ks, vs = k[b : b + 1], v[b : b + 1]
        if extras.page_table is not None:
            pages = extras.page_table[b].long().clamp(0, max(k.shape[0] - 1, 0))
            ks, vs = (t[pages].transpose(0, 1).flatten(1, 2)[None] for t in (k, v))  # (1, Hk, pages * page, D)
        keys = slice(0, min(max(int(extras.seqlens_k[b]), 0), ks.shape[2]))
        mask, bias = (
            t if t is None else t.expand(q.shape[0], -1, -1, ks.shape[2])[b : b + 1, :, :, keys] for t in extras[:2]
        )
        yield b, slice(None), keys, (q[b : b + 1], ks[:, :, keys], vs[:, :, keys]), e._replace(mask=mask, bias=bias)


def _range(cu_seqlens, b, total):
    start, stop = (min(max(int(n), 0), total) for n in cu_seqlens[b : b + 2])
    return slice(start, max(start, stop))


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _finite(x):
    return x.masked_fill(x == float("-inf"), 0.0)


def _expand(x, q):
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _fold(x, like):
    hk = like.shape[1]
    return (x if x.shape[1] == hk else x.unflatten(1, (hk, -1)).sum(2)).to(like.dtype)


def softmax_forward(x, out, spec, extras):
    s = softmax_scores(x, spec, extras)
    if spec.log:
        s = s - _finite(s.amax(-1, keepdim=True)) if s.shape[-1] else s
        y = s - _finite(torch.logsumexp(s, -1, keepdim=True))
    else:
        _, y = _softmax(s, None)
    return y.to(x.dtype) if out is None else out.copy_(y)


def softmax_backward(dy, y, spec, extras):
    """ds = y * (dy - sum(y dy)), or dy - exp(y) sum(dy) for log_softmax; dx = scale * ds."""
    wy, dy = wide(y), wide(dy)
    if spec.log:
        dy = dy.masked_fill(wy == float("-inf"), 0.0)
        ds = dy - wy.exp() * dy.sum(-1, keepdim=True)
    else:
        ds = wy * (dy - (wy * dy).sum(-1, keepdim=True))
    dbias = None if extras.bias is None else ds.sum_to_size(extras.bias.shape).to(extras.bias.dtype)
    return (ds * spec.scale).to(y.dtype), dbias


def softmax_scores(x, spec, extras):
    """scale * x + bias with hidden entries at -inf: (L0, L1, M, N)."""
    s = wide(x) * spec.scale
    if extras.bias is not None:
        s = s + wide(extras.bias)
    M, N = x.shape[-2:]
    hidden = torch.arange(N, device=x.device) > torch.arange(M, device=x.device)[:, None] + spec.offset
    if extras.mask is not None:
        hidden = hidden | ~extras.mask
    return s.masked_fill(hidden, float("-inf"))


def cross_entropy_forward(x, target, spec, extras):
    """(loss, lse), each (T,), of logits x (T, V) and targets (T,) int64."""
    x = capped(wide(x), spec)[0]
    m = _finite(x.amax(-1)).detach()
    x = x - m[:, None]  # x and log_l: of the size of the loss, as x and lse may not be
    log_l = torch.logsumexp(x, -1)
    lse, (kept, y, w, hit) = m + log_l, _classes(target, x, spec, extras)
    loss = hit * (log_l - x.gather(1, y[:, None])[:, 0])
    if spec.label_smoothing:
        loss = loss + spec.label_smoothing / x.shape[1] * (w * (log_l[:, None] - x)).sum(-1)
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
    return loss.where(kept, 0.0), lse


def cross_entropy_backward(dloss, x, target, lse, spec, extras, out=None):
    """dx = dloss * (a p - (1 - label_smoothing) w[y] onehot - label_smoothing / V w), a the sum of what each p is
    weighed by.
    """
    wx, dcap = capped(wide(x), spec)
    kept, y, w, hit = _classes(target, wx, spec, extras)
    smooth = spec.label_smoothing / wx.shape[1]
    a = hit + smooth * w.sum() + 2 * spec.z_loss * lse
    dx = a[:, None] * torch.exp(wx - lse[:, None]) - smooth * w
    dx = dx - torch.zeros_like(dx).scatter(1, y[:, None], hit[:, None])
    dx = (dx * dcap * dloss.where(kept, 0.0)[:, None]).masked_fill(~kept[:, None], 0.0).to(x.dtype)
    return dx if out is None else out.copy_(dx)


def _classes(target, x, spec, extras):
    """Which rows count, their classes, each class's weight, and the weight of -log p[y]: NaN where y is no class."""
    kept = target != spec.ignore_index
    known = (target >= 0) & (target < x.shape[1])
    y = target.where(kept & known, 0)
    w = x.new_ones(x.shape[1]) if extras.weight is None else extras.weight.to(x.dtype)
    return kept, y, w, ((1 - spec.label_smoothing) * w[y]).masked_fill(kept & ~known, float("nan"))


def capped(x, spec):
    if not spec.softcap:
        return x, 1.0
    t = torch.tanh(x / spec.softcap)
    return spec.softcap * t, 1 - t * t


def linear_forward(x, weight, bias):
    """x (M, D) weight (V, D)^T + bias (V,): (M, V)."""
    y = wide(x) @ wide(weight).mT
    return (y if bias is None else y + wide(bias)).to(x.dtype)


attention = Op(lambda *_: None, forward, backward, rowdot)
softmax = Op(lambda *_: None, softmax_forward, softmax_backward)
cross_entropy = Op(lambda *_: None, cross_entropy_forward, cross_entropy_backward)
linear = Op(lambda *_: None, linear_forward, None)


def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return None
