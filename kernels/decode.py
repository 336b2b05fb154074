"""Attention of a few queries against a long key-value cache, split over keys.

One program takes BLOCK_M rows of one key head, a row being one query of one of the GROUP heads that share it, and one
split of the keys; a second kernel merges the splits in key order. Where a split ends is fixed, so the bits of a
sequence don't depend on its neighbours. The cache is (B, Hk, M, D) or pages (P, Hk, page, D) found through page_table
(B, pages); seqlens_k (B,) says how many keys count. Reads the visible part of the cache once, writes and reads
splits * H * Nq * (Dv + 1) floats.
"""

import torch
import triton
import triton.language as tl

from .attention import LOG2E, arithmetic, numbers, options, row_of, scores, strides, target, tuned

SPLIT = 1024  # keys a program reads: 8k keys make 8 programs a head, and merging costs 1 / 1024 of the reading


def lines(D, dtype):
    """Rows of k or v in a tile: 16 KiB of them, so that q and three stages of both fit in 99 KiB; tl.dot takes 16."""
    return min(max(16, 16384 // (D * dtype.itemsize)), 64)


def tile(D, dtype):
    """BLOCK_N, num_warps, num_stages."""
    if found := tuned("decode", row_of(D), arithmetic(dtype)):
        return found
    num_stages = 2 if target().startswith("gfx") else 3  # three ask for 66 of gfx942's 64 KiB
    if 16 * D * dtype.itemsize > 16384:
        num_stages = 1
    return lines(D, dtype), 8 if dtype == torch.float32 else 4, num_stages  # in 4 warps float32 spills 6 KiB at D = 256


def forward(q, k, v, o, lse, spec, extras):
    """Fills o, and lse unless it is None."""
    B, H, Nq, D = q.shape
    P, Hk, page, Dv = v.shape
    table = extras.page_table
    M = page if table is None else page * table.shape[1]
    if B * H * Nq == 0:
        return
    rows = H // Hk * Nq
    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (D, Dv))
    wide = max(block_d, block_dv)
    most = lines(wide, q.dtype)
    if q.dtype == torch.float32:
        most = max(16, most // 2)  # 32 rows of 128 spill 360 B on sm_120
    block_m = min(max(16, triton.next_power_of_2(rows)), most)
    block_n, num_warps, num_stages = tile(wide, q.dtype)
    if extras.mask is not None or extras.bias is not None:
        num_stages = min(num_stages, 2)  # staged too: 120 KiB of sm_120's 99 in three with 64 rows at D = 128
    tiles, splits = triton.cdiv(rows, block_m), max(1, triton.cdiv(M, SPLIT))
    parts = torch.empty(splits, B, H, Nq, Dv, dtype=torch.float32, device=q.device)
    logs = torch.empty(splits, B, H, Nq, dtype=torch.float32, device=q.device)
    attention_decode[(splits * tiles * B * Hk,)](
        q, k, v, parts, logs, extras, q.stride()[:3], k.stride()[:3], v.stride()[:3], *strides(extras, (B, H, Nq, M)),
        *((0, 0) if table is None else table.stride()), B, H, Nq, M, P, page, tiles, splits, *numbers(spec)[:4],
        D=D, Dv=Dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=block_m, SPLIT=SPLIT,
        BLOCK_N=block_n, **options(spec, q, k), num_warps=num_warps, num_stages=num_stages,
    )
    attention_decode_merge[(B * H * Nq,)](
        parts, logs, o, lse, extras.sinks, o.stride()[:3], B, H, Nq, splits, Dv=Dv, BLOCK_DV=block_dv, num_warps=1
    )


@triton.jit(do_not_specialize=["B", "H", "Nq", "M", "P", "page", "tiles", "splits", "stb", "stp", "left", "right"])
def attention_decode(
    q, k, v, parts, logs, extras, sq, sk, sv, smask, sbias, sslope, stb, stp,
    B, H, Nq, M, P, page, tiles, splits, scale, left, right, softcap,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    split, pid = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, pid = pid % tiles, pid // tiles
    hk, b = (pid % (H // GROUP)).to(tl.int64), (pid // (H // GROUP)).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < GROUP * Nq
    row = tl.minimum(row, GROUP * Nq - 1)
    i, h = row % Nq, hk * GROUP + row // Nq  # (BLOCK_M,)
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    at = q + b * sq[0] + h[:, None] * sq[1] + i[:, None].to(tl.int64) * sq[2] + d
    q_tile = tl.load(at, mask=inside[:, None] & (d < D), other=0.0)  # (BLOCK_M, BLOCK_D)
    nk = M
    if extras.seqlens_k is not None:
        nk = tl.minimum(tl.maximum(tl.load(extras.seqlens_k + b), 0), M)
    begin = tl.maximum(split * SPLIT, tl.maximum(nk - Nq - left, 0) // BLOCK_N * BLOCK_N)
    end = tl.minimum(tl.minimum((split + 1) * SPLIT, nk), tl.maximum(nk + right, 0))

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        if extras.page_table is None:
            block, n = b, j.to(tl.int64)[:, None]
        else:
            block = tl.load(extras.page_table + b * stb + j // page * stp, mask=j < nk, other=0)
            block, n = tl.minimum(tl.maximum(block, 0), P - 1).to(tl.int64)[:, None], (j % page).to(tl.int64)[:, None]
        k_tile = tl.load(k + block * sk[0] + hk * sk[1] + n * sk[2] + d, mask=(j < nk)[:, None] & (d < D), other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        s, _ = scores(s, i[:, None], j[None, :], extras, smask, sbias, sslope, b, b, h[:, None], Nq, nk,
                      scale, left, right, softcap, SOFTCAP, False, True)
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - m_safe[:, None]) * LOG2E)
        alpha = tl.exp2((m - m_safe) * LOG2E)
        l = l * alpha + tl.sum(p, 1)
        v_tile = tl.load(v + block * sv[0] + hk * sv[1] + n * sv[2] + dv, mask=(j < nk)[:, None] & (dv < Dv), other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    at = ((split * B + b) * H + h) * Nq + i  # (BLOCK_M,)
    safe_l = tl.where(l == 0, 1.0, l)
    tl.store(logs + at, tl.where(l == 0, float("-inf"), m + tl.log(safe_l)), mask=inside)
    tl.store(parts + at[:, None] * Dv + dv, acc / safe_l[:, None], mask=inside[:, None] & (dv < Dv))


@triton.jit(do_not_specialize=["B", "H", "Nq", "splits"])
def attention_decode_merge(parts, logs, o, lse, sinks, so, B, H, Nq, splits, Dv: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One row of o from its splits, in key order."""
    row = tl.program_id(0).to(tl.int64)
    i, head = row % Nq, row // Nq
    dv = tl.arange(0, BLOCK_DV)
    m, l = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    if sinks is not None:  # like a key that has this score and no value
        m = tl.load(sinks + head % H).to(tl.float32)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * B * H * Nq + row
        log = tl.load(logs + at)
        m_new = tl.maximum(m, log)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp2((m - m_safe) * LOG2E), tl.exp2((log - m_safe) * LOG2E)
        acc = acc * alpha + tl.load(parts + at * Dv + dv, mask=dv < Dv, other=0.0) * beta
        l = l * alpha + beta
        m = m_new
    safe_l = tl.where(l == 0, 1.0, l)
    at = o + head // H * so[0] + head % H * so[1] + i * so[2] + dv
    tl.store(at, (acc / safe_l).to(o.dtype.element_ty), mask=dv < Dv)
    if lse is not None:
        tl.store(lse + row, tl.where(l == 0, float("-inf"), m + tl.log(safe_l)))
