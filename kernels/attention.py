"""Attention forward with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691).

q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv), o (B, H, Nq, Dv), lse (B, H, Nq) float32, natural log; packed
sequences are (1, H, T, D). One program computes BLOCK_M rows of o for one (batch, head), for at most 256 columns of Dv,
streaming k and v in blocks of BLOCK_N. Key tiles outside the band are never visited and only the tiles on its edges and
at the end of k are masked. exp is exp2, one instruction, with LOG2E folded into its argument.
"""

import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def target() -> str:
    """The GPU that a launch would compile for: sm_90, gfx942, or interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    found = triton.runtime.driver.active.get_current_target()
    return f"sm_{found.arch}" if found.backend == "cuda" else found.arch


# By architecture and largest head dim: BLOCK_M, BLOCK_N, num_warps, num_stages of fwd, dkdv and dq. Chosen by compiling
# for each GPU (llmfast inspect; llmfast tune --dry-run lists the neighbours): large tiles that keep registers (255 a
# thread) and shared memory within bounds. "fits": larger would too; only that GPU can tell which is faster.
TILES = {
    "sm_80": {
        64: ((128, 64, 8, 2), (32, 64, 4, 2), (128, 64, 8, 2)),  # 64 x 64 in dkdv spills 216 B
        128: ((128, 64, 8, 2), (32, 64, 8, 2), (64, 64, 4, 2)),  # 64 KiB in fwd: two blocks an SM; dq 128 x 64 spills
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)),  # dk and dv alone take 64 registers a thread
        512: ((64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),  # 256 columns at a time; a second stage spills
    },
    "sm_90": {
        64: ((128, 128, 8, 2), (64, 128, 8, 2), (128, 128, 8, 2)),  # two warp groups of 64 rows
        128: ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),  # fwd 128 x 128 spills 112 B
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (128, 16, 8, 2)),  # 64 keys in dkdv spill 728 B, dq 64 x 32 32 B
        512: ((64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),  # 256 columns at a time; dq 128 x 16 spills 360 B
    },
    "sm_100": {
        64: ((128, 64, 8, 2), (32, 64, 4, 2), (128, 64, 8, 2)),  # dkdv spills 24 B; 128 keys fit in fwd and dq
        128: ((128, 64, 8, 2), (32, 64, 8, 1), (64, 64, 4, 2)),  # two stages in dkdv spill 288 B with Triton 3.6
        256: ((64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),  # fwd: 128 rows spill 184 B, 128 keys 88; 2 stages fit
    },
    "gfx942": {  # 64 KiB; 4 warps may use 512 registers a lane, 8 only 256; its compiler can't stage a bool mask
        64: ((128, 64, 4, 1), (64, 64, 4, 1), (128, 64, 4, 1)),  # 240, 337, 266 registers; 128 keys fit at 246 to 383
        128: ((128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 4, 1)),  # 300, 356 and 363; twice the rows fit at 396 to 453
        256: ((64, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),  # 385, 446 and 427; in dkdv 64 keys spill 108 B
        512: ((64, 64, 4, 1), (32, 16, 4, 1), (64, 16, 4, 1)),  # 256 columns at a time; 32 keys spill 308 to 660 B
    },
    "gfx942 float32": {256: ((16, 16, 4, 1),) * 3, 128: ((32, 32, 4, 1),) * 3},  # as float32, in warps of 512 registers
    "small": {  # 99 KiB of shared memory: sm_86, sm_89, sm_120 and whatever of NVIDIA's is not listed
        64: ((128, 64, 8, 2), (32, 64, 4, 2), (128, 64, 8, 2)),  # 128 keys spill 224 B in dq, 120 in dkdv
        128: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2)),  # 128 keys spill 224 B, 296 in dkdv; dq 128 x 64 56 B
        256: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),  # dkdv with 64 of either is over 99 KiB; fwd 64 keys fit
    },
    "float32": {  # multiply-adds instead of tensor cores: operands and results all in registers
        64: ((32, 32, 4, 2),) * 3,  # 64 of either spill 128 to 1256 B
        128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 2)),  # dq in one stage keeps more: 88 B spilled
        256: ((16, 16, 8, 1),) * 3,  # fwd 64 x 32 spills 1264 B in 8 warps, 2376 in 4
    },
    "sm_80 tf32": {  # 4 bytes an element in shared memory, so half the keys of bf16
        64: ((128, 64, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2)),  # 64 KiB in fwd: two blocks an SM
        128: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),  # fwd 64 keys spill 8 B, dkdv 64 keys more
        256: ((64, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),  # dkdv 32 x 32 would take 160 KiB
    },
    "sm_90 tf32": {
        64: ((128, 64, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2)),  # two warp groups of 64 rows, 64 keys in dkdv
        128: ((128, 32, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2)),  # fwd 64 keys spill 104 B; dkdv 64 keys spill
        256: ((64, 16, 8, 2), (32, 16, 8, 1), (32, 32, 8, 1)),  # 64 rows in dq and fwd 64 x 32 spill
    },
    "sm_100 tf32": {
        64: ((128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)),  # 223, 255 and 118 registers; dkdv spills 88 B
        128: ((128, 32, 8, 2), (32, 64, 8, 1), (64, 32, 8, 2)),  # 128 rows in dq fit too, in 209 KiB
        256: ((64, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),  # 64 rows in dq spill
    },
    "gfx942 tf32": {
        64: ((128, 32, 8, 2), (32, 64, 4, 2), (128, 32, 8, 2)),  # fwd 64 keys fill the 64 KiB
        128: ((64, 32, 8, 2), (16, 32, 4, 1), (32, 32, 4, 2)),  # dkdv 32 x 32 spills 312 B; dq 64 x 32 fits
        256: ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)),  # 32 KiB each
    },
    "tf32": {  # as "small": 99 KiB
        64: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),  # with a mask and a bias twice as much is over
        128: ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),  # 128 rows fill it
        256: ((32, 32, 8, 1), (16, 16, 8, 1), (32, 16, 4, 1)),  # 68, 80 and 96 KiB
    },
    "interpreter": {256: ((64, 64, 4, 1),) * 3},  # its time goes by the number of tiles
}


TUNED = {}  # (architecture, kernel, size, dtype): what `llmfast tune` measured on this machine, before any table's row


def arithmetic(dtype):
    """The dtype's name, or tf32 where PyTorch has been told to round float32 products: tensor cores take those."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = tf32 and (target() == "gfx942" or not target().startswith("gfx"))  # gfx90a and gfx950 have no such product
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def tuned(kernel, size, dtype):
    """The measured tile of any kernel for this GPU, or None. dtype: a torch.dtype or what arithmetic says of one."""
    return TUNED.get((target(), kernel, size, str(dtype).removeprefix("torch."))) if TUNED else None


def row_of(D):
    """The head dim whose measured row serves D; beyond 256 there is none."""
    return next((d for d in (64, 128, 256) if d >= D), D)


def tile(kernel, D, dtype):
    """BLOCK_M, BLOCK_N, num_warps, num_stages of fwd, dkdv or dq."""
    kind = arithmetic(dtype)
    if found := tuned(kernel, row_of(D), kind):
        return found
    arch = target()
    if arch != "interpreter":
        arch = "gfx942" if arch.startswith("gfx") else arch  # only its rows leave a bool mask in one stage
        names = (f"{arch} {kind}", kind) if dtype == torch.float32 else (arch, "small")
        arch = next(name for name in names if name in TILES)
    rows = TILES[arch]
    return rows[min((d for d in rows if d >= D), default=max(rows))][("fwd", "dkdv", "dq").index(kernel)]


def block_d(D):
    """The head dimension as a tile: a power of two that tl.dot takes, at most 256 at a time."""
    return min(max(16, triton.next_power_of_2(D)), 256)


def options(spec, q, k):
    """The compile-time options that every attention kernel shares."""
    return dict(
        SOFTCAP=spec.softcap != 0, DROPOUT=spec.dropout_p > 0, GROUP=q.shape[1] // k.shape[1],
        PRECISION="tf32" if arithmetic(q.dtype) == "tf32" else "ieee",
    )


def numbers(spec):
    """scale, left, right, softcap, and the dropout threshold and factor; the threshold is moved to fit an int32."""
    p = spec.dropout_p
    threshold = min(int(p * 2**32), 2**32 - 1) - 2**31
    return spec.scale, spec.left, spec.right, spec.softcap, threshold, 1 / (1 - p) if p < 1 else 0.0


def strides(extras, shape):
    """Strides of mask and bias broadcast to (B, H, Nq, Nk), 0 where broadcast, and of the slopes (B, H).

    Rows whose stride is a multiple of 16 load as vectors: they compile apart from others.
    """
    wide = lambda t: None if t is None else t.expand(shape).stride()
    slopes = extras.alibi_slopes
    slope = None if slopes is None else slopes.stride()[0] if slopes.dim() == 2 else 0
    return wide(extras.mask), wide(extras.bias), slope


def sizes(q, k, extras):
    """Number of sequences, H, Nq, Nk."""
    B, H, Nq, _ = q.shape
    return extras.cu_seqlens_q.shape[0] - 1 if extras.packed else B, H, Nq, k.shape[2]


def forward(q, k, v, o, lse, spec, extras):
    """Fills o, and lse unless it is None. Packed: rows that no sequence covers are left as they are."""
    B, H, Nq, Nk = sizes(q, k, extras)
    D, Dv = q.shape[3], v.shape[3]
    block_m, block_n, num_warps, num_stages = tile("fwd", max(D, Dv), q.dtype)
    if extras.packed and max(D, Dv) > 128:
        block_n = min(block_n, 32)  # where a sequence starts and ends takes registers: 64 x 64 spills 32 B on sm_90
    if extras.mask is not None and extras.bias is not None and extras.bias.itemsize > q.itemsize:
        num_stages = max(1, num_stages - 1)  # both are staged too: 104 of sm_120's 99 KiB in two stages at D = 128
    tiles = triton.cdiv(Nq, block_m) + (B if extras.packed else 0)
    heads, chunks = H if extras.packed else B * H, max(1, triton.cdiv(Dv, 256))
    if Nq * heads * B == 0:
        return
    attention_fwd[(tiles * heads * chunks,)](
        q, k, v, o, lse, extras, q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3],
        *strides(extras, (B, H, Nq, Nk)), B, H, Nq, Nk, tiles, *numbers(spec),
        D=D, Dv=Dv, BLOCK_D=block_d(D), BLOCK_DV=block_d(Dv), BLOCK_M=block_m, BLOCK_N=block_n,
        FLOAT32=q.dtype == torch.float32, **options(spec, q, k), num_warps=num_warps, num_stages=num_stages,
    )


@triton.jit(do_not_specialize=["B", "H", "Nq", "Nk", "tiles", "left", "right", "threshold"])
def attention_fwd(
    q, k, v, o, lse, extras, sq, sk, sv, so, smask, sbias, sslope,
    B, H, Nq, Nk, tiles, scale, left, right, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FLOAT32: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    CHUNKS: tl.constexpr = max(1, (Dv + BLOCK_DV - 1) // BLOCK_DV)
    chunk, pid = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    b, h, seq, tile, q0, k0, nq, nk = locate(extras, extras.cu_seqlens_q, Nq, BLOCK_M, pid, tiles, B, H, Nq, Nk)
    tile = tl.cdiv(nq, BLOCK_M) - 1 - tile  # under causal the longest rows start first
    m0 = tile * BLOCK_M
    if m0 < 0:
        return
    q += b * sq[0] + h * sq[1] + q0 * sq[2]
    k += b * sk[0] + h // GROUP * sk[1] + k0 * sk[2]
    v += b * sv[0] + h // GROUP * sv[1] + k0 * sv[2] + chunk * BLOCK_DV
    acc, lse_row = attend(
        q, k, v, extras, sq[2], sk[2], sv[2], smask, sbias, sslope, b, seq, h, m0, nq, nk, Dv - chunk * BLOCK_DV,
        scale, left, right, softcap, threshold, keep_scale,
        D, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FLOAT32, SOFTCAP, DROPOUT, PRECISION)
    o += b * so[0] + h * so[1] + q0 * so[2] + chunk * BLOCK_DV
    store_tile(o, so[2], m0, nq, BLOCK_M, Dv - chunk * BLOCK_DV, BLOCK_DV, acc)
    if lse is not None:
        rows = m0 + tl.arange(0, BLOCK_M)
        tl.store(lse + (b * H + h) * Nq + q0 + rows, lse_row, mask=rows < tl.where(chunk == 0, nq, 0))


@triton.jit
def attend(
    q, k, v, extras, sq, sk, sv, smask, sbias, sslope, b, seq, h, m0, nq, nk, Dv,
    scale, left, right, softcap, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FLOAT32: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """o (BLOCK_M, BLOCK_DV) and lse (BLOCK_M,) of the rows from m0 on, float32; q, k, v as load_tile takes them."""
    RAW: tl.constexpr = not SOFTCAP and extras.bias is None and extras.alibi_slopes is None and D <= BLOCK_D
    q_tile = load_tile(q, sq, m0, nq, BLOCK_M, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
    unit = 1.0
    if RAW:  # |scale| goes into exp2's multiply-add and its sign into q, so that the maximum is taken before scaling
        unit = tl.where(scale == 0, 1.0, tl.abs(scale))
        if sq is not None:  # by TMA scale is positive, and q stays in shared memory: D = 256 would spill 112 B on sm_90
            sign = tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0))
            q_tile = (q_tile.to(tl.float32) * sign).to(q_tile.dtype)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running row maximum; m * unit is in natural units
    l = tl.zeros([BLOCK_M], tl.float32)  # running row sum
    if extras.sinks is not None:  # like a key that has this score and no value
        sink = tl.load(extras.sinks + h).to(tl.float32) / unit
        m, l = tl.zeros([BLOCK_M], tl.float32) + sink, l + tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, whole, whole_end, last = band_tiles(m0, tl.minimum(m0 + BLOCK_M, nq) - 1, nk - nq, left, right, nk, BLOCK_N)
    for EDGE in tl.static_range(2):
        for t in range(whole if EDGE == 0 else first, whole_end if EDGE == 0 else last - (whole_end - whole)):
            n0 = t * BLOCK_N
            if EDGE == 1:  # the tiles left and right of the whole ones
                n0 += tl.where(t < whole, 0, whole_end - whole) * BLOCK_N
            k_tile = load_tile(k, sk, n0, nk, BLOCK_N, D, BLOCK_D, EDGE)  # (BLOCK_N, BLOCK_D)
            s = dot_over_d(q_tile, q, sq, m0, nq, BLOCK_M, k_tile, k, sk, n0, nk, BLOCK_N, D, BLOCK_D, PRECISION)
            rows, cols = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            s, _ = scores(s, rows[:, None], cols[None, :], extras, smask, sbias, sslope, b, seq, h, nq, nk,
                          scale, left, right, softcap, SOFTCAP, RAW, EDGE)  # (BLOCK_M, BLOCK_N)
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key
            if FLOAT32:
                p = tl.exp2((s - m_safe[:, None]) * (unit * LOG2E))
            else:  # one multiply-add; rounding its product would cost float32 half its digits in large scores
                p = tl.exp2(tl.fma(s, unit * LOG2E, -(m_safe * (unit * LOG2E))[:, None]))
            alpha = tl.exp2((m - m_safe) * (unit * LOG2E))
            l = l * alpha + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(keep(extras, threshold, seq, h, m0, n0, BLOCK_M, BLOCK_N), p, 0.0)
            v_tile = load_tile(v, sv, n0, nk, BLOCK_N, Dv, BLOCK_DV, EDGE)  # (BLOCK_N, BLOCK_DV)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
    acc *= (keep_scale / tl.where(l == 0, 1.0, l))[:, None]
    log_l = tl.log2(tl.where(l == 0, 1.0, l))
    lse = m * unit + log_l * LN2 if FLOAT32 else (m * (unit * LOG2E) + log_l) * LN2  # the maximum as exp2 saw it
    return acc, tl.where(l == 0, float("-inf"), lse)


@triton.jit
def locate(extras, cu_seqlens, total, BLOCK: tl.constexpr, pid, tiles, B, H, Nq, Nk):
    """What program pid works on: batch, head, sequence, its tile in it; its start in q and k, its lengths.

    In a packed batch sequence s owns the tiles from cu_seqlens[s] // BLOCK + s on, which leaves each enough of them.
    """
    tile, head = pid % tiles, pid // tiles
    if extras.cu_seqlens_q is None:
        return (head // H).to(tl.int64), (head % H).to(tl.int64), head // H, tile, 0, 0, Nq, Nk
    else:
        s, end = 0, B
        while end - s > 1:
            middle = (s + end) // 2
            before = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), total) // BLOCK + middle <= tile
            s, end = tl.where(before, middle, s), tl.where(before, end, middle)
        q0, q1 = bounds(extras.cu_seqlens_q + s, Nq)
        k0, k1 = bounds(extras.cu_seqlens_k + s, Nk)
        tile -= tl.minimum(tl.maximum(tl.load(cu_seqlens + s), 0), total) // BLOCK + s
        return head.to(tl.int64) * 0, head.to(tl.int64), s, tile, q0.to(tl.int64), k0.to(tl.int64), q1 - q0, k1 - k0


@triton.jit
def bounds(cu_seqlens, total):
    """Start and end of a sequence, within the tensor whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens), 0), total)
    return start, tl.minimum(tl.maximum(tl.load(cu_seqlens + 1), start), total)


@triton.jit
def band_tiles(x0, x1, offset, left, right, N, BLOCK: tl.constexpr):
    """Tiles of y that rows x0..x1 see when -left <= y - x - offset <= right: first, whole, whole_end, last.

    The whole ones lie inside the band for every row and need no mask.
    """
    first = tl.maximum(x0 + offset - left, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(x1 + offset + right + 1, 0), N), BLOCK), first)
    whole = tl.cdiv(tl.maximum(x1 + offset - left, 0), BLOCK)
    whole = tl.minimum(tl.maximum(whole, first), last)
    whole_end = tl.minimum(tl.maximum(x0 + offset + right + 1, 0), N) // BLOCK
    return first, whole, tl.minimum(tl.maximum(whole_end, whole), last), last


@triton.jit
def load_tile(t, stride, n0, N, BLOCK: tl.constexpr, D, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """(BLOCK, BLOCK_D) from row n0 on, zero outside (N, D). No stride: t is a TMA descriptor, a batch and a head."""
    if stride is None:
        return tl.reshape(t[0].load([t[1], t[2], n0, 0]), [BLOCK, BLOCK_D])
    else:
        n, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
        at = t + tl.cast(n0, tl.int64) * stride + (n.to(tl.int64) * stride + d)
        if EDGE:
            return tl.load(at, mask=(n < N - n0) & (d < D), other=0.0)
        else:
            return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def store_tile(t, stride, n0, N, BLOCK: tl.constexpr, D, BLOCK_D: tl.constexpr, value):
    n, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = t + tl.cast(n0, tl.int64) * stride + (n.to(tl.int64) * stride + d)
    tl.store(at, value.to(t.dtype.element_ty), mask=(n < N - n0) & (d < D))


@triton.jit
def dot_over_d(
    a_tile, a, sa, m0, M, BLOCK_M: tl.constexpr, b_tile, b, sb, n0, N, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):
    """a b^T: (BLOCK_M, BLOCK_N) float32, from the tiles, or from memory in pieces where D is beyond BLOCK_D."""
    if D <= BLOCK_D:
        return tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            a_part = load_tile(a + d0, sa, m0, M, BLOCK_M, D - d0, BLOCK_D, True)
            b_part = load_tile(b + d0, sb, n0, N, BLOCK_N, D - d0, BLOCK_D, True)
            s = tl.dot(a_part, tl.trans(b_part), s, input_precision=PRECISION)
        return s


@triton.jit
def scores(
    s, i, j, extras, smask, sbias, sslope, b, seq, h, nq, nk, scale, left, right, softcap,
    SOFTCAP: tl.constexpr, RAW: tl.constexpr, EDGE: tl.constexpr,
):
    """q k^T to scores, and the derivative of softcap; i and j are query and key indices shaped to broadcast to s.

    RAW leaves them unscaled. Where not EDGE the whole tile is inside the band and k.
    """
    dcap = 1.0
    if SOFTCAP:
        t, dcap = tanh(s * (scale / softcap))
        dcap = 1 - t * t  # u (2 - u) keeps 300 B more on the stack of dq on sm_90
        s = t * softcap
    elif not RAW:
        s = s * scale
    inside = (i < nq) & (j < nk)
    if extras.bias is not None:
        at = extras.bias + b * sbias[0] + h * sbias[1] + (i.to(tl.int64) * sbias[2] + j.to(tl.int64) * sbias[3])
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if extras.alibi_slopes is not None:
        slope = tl.load(extras.alibi_slopes + seq * sslope + h)
        s -= slope * tl.abs(i + (nk - nq) - j).to(tl.float32)
    if EDGE:
        distance = j - i - (nk - nq)
        s = tl.where((j < nk) & (distance >= -left) & (distance <= right), s, float("-inf"))
    if extras.mask is not None:
        at = extras.mask + b * smask[0] + h * smask[1] + (i.to(tl.int64) * smask[2] + j.to(tl.int64) * smask[3])
        s = tl.where(tl.load(at, mask=inside, other=0).to(tl.int1), s, float("-inf"))
    return s, dcap


@triton.jit
def tanh(x):
    """tanh(x) and its derivative; near 0, where 1 - u would lose digits, a polynomial fitted on [0, 0.625] to 2e-10."""
    u = 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    y = x * x
    small = 0.021700493 + y * (-0.008177074 + y * 0.002142785)
    small = x + x * y * (-0.333333308 + y * (0.133332052 + y * (-0.053946702 + y * small)))
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, u - 1, 1 - u)), u * (2 - u)


@triton.jit
def keep(extras, threshold, seq, h, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of (BLOCK_M, BLOCK_N) survive dropout: Philox word column % 4 at (column // 4, row, head, sequence)."""
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    column, row = n0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :] + zero, m0 + tl.arange(0, BLOCK_M)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(extras.seed), column, row, h.to(tl.int32) + zero, tl.cast(seq, tl.int32) + zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_M, BLOCK_N])
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
