"""Cross entropy of logits x (T, V) and targets (T,) int64; loss and lse (T,) float32.

x = softcap(x), lse = log sum exp x, hit = (1 - label_smoothing) w[y], smooth = label_smoothing / V:
    loss = hit (lse - x[y]) + smooth sum w (lse - x) + z_loss lse^2
    dx   = dloss dcap ((hit + smooth sum w + 2 z_loss lse) exp(x - lse) - smooth w - hit onehot(y))
A row whose target is ignore_index has loss 0 and dx 0; one whose target is no class has loss and dx NaN.
Forward: one read of x, in blocks of BLOCK_N columns, each with a maximum and sum of its own, merged from left to right
by one formula: which program takes a block changes no bit. Backward: one read, one write, over x itself when asked.
All arithmetic is float32; sums over a row end in float64.
"""

import torch
import triton
import triton.language as tl

from .attention import tanh, tuned
from .softmax import row_sum

BLOCK = 8192  # columns at once: 32 a thread at 8 warps, so that programs share an SM and hide each other's loads
PROGRAMS = 512  # fewer than these leave some of 132 SMs idle: then a long row's blocks go to programs of their own


def tile(V, dtype):
    """BLOCK_M, BLOCK_N and num_warps, the same for every T; 4096 elements in short rows: a warp's loads are full."""
    block_n = min(max(16, triton.next_power_of_2(V)), 2 * BLOCK)
    if found := tuned("cross_entropy", block_n, dtype):
        return found
    block_n = min(block_n, BLOCK)
    block_m = max(1, 4096 // block_n)
    return block_m, block_n, block_m * block_n // 1024


def forward(x, target, loss, lse, spec, extras):
    """Fills loss and lse."""
    T, V = x.shape
    if T == 0:
        return
    block_m, block_n, num_warps = tile(V, x.dtype)
    tiles, blocks = triton.cdiv(T, block_m), triton.cdiv(V, block_n)
    split = blocks > 1 and tiles < PROGRAMS
    parts = torch.empty(3, blocks, T, dtype=torch.float32, device=x.device) if split else None
    common = dict(SMOOTH=spec.label_smoothing != 0, SOFTCAP=spec.softcap != 0, BLOCK_M=block_m)
    cross_entropy_fwd[(tiles * (blocks if split else 1),)](
        x, target, loss, lse, parts, extras, _total(spec, extras), x.stride(), target.stride(0), T, V, blocks, *spec,
        BLOCK_N=block_n, num_warps=num_warps, **common,
    )
    if split:
        cross_entropy_merge[(tiles,)](
            x, target, loss, lse, parts, extras, _total(spec, extras), x.stride(), target.stride(0),
            T, V, blocks, *spec, num_warps=1, **common,
        )


def _total(spec, extras):
    """The sum of the class weights, or None where each is 1 or none is asked for."""
    return extras.weight.sum(dtype=torch.float64) if extras.weight is not None and spec.label_smoothing else None


@triton.jit(do_not_specialize=["T", "V", "blocks", "ignore_index"])
def cross_entropy_fwd(
    x, target, loss, lse, parts, extras, total, sx, starget, T, V, blocks,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of loss and lse; with parts (3, blocks, T) one block of them: maximum, sum of exp, sum of w x."""
    if parts is not None:
        rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        block = tl.program_id(0) % blocks
        m, l, s = block_sums(x, extras, sx, rows, block * BLOCK_N, T, V, softcap, SMOOTH, SOFTCAP, BLOCK_N)
        at = parts + tl.cast(block, tl.int64) * T + rows
        part = tl.cast(blocks, tl.int64) * T
        tl.store(at, m, mask=rows < T)
        tl.store(at + part, l, mask=rows < T)
        if SMOOTH:
            tl.store(at + 2 * part, s, mask=rows < T)
    else:
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        m, l, s = nothing(BLOCK_M)
        for n0 in range(0, V, BLOCK_N):
            m_block, l_block, s_block = block_sums(x, extras, sx, rows, n0, T, V, softcap, SMOOTH, SOFTCAP, BLOCK_N)
            m, l, s = merged(m, l, s, m_block, l_block, s_block)
        finish(x, target, loss, lse, extras, total, sx, starget, rows, T, V, ignore_index, label_smoothing, z_loss,
               softcap, m, l, s, SMOOTH, SOFTCAP)


@triton.jit(do_not_specialize=["T", "V", "blocks", "ignore_index"])
def cross_entropy_merge(
    x, target, loss, lse, parts, extras, total, sx, starget, T, V, blocks,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """BLOCK_M rows of loss and lse from their blocks, from left to right."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.cast(blocks, tl.int64) * T
    m, l, s = nothing(BLOCK_M)
    for block in range(blocks):
        at = parts + tl.cast(block, tl.int64) * T + rows
        m_block = tl.load(at, mask=rows < T, other=0.0)
        l_block = tl.load(at + part, mask=rows < T, other=0.0)
        s_block = tl.load(at + 2 * part, mask=rows < T, other=0.0) if SMOOTH else l_block
        m, l, s = merged(m, l, s, m_block, l_block, s_block)
    finish(x, target, loss, lse, extras, total, sx, starget, rows, T, V, ignore_index, label_smoothing, z_loss,
           softcap, m, l, s, SMOOTH, SOFTCAP)


@triton.jit
def nothing(BLOCK_M: tl.constexpr):
    zero = tl.zeros([BLOCK_M], tl.float32)
    return zero - float("inf"), zero, zero.to(tl.float64)


@triton.jit
def block_sums(
    x, extras, sx, rows, n0, T, V, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Maximum, sum of exp(x - maximum) and sum of w x of one block of columns: (BLOCK_M,) each."""
    cols = n0 + tl.arange(0, BLOCK_N)
    inside = (rows < T)[:, None] & (cols < V)[None, :]
    x_tile, _ = logits(x, sx, rows[:, None], cols[None, :], inside, softcap, SOFTCAP)  # (BLOCK_M, BLOCK_N)
    m = tl.max(x_tile, 1)
    l = row_sum(tl.exp(x_tile - finite(m)[:, None]))
    s = l
    if SMOOTH:
        if extras.weight is not None:
            x_tile *= tl.load(extras.weight + cols, mask=cols < V, other=0.0)[None, :]
        s = row_sum(tl.where(inside, x_tile, 0.0))
    return m, l, s


@triton.jit
def logits(x, sx, rows, cols, inside, softcap, SOFTCAP: tl.constexpr):
    """x after softcap and the softcap's derivative, at rows and cols shaped to broadcast; -inf outside."""
    at = x + rows.to(tl.int64) * sx[0] + cols.to(tl.int64) * sx[1]
    x_tile = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    dcap = 1.0
    if SOFTCAP:
        t, dcap = tanh(x_tile / softcap)
        x_tile = tl.where(inside, t * softcap, float("-inf"))
    return x_tile, dcap


@triton.jit
def finite(m):
    """The maximum to subtract: 0 where nothing but -inf was seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def merged(m, l, s, m_block, l_block, s_block):
    m_new = tl.maximum(m, m_block)
    m_safe = finite(m_new)
    l = tl.fma(l, tl.exp(m - m_safe), l_block * tl.exp(m_block - m_safe))
    return m_new, l, s + s_block.to(tl.float64)


@triton.jit
def finish(
    x, target, loss, lse, extras, total, sx, starget, rows, T, V, ignore_index, label_smoothing, z_loss, softcap,
    m, l, s, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
):
    """loss and lse from the sums of whole rows; lse - x[y] as log(l) + (m - x[y]) loses nothing to the size of m."""
    kept, y, hit, total = classes(target, extras, total, starget, rows, T, V, ignore_index, label_smoothing, SMOOTH)
    x_y, _ = logits(x, sx, rows, y, kept, softcap, SOFTCAP)  # (BLOCK_M,)
    m, log_l = finite(m), tl.log(l)
    value = hit * (log_l + (m - x_y))
    if SMOOTH:
        value += (label_smoothing / V * (total * (m + log_l).to(tl.float64) - s)).to(tl.float32)
    value += tl.where(z_loss == 0, 0.0, z_loss * (m + log_l) * (m + log_l))
    tl.store(loss + rows, tl.where(kept, value, 0.0), mask=rows < T)
    tl.store(lse + rows, m + log_l, mask=rows < T)


@triton.jit
def classes(target, extras, total, starget, rows, T, V, ignore_index, label_smoothing, SMOOTH: tl.constexpr):
    """Which rows count, their classes, the weight of -log p[y] (NaN where y is no class), the sum of all weights."""
    y = tl.load(target + rows.to(tl.int64) * starget, mask=rows < T, other=0)
    kept = (rows < T) & (y != ignore_index)
    known = (y >= 0) & (y < V)
    y = tl.where(kept & known, y, 0)
    hit = tl.zeros_like(y).to(tl.float32) + (1 - label_smoothing)
    if extras.weight is not None:
        hit *= tl.load(extras.weight + y, mask=kept, other=0.0)
    hit = tl.where(kept & (known == 0), float("nan"), hit)
    if SMOOTH and extras.weight is not None:
        return kept, y, hit, tl.load(total)
    else:
        return kept, y, hit, tl.cast(V, tl.float64)


def backward(dloss, x, target, lse, dx, spec, extras):
    """Fills dx, which may be x itself."""
    T, V = x.shape
    if x.numel() == 0:
        return
    block_m, block_n, num_warps = tile(V, x.dtype)
    blocks = triton.cdiv(V, block_n)
    cross_entropy_bwd[(triton.cdiv(T, block_m) * blocks,)](
        dloss, x, target, lse, dx, extras, _total(spec, extras), x.stride(), dx.stride(), dloss.stride(0),
        target.stride(0), T, V, blocks, *spec,
        SMOOTH=spec.label_smoothing != 0, SOFTCAP=spec.softcap != 0, BLOCK_M=block_m, BLOCK_N=block_n,
        ONE=blocks == 1, num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["sdloss", "T", "V", "blocks", "ignore_index"])
def cross_entropy_bwd(
    dloss, x, target, lse, dx, extras, total, sx, sdx, sdloss, starget, T, V, blocks,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr,
):
    """One block of dx: each program reads its block of x before it writes it."""
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < T)[:, None] & (cols < V)[None, :]
    kept, y, hit, total = classes(target, extras, total, starget, rows, T, V, ignore_index, label_smoothing, SMOOTH)
    lse_row = tl.load(lse + rows, mask=rows < T, other=0.0)
    dloss_row = tl.load(dloss + rows.to(tl.int64) * sdloss, mask=rows < T, other=0.0)
    x_tile, dcap = logits(x, sx, rows[:, None], cols[None, :], inside, softcap, SOFTCAP)  # (BLOCK_M, BLOCK_N)
    if ONE:  # the whole row is here: its own sum is exact where lse is rounded to its own size
        e = tl.exp(x_tile - finite(tl.max(x_tile, 1))[:, None])
        p = e / row_sum(e)[:, None]
    else:
        p = tl.exp(x_tile - lse_row[:, None])
    onehot = tl.where(cols[None, :] == y[:, None], 1.0, 0.0)
    d = hit[:, None] * (p - onehot) + p * (2 * z_loss * lse_row)[:, None]  # p - 1 is exact from 1/2 on
    if SMOOTH:
        w = 1.0
        if extras.weight is not None:
            w = tl.load(extras.weight + cols, mask=cols < V, other=0.0)[None, :]
        d += (label_smoothing / V) * (total.to(tl.float32) * p - w)
    d = tl.where(kept[:, None], d * dcap * dloss_row[:, None], 0.0)
    at = dx + rows[:, None].to(tl.int64) * sdx[0] + cols[None, :].to(tl.int64) * sdx[1]
    tl.store(at, d.to(dx.dtype.element_ty), mask=inside)
