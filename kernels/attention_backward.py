"""Attention backward (Dao, arXiv 2307.08691), with no atomics: every sum has a fixed order, so runs agree bitwise.

p = exp(s - lse), dp = do v^T, ds = p (dp - delta), dv = p^T do, dk = scale ds^T q, dq = scale ds k, with dropout on p
and dp where they meet do and v. One kernel owns a tile of keys and walks over the group's heads and the queries that
see it (dk, dv), one owns a tile of queries and walks over its keys (dq): two of seven products are computed twice, and
nothing is written twice. Layouts as in attention.py; delta (B, H, Nq) = rowsum(o * do) - dlse.
"""

import triton
import triton.language as tl

from .attention import (
    LOG2E,
    band_tiles,
    block_d,
    dot_over_d,
    keep,
    load_tile,
    locate,
    numbers,
    options,
    scores,
    sizes,
    store_tile,
    strides,
    tile,
)  # fmt: skip


def backward(do, q, k, v, lse, delta, dq, dk, dv, dbias, dsinks, spec, extras):
    """Fills the gradients given; dbias and dsinks may be None. Packed: rows of no sequence stay as they are."""
    B, H, Nq, Nk = sizes(q, k, extras)
    D, Dv, Hk = q.shape[3], v.shape[3], k.shape[1]
    if H == 0:
        return
    shape = dict(D=D, Dv=Dv, BLOCK_D=block_d(D), BLOCK_DV=block_d(Dv), **options(spec, q, k))
    chunks = max(triton.cdiv(D, 256), triton.cdiv(Dv, 256), 1)
    rows = (t.stride()[:3] for t in (do, q, k, v, dq, dk, dv))
    common = (extras, *rows, *strides(extras, (B, H, Nq, Nk)), B, H, Nq, Nk)
    batch, more = (1, B) if extras.packed else (B, 0)
    if B * Nk > 0:
        block_m, block_n, num_warps, num_stages = tile("dkdv", max(D, Dv), q.dtype)
        if extras.bias is not None and extras.bias.itemsize > q.itemsize:
            block_n = min(block_n, 64)  # 64 x 128 of a float32 bias and a mask spill 1088 B on sm_90
        tiles = triton.cdiv(Nk, block_n) + more
        attention_bwd_dkdv[(tiles * batch * Hk * chunks,)](
            do, q, k, v, lse, delta, dk, dv, *common, tiles, *numbers(spec),
            **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )
    if B * Nq * D > 0:
        block_m, block_n, num_warps, num_stages = tile("dq", max(D, Dv), q.dtype)
        tiles = triton.cdiv(Nq, block_m) + more
        attention_bwd_dq[(tiles * batch * H * triton.cdiv(D, 256),)](
            do, q, k, v, lse, delta, dq, *common, tiles, *numbers(spec),
            **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )
    if dbias is not None and dbias.numel() > 0:
        Bb, Hb, Mb, Nb = dbias.shape
        block_m, block_n, num_warps, _ = tile("dq", max(D, Dv), q.dtype)
        # four tiles of scores are live at once; at D = 256 64 x 64 spills 3 KiB on sm_80, 32 x 32 of tf32 6
        block_m, block_n = min(block_m, 64), min(block_n, 64 if max(D, Dv) <= 128 else 64 // q.element_size())
        m_tiles, n_tiles = 1 if Mb == 1 else triton.cdiv(Nq, block_m), 1 if Nb == 1 else triton.cdiv(Nk, block_n)
        attention_bwd_dbias[(Bb * Hb * m_tiles * n_tiles,)](
            do, q, k, v, lse, delta, dbias, dbias.stride(), (Bb, Hb, Mb, Nb), m_tiles, n_tiles, *common, *numbers(spec),
            **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=1,
        )
    if dsinks is not None:
        attention_bwd_dsinks[(H,)](extras.sinks, lse, delta, dsinks, q.shape[0], H, Nq, BLOCK=1024)


@triton.jit(do_not_specialize=["B", "H", "Nq", "Nk", "tiles", "left", "right", "threshold"])
def attention_bwd_dkdv(
    do, q, k, v, lse, delta, dk, dv, extras, sdo, sq, sk, sv, sdq, sdk, sdv, smask, sbias, sslope,
    B, H, Nq, Nk, tiles, scale, left, right, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    CHUNKS: tl.constexpr = max(1, (D + BLOCK_D - 1) // BLOCK_D, (Dv + BLOCK_DV - 1) // BLOCK_DV)
    chunk, pid = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    b, hk, seq, tile, q0, k0, nq, nk = locate(
        extras, extras.cu_seqlens_k, Nk, BLOCK_N, pid, tiles, B, H // GROUP, Nq, Nk)
    n0 = tile * BLOCK_N
    if n0 >= nk:
        return
    k += b * sk[0] + hk * sk[1] + k0 * sk[2]
    v += b * sv[0] + hk * sv[1] + k0 * sv[2]
    d0 = chunk * BLOCK_D if D > BLOCK_D else 0  # the narrower of the two heads is whole in every chunk
    dv0 = chunk * BLOCK_DV if Dv > BLOCK_DV else 0
    k_tile = load_tile(k, sk[2], n0, nk, BLOCK_N, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
    v_tile = load_tile(v, sv[2], n0, nk, BLOCK_N, Dv, BLOCK_DV, True)  # (BLOCK_N, BLOCK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first, whole, whole_end, last = band_tiles(n0, tl.minimum(n0 + BLOCK_N, nk) - 1, nq - nk, right, left, nq, BLOCK_M)
    for g in range(GROUP):
        h = hk * GROUP + g
        q_head = q + b * sq[0] + h * sq[1] + q0 * sq[2]
        do_head = do + b * sdo[0] + h * sdo[1] + q0 * sdo[2]
        at = (b * H + h) * Nq + q0
        for EDGE in tl.static_range(2):
            for t in range(whole if EDGE == 0 else first, whole_end if EDGE == 0 else last - (whole_end - whole)):
                m0 = t * BLOCK_M
                if EDGE == 1:
                    m0 += tl.where(t < whole, 0, whole_end - whole) * BLOCK_M
                q_tile = load_tile(q_head + d0, sq[2], m0, nq, BLOCK_M, D - d0, BLOCK_D, EDGE)
                do_tile = load_tile(do_head + dv0, sdo[2], m0, nq, BLOCK_M, Dv - dv0, BLOCK_DV, EDGE)
                s = dot_over_d(k_tile, k, sk[2], n0, nk, BLOCK_N, q_tile, q_head, sq[2], m0, nq, BLOCK_M,
                               D, BLOCK_D, PRECISION)
                dp = dot_over_d(v_tile, v, sv[2], n0, nk, BLOCK_N, do_tile, do_head, sdo[2], m0, nq, BLOCK_M,
                                Dv, BLOCK_DV, PRECISION)
                rows, cols = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
                p, dcap, delta_row = probabilities(s, rows[None, :], cols[:, None], rows, lse + at, delta + at, 0,
                    extras, smask, sbias, sslope, b, seq, h, nq, nk, scale, left, right, softcap,
                    SOFTCAP, EDGE)  # (BLOCK_N, BLOCK_M)
                dropped = p
                if DROPOUT:
                    kept = tl.trans(keep(extras, threshold, seq, h, m0, n0, BLOCK_M, BLOCK_N))
                    dropped, dp = tl.where(kept, p * keep_scale, 0.0), tl.where(kept, dp * keep_scale, 0.0)
                dv_tile = tl.dot(dropped.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
                ds = p * (dp - delta_row) * dcap  # (BLOCK_N, BLOCK_M)
                dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    dk += b * sdk[0] + hk * sdk[1] + k0 * sdk[2] + d0
    dv += b * sdv[0] + hk * sdv[1] + k0 * sdv[2] + dv0
    if chunk * BLOCK_D < D:
        store_tile(dk, sdk[2], n0, nk, BLOCK_N, D - d0, BLOCK_D, dk_tile * scale)
    if chunk * BLOCK_DV < Dv:
        store_tile(dv, sdv[2], n0, nk, BLOCK_N, Dv - dv0, BLOCK_DV, dv_tile)


@triton.jit(do_not_specialize=["B", "H", "Nq", "Nk", "tiles", "left", "right", "threshold"])
def attention_bwd_dq(
    do, q, k, v, lse, delta, dq, extras, sdo, sq, sk, sv, sdq, sdk, sdv, smask, sbias, sslope,
    B, H, Nq, Nk, tiles, scale, left, right, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    chunk, pid = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    b, h, seq, tile, q0, k0, nq, nk = locate(extras, extras.cu_seqlens_q, Nq, BLOCK_M, pid, tiles, B, H, Nq, Nk)
    m0 = (tl.cdiv(nq, BLOCK_M) - 1 - tile) * BLOCK_M  # under causal the longest rows start first
    if m0 < 0:
        return
    q += b * sq[0] + h * sq[1] + q0 * sq[2]
    do += b * sdo[0] + h * sdo[1] + q0 * sdo[2]
    k += b * sk[0] + h // GROUP * sk[1] + k0 * sk[2]
    v += b * sv[0] + h // GROUP * sv[1] + k0 * sv[2]
    d0, at = chunk * BLOCK_D, (b * H + h) * Nq + q0
    q_tile = load_tile(q, sq[2], m0, nq, BLOCK_M, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
    do_tile = load_tile(do, sdo[2], m0, nq, BLOCK_M, Dv, BLOCK_DV, True)  # (BLOCK_M, BLOCK_DV)
    rows = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, whole, whole_end, last = band_tiles(m0, tl.minimum(m0 + BLOCK_M, nq) - 1, nk - nq, left, right, nk, BLOCK_N)
    for EDGE in tl.static_range(2):
        for t in range(whole if EDGE == 0 else first, whole_end if EDGE == 0 else last - (whole_end - whole)):
            n0 = t * BLOCK_N
            if EDGE == 1:
                n0 += tl.where(t < whole, 0, whole_end - whole) * BLOCK_N
            k_tile = load_tile(k + d0, sk[2], n0, nk, BLOCK_N, D - d0, BLOCK_D, EDGE)
            v_tile = load_tile(v, sv[2], n0, nk, BLOCK_N, Dv, BLOCK_DV, EDGE)
            s = dot_over_d(q_tile, q, sq[2], m0, nq, BLOCK_M, k_tile, k, sk[2], n0, nk, BLOCK_N, D, BLOCK_D, PRECISION)
            dp = dot_over_d(do_tile, do, sdo[2], m0, nq, BLOCK_M, v_tile, v, sv[2], n0, nk, BLOCK_N,
                            Dv, BLOCK_DV, PRECISION)
            cols = n0 + tl.arange(0, BLOCK_N)
            p, dcap, delta_row = probabilities(s, rows[:, None], cols[None, :], rows, lse + at, delta + at, 1,
                extras, smask, sbias, sslope, b, seq, h, nq, nk, scale, left, right, softcap, SOFTCAP, EDGE)  # (M, N)
            if DROPOUT:
                dp = tl.where(keep(extras, threshold, seq, h, m0, n0, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
            ds = p * (dp - delta_row) * dcap
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_tile(dq + b * sdq[0] + h * sdq[1] + q0 * sdq[2] + d0, sdq[2], m0, nq, BLOCK_M, D - d0, BLOCK_D, acc * scale)


@triton.jit
def probabilities(
    s, i, j, rows, lse, delta, AXIS: tl.constexpr, extras, smask, sbias, sslope, b, seq, h, nq, nk,
    scale, left, right, softcap, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
):
    """p = exp(scores - lse), the derivative of softcap, and delta shaped to broadcast along keys (AXIS) of s."""
    s, dcap = scores(s, i, j, extras, smask, sbias, sslope, b, seq, h, nq, nk,
                     scale, left, right, softcap, SOFTCAP, False, EDGE)
    lse = tl.load(lse + rows, mask=rows < nq, other=0.0)
    lse = tl.expand_dims(tl.where(lse == float("-inf"), 0.0, lse), AXIS)  # a row that sees no key
    delta = tl.expand_dims(tl.load(delta + rows, mask=rows < nq, other=0.0), AXIS)
    p = tl.exp2((s - lse) * LOG2E)
    return p, dcap, delta


@triton.jit(do_not_specialize=["m_tiles", "n_tiles", "B", "H", "Nq", "Nk", "left", "right", "threshold"])
def attention_bwd_dbias(
    do, q, k, v, lse, delta, dbias, sdbias, bshape, m_tiles, n_tiles,
    extras, sdo, sq, sk, sv, sdq, sdk, sdv, smask, sbias, sslope,
    B, H, Nq, Nk, scale, left, right, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One tile of dbias: ds summed over bias's broadcast dimensions one after another."""
    pid = tl.program_id(0)
    n_first, pid = pid % n_tiles, pid // n_tiles
    m_first, pid = pid % m_tiles, pid // m_tiles
    bh, bb = pid % bshape[1], pid // bshape[1]
    m_end = tl.where(bshape[2] == 1, tl.cdiv(Nq, BLOCK_M), m_first + 1)
    n_end = tl.where(bshape[3] == 1, tl.cdiv(Nk, BLOCK_N), n_first + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b_index in range(bb, tl.where(bshape[0] == 1, B, bb + 1)):
        for h_index in range(bh, tl.where(bshape[1] == 1, H, bh + 1)):
            b, h = tl.cast(b_index, tl.int64), tl.cast(h_index, tl.int64)
            q_head, do_head = q + b * sq[0] + h * sq[1], do + b * sdo[0] + h * sdo[1]
            k_head, v_head = k + b * sk[0] + h // GROUP * sk[1], v + b * sv[0] + h // GROUP * sv[1]
            at = (b * H + h) * Nq
            for m in range(m_first, m_end):
                m0 = m * BLOCK_M
                rows = m0 + tl.arange(0, BLOCK_M)
                q_tile = load_tile(q_head, sq[2], m0, Nq, BLOCK_M, D, BLOCK_D, True)
                do_tile = load_tile(do_head, sdo[2], m0, Nq, BLOCK_M, Dv, BLOCK_DV, True)
                m1 = tl.minimum(m0 + BLOCK_M, Nq) - 1
                first, _whole, _whole_end, last = band_tiles(m0, m1, Nk - Nq, left, right, Nk, BLOCK_N)
                for n in range(tl.maximum(n_first, first), tl.minimum(n_end, last)):
                    n0 = n * BLOCK_N
                    k_tile = load_tile(k_head, sk[2], n0, Nk, BLOCK_N, D, BLOCK_D, True)
                    v_tile = load_tile(v_head, sv[2], n0, Nk, BLOCK_N, Dv, BLOCK_DV, True)
                    s = dot_over_d(q_tile, q_head, sq[2], m0, Nq, BLOCK_M, k_tile, k_head, sk[2], n0, Nk, BLOCK_N,
                                   D, BLOCK_D, PRECISION)
                    dp = dot_over_d(do_tile, do_head, sdo[2], m0, Nq, BLOCK_M, v_tile, v_head, sv[2], n0, Nk, BLOCK_N,
                                    Dv, BLOCK_DV, PRECISION)
                    cols = n0 + tl.arange(0, BLOCK_N)
                    p, _dcap, delta_row = probabilities(s, rows[:, None], cols[None, :], rows, lse + at, delta + at, 1,
                        extras, smask, sbias, sslope, b, b, h, Nq, Nk, scale, left, right, softcap, SOFTCAP, True)
                    if DROPOUT:
                        dp = tl.where(keep(extras, threshold, b, h, m0, n0, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
                    acc += tl.where((rows < Nq)[:, None], p * (dp - delta_row), 0.0)
    rows, cols = m_first * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], n_first * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if bshape[2] == 1:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    if bshape[3] == 1:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
    at = dbias + bb.to(tl.int64) * sdbias[0] + bh.to(tl.int64) * sdbias[1]
    at += rows.to(tl.int64) * sdbias[2] + cols.to(tl.int64) * sdbias[3]
    tl.store(at, acc.to(dbias.dtype.element_ty), mask=(rows < bshape[2]) & (cols < bshape[3]))


@triton.jit(do_not_specialize=["B", "H", "Nq"])
def attention_bwd_dsinks(sinks, lse, delta, dsinks, B, H, Nq, BLOCK: tl.constexpr):
    """dsinks[h] = -sum over rows of exp(sink - lse) * delta, one head a program."""
    h = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks + h).to(tl.float32)
    acc = tl.zeros([BLOCK], tl.float64)
    for b in range(B):
        for i0 in range(0, Nq, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            at = (b * H + h) * Nq + i
            lse_row = tl.load(lse + at, mask=i < Nq, other=float("inf"))
            delta_row = tl.load(delta + at, mask=i < Nq, other=0.0)
            acc += tl.where(lse_row == float("-inf"), 0.0, tl.exp2((sink - lse_row) * LOG2E) * delta_row)
    tl.store(dsinks + h, (-tl.sum(acc, 0)).to(tl.float32).to(dsinks.dtype.element_ty))


def rowdot(o, do, delta):
    """Fills delta (B, H, Nq) = rowsum(o * do)."""
    B, H, Nq, Dv = o.shape
    tiles = triton.cdiv(Nq, 64)
    if delta.numel() > 0:
        attention_rowdot[(tiles * B * H,)](
            o, do, delta, o.stride()[:3], do.stride()[:3], H, Nq, tiles,
            Dv=Dv, BLOCK_DV=min(block_d(Dv), 128), BLOCK_M=64,
        )


@triton.jit(do_not_specialize=["H", "Nq", "tiles"])
def attention_rowdot(
    o, do, delta, so, sdo, H, Nq, tiles, Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):
    m0, head = tl.program_id(0) % tiles * BLOCK_M, tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    o += b * so[0] + h * so[1]
    do += b * sdo[0] + h * sdo[1]
    acc = tl.zeros([BLOCK_M], tl.float32)
    for d0 in tl.static_range(0, Dv, BLOCK_DV):
        o_tile = load_tile(o + d0, so[2], m0, Nq, BLOCK_M, Dv - d0, BLOCK_DV, True).to(tl.float32)
        acc += tl.sum(o_tile * load_tile(do + d0, sdo[2], m0, Nq, BLOCK_M, Dv - d0, BLOCK_DV, True).to(tl.float32), 1)
    rows = m0 + tl.arange(0, BLOCK_M)
    tl.store(delta + (b * H + h) * Nq + rows, acc, mask=rows < Nq)
