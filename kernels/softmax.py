"""softmax and log_softmax over the last dimension of x (L0, L1, M, N), any strides.

s = scale * x + bias, hidden entries -inf; y = exp(s - max) / sum or s - max - log(sum). One program computes BLOCK_M
rows: in one block of columns when N fits (reads MN, writes MN), otherwise block by block with a running maximum and sum
(reads 2MN, writes MN). Backward: ds = y (dy - sum(y dy)), or dy - exp(y) sum(dy) for log; dx = scale * ds; dbias sums
ds over bias's broadcast dimensions. bias and mask carry stride 0 where they are broadcast. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from .attention import target, tuned

ONE_BLOCK = 32768  # columns held at once: 32 registers a thread at 32 warps, in float32; 64 at 16 warps spill 24 B
WIDE_BLOCK = 8192  # columns a step beyond that


def tile(kernel, M, N, dtype, one_block=ONE_BLOCK):
    """BLOCK_M, BLOCK_N and num_warps: 4096 elements a program in short rows, so that a warp's loads are full."""
    block_n = max(16, triton.next_power_of_2(N))
    if found := tuned(kernel, min(block_n, 2 * one_block), dtype):
        return min(found[0], triton.next_power_of_2(M)), *found[1:]
    if block_n > one_block:
        return 1, WIDE_BLOCK, 8
    block_m = min(max(1, 4096 // block_n), triton.next_power_of_2(M))
    most = 16 if target().startswith("gfx") else 32  # 1024 threads
    return block_m, block_n, min(max(block_m * block_n // 1024, 1), most)


def forward(x, out, spec, extras):
    y = torch.empty_like(x) if out is None else out
    L0, L1, M, N = x.shape
    if x.numel() == 0:
        return y
    block_m, block_n, num_warps = tile("softmax_fwd", M, N, x.dtype)
    softmax_fwd[(L0 * L1 * triton.cdiv(M, block_m),)](
        x, y, extras, x.stride(), y.stride(), _strides(extras.mask, x), _strides(extras.bias, x),
        L1, M, N, spec.scale, spec.offset,
        LOG=spec.log, BLOCK_M=block_m, BLOCK_N=block_n, ONE=block_n >= N, num_warps=num_warps,
    )
    return y


@triton.jit(do_not_specialize=["L1", "M", "N", "offset"])
def softmax_fwd(
    x, y, extras, sx, sy, smask, sbias,
    L1, M, N, scale, offset,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr,
):
    l0, l1, rows = _rows(L1, M, BLOCK_M)
    if ONE:
        cols = tl.arange(0, BLOCK_N)
        s = _scores(x, extras, sx, smask, sbias, l0, l1, rows, cols, M, N, scale, offset)  # (BLOCK_M, BLOCK_N)
        m = tl.max(s, 1)
        m_safe = tl.where(m == float("-inf"), 0.0, m)  # a row with nothing visible
        e = tl.exp(s - m_safe[:, None])
        l = row_sum(e)
        l = tl.where(l == 0, 1.0, l)
        _store(y, sy, l0, l1, rows, cols, M, N, s - (m_safe + tl.log(l))[:, None] if LOG else e / l[:, None])
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            s = _scores(x, extras, sx, smask, sbias, l0, l1, rows, n0 + tl.arange(0, BLOCK_N), M, N, scale, offset)
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            l = l * tl.exp(m - m_safe) + row_sum(tl.exp(s - m_safe[:, None]))
            m = m_new
        m_safe = tl.where(m == float("-inf"), 0.0, m)
        l = tl.where(l == 0, 1.0, l)
        lse = m_safe + tl.log(l)
        for n0 in range(0, N, BLOCK_N):
            cols = n0 + tl.arange(0, BLOCK_N)
            s = _scores(x, extras, sx, smask, sbias, l0, l1, rows, cols, M, N, scale, offset)
            result = s - lse[:, None] if LOG else tl.exp(s - m_safe[:, None]) / l[:, None]
            _store(y, sy, l0, l1, rows, cols, M, N, result)


@triton.jit
def _rows(L1, M, BLOCK_M: tl.constexpr):
    """Which rows this program computes: l0, l1 and BLOCK_M rows."""
    tiles = tl.cdiv(M, BLOCK_M)
    slice = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return (slice // L1).to(tl.int64), (slice % L1).to(tl.int64), rows


@triton.jit
def _at(t, st, l0, l1, rows, cols):
    """Pointers (rows, cols) into a (L0, L1, M, N) tensor."""
    return t + l0 * st[0] + l1 * st[1] + rows[:, None].to(tl.int64) * st[2] + cols[None, :].to(tl.int64) * st[3]


@triton.jit
def _scores(x, extras, sx, smask, sbias, l0, l1, rows, cols, M, N, scale, offset):
    """scale * x + bias, -inf where hidden or outside: (rows, cols) in float32."""
    seen = (rows[:, None] < M) & (cols[None, :] < N) & (cols[None, :] - rows[:, None] <= offset)
    if extras.mask is not None:
        seen = seen & tl.load(_at(extras.mask, smask, l0, l1, rows, cols), mask=seen, other=0).to(tl.int1)
    s = tl.load(_at(x, sx, l0, l1, rows, cols), mask=seen, other=0.0).to(tl.float32) * scale
    if extras.bias is not None:
        s += tl.load(_at(extras.bias, sbias, l0, l1, rows, cols), mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def row_sum(e):
    """Sums of rows: of 32 columns in float32, of those in float64; a sum wrong in its last bit shifts the whole row."""
    if e.shape[1] > 32:
        e = tl.sum(tl.reshape(e, [e.shape[0], e.shape[1] // 32, 32]), 2).to(tl.float64)
    return tl.sum(e, 1).to(tl.float32)


@triton.jit
def _store(y, sy, l0, l1, rows, cols, M, N, value):
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(_at(y, sy, l0, l1, rows, cols), value.to(y.dtype.element_ty), mask=inside)


def backward(dy, y, spec, extras):
    dx = torch.empty_like(y)
    bias = extras.bias
    dbias = None if bias is None else torch.zeros_like(bias)
    L0, L1, M, N = y.shape
    if y.numel() == 0:
        return dx, dbias
    # y and dy: 32768 columns of both spill
    block_m, block_n, num_warps = tile("softmax_bwd", M, N, y.dtype, ONE_BLOCK // 2)
    t = torch.empty(L0, L1, M, device=y.device, dtype=torch.float32) if bias is not None else None
    softmax_bwd[(L0 * L1 * triton.cdiv(M, block_m),)](
        dy, y, dx, t, dy.stride(), y.stride(), dx.stride(),
        L1, M, N, spec.scale,
        LOG=spec.log, BLOCK_M=block_m, BLOCK_N=block_n, ONE=block_n >= N, num_warps=num_warps,
    )
    if bias is not None:
        Lb0, Lb1, Mb, Nb = bias.shape
        tiles = (1 if Mb == 1 else triton.cdiv(M, 32)) * (1 if Nb == 1 else triton.cdiv(N, 128))
        softmax_bwd_dbias[(Lb0 * Lb1 * tiles,)](
            dy, y, t, dbias, dy.stride(), y.stride(), dbias.stride(),
            L0, L1, M, N, bias.shape,
            LOG=spec.log, BLOCK_M=32, BLOCK_N=128,
        )
    return dx, dbias


@triton.jit(do_not_specialize=["L1", "M", "N"])
def softmax_bwd(
    dy, y, dx, t, sdy, sy, sdx,
    L1, M, N, scale,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr,
):
    """dx, and where t is given the row sums t (L0, L1, M) that dbias needs."""
    l0, l1, rows = _rows(L1, M, BLOCK_M)
    if ONE:
        cols = tl.arange(0, BLOCK_N)
        y_tile, dy_tile = _pair(dy, y, sdy, sy, l0, l1, rows, cols, M, N, LOG)  # (BLOCK_M, BLOCK_N)
        total = row_sum(dy_tile if LOG else y_tile * dy_tile)
        _store(dx, sdx, l0, l1, rows, cols, M, N, _ds(y_tile, dy_tile, total, LOG) * scale)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            y_tile, dy_tile = _pair(dy, y, sdy, sy, l0, l1, rows, n0 + tl.arange(0, BLOCK_N), M, N, LOG)
            total += row_sum(dy_tile if LOG else y_tile * dy_tile)
        for n0 in range(0, N, BLOCK_N):
            cols = n0 + tl.arange(0, BLOCK_N)
            y_tile, dy_tile = _pair(dy, y, sdy, sy, l0, l1, rows, cols, M, N, LOG)
            _store(dx, sdx, l0, l1, rows, cols, M, N, _ds(y_tile, dy_tile, total, LOG) * scale)
    if t is not None:
        tl.store(t + (l0 * L1 + l1) * M + rows, total, mask=rows < M)


@triton.jit
def _pair(dy, y, sdy, sy, l0, l1, rows, cols, M, N, LOG: tl.constexpr):
    """y and dy (rows, cols) in float32; dy is 0 where log_softmax is -inf."""
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    y_tile = tl.load(_at(y, sy, l0, l1, rows, cols), mask=inside, other=float("-inf") if LOG else 0.0).to(tl.float32)
    dy_tile = tl.load(_at(dy, sdy, l0, l1, rows, cols), mask=inside, other=0.0).to(tl.float32)
    if LOG:
        dy_tile = tl.where(y_tile == float("-inf"), 0.0, dy_tile)
    return y_tile, dy_tile


@triton.jit
def _ds(y_tile, dy_tile, total, LOG: tl.constexpr):
    return dy_tile - tl.exp(y_tile) * total[:, None] if LOG else y_tile * (dy_tile - total[:, None])


@triton.jit(do_not_specialize=["L0", "L1", "M", "N"])
def softmax_bwd_dbias(
    dy, y, t, dbias, sdy, sy, sdb,
    L0, L1, M, N, shape,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One tile of dbias, summed over the broadcast dimensions one after another."""
    m_tiles = tl.where(shape[2] == 1, 1, tl.cdiv(M, BLOCK_M))
    n_tiles = tl.where(shape[3] == 1, 1, tl.cdiv(N, BLOCK_N))
    pid = tl.program_id(0)
    n_first, pid = pid % n_tiles * BLOCK_N, pid // n_tiles
    m_first, pid = pid % m_tiles * BLOCK_M, pid // m_tiles
    b1, b0 = (pid % shape[1]).to(tl.int64), (pid // shape[1]).to(tl.int64)
    m_end = tl.where(shape[2] == 1, M, m_first + 1)
    n_end = tl.where(shape[3] == 1, N, n_first + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for l0 in range(b0, tl.where(shape[0] == 1, L0, b0 + 1)):
        for l1 in range(b1, tl.where(shape[1] == 1, L1, b1 + 1)):
            for m0 in range(m_first, m_end, BLOCK_M):
                rows = m0 + tl.arange(0, BLOCK_M)
                total = tl.load(t + (l0 * L1 + l1) * M + rows, mask=rows < M, other=0.0)
                for n0 in range(n_first, n_end, BLOCK_N):
                    y_tile, dy_tile = _pair(dy, y, sdy, sy, l0, l1, rows, n0 + tl.arange(0, BLOCK_N), M, N, LOG)
                    acc += _ds(y_tile, dy_tile, total, LOG)
    rows, cols = m_first + tl.arange(0, BLOCK_M), n_first + tl.arange(0, BLOCK_N)
    if shape[2] == 1:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
    if shape[3] == 1:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
    _store(dbias, sdb, b0, b1, rows, cols, shape[2], shape[3], acc)


def _strides(t, x):
    """Strides of a mask or bias broadcast to x; 0 where broadcast."""
    return None if t is None else t.expand(x.shape).stride()
