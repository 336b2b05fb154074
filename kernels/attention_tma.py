"""Attention forward of attention.py for Hopper and later: tiles come by TMA, programs stay and take one after another.

Layouts and formula as there, bf16 and fp16. q, k, v and o are 4-D tensor descriptors (B, H, N, D) made on the host:
the copy engine fills what lies outside (N, D) with zeros and leaves o's outside alone, so no tile needs a mask of its
own, and no address is computed in registers. One program per place on the GPU; each takes the next tile when it has
one done, of a few heads at a time and the longest rows first. Each tile is computed from nothing, so which program
takes it changes no bit.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention import attend, block_d, numbers, options, row_of, strides, target, tuned

# By architecture and largest head dim: BLOCK_M, BLOCK_N, num_warps, num_stages, programs on an SM. Two stages: a tile's
# two products take 2000 clocks at a head dim of 128, half of it at 64, and the next tile comes in less.
TILES = {
    "sm_90": {  # two warp groups of 64 rows
        64: (128, 128, 8, 2, 1),  # 191 registers a thread: a second program finds no room
        128: (128, 128, 8, 2, 1),  # 193 KiB, 219 registers; attention.py's addresses make it spill 112 B
        256: (128, 32, 8, 2, 1),  # 192 KiB, of which o takes 64; 64 keys would be 256 KiB
    },
    "sm_100": {
        64: (128, 64, 8, 2, 1),  # 149 registers; 128 keys fit at 235: only that GPU can tell which is faster
        128: (128, 64, 8, 2, 1),  # 128 x 128 spills 304 B
        256: (64, 64, 8, 2, 1),  # 193 KiB: 128 of either, or a third stage, are over 227
    },
    "small": {  # 99 KiB: sm_120 and whatever is not listed; beyond 128 q fills the registers: 64 x 32 spills 688 B
        64: (128, 64, 8, 2, 1),  # 163 registers; 128 keys fit at 237
        128: (128, 64, 8, 2, 1),  # 128 keys spill 160 B
    },
}
L2 = 32 << 20  # bytes of k and v that the programs work on at a time: of the 50 MB of an H100 or H200


def table(arch):
    """Tiles by largest head dim; none where the GPU has no TMA."""
    later = arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90
    return TILES.get(arch, TILES["small"] if later else {})


def tile(D, dtype):
    """BLOCK_M, BLOCK_N, num_warps, num_stages and programs on an SM."""
    if found := tuned("fwd_tma", row_of(D), dtype):
        return found
    rows = table(target())
    return rows[min(d for d in rows if d >= D)]


def refuses(q, k, v, spec, extras):
    """Why the forward of attention.py runs instead, or None."""
    if not (rows := table(target())):
        return f"{target()} has no TMA"
    if q.dtype == torch.float32:
        return "float32 takes no tensor core"
    if max(q.shape[3], v.shape[3]) > max(rows):
        return f"head dim {max(q.shape[3], v.shape[3])} is over {max(rows)}"
    if extras.packed:
        return "packed sequences begin where no descriptor does"
    if extras.mask is not None or extras.bias is not None:
        return "tiles of a mask or bias take the shared memory"
    if not spec.scale > 0:
        return f"scale {spec.scale} is not positive"
    if spec.dropout_p:
        return "dropout's random words take the registers"
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return "an empty tensor has no descriptor"
    if v.shape[3] % 8:
        return f"o's rows of {v.shape[3]} elements are not a multiple of 16 bytes"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
        if t.stride(3) != 1:
            return f"{name}'s head dim is strided"
        if any(n > 1 and (s == 0 or s % 8) for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)):
            return f"{name}'s strides are not multiples of 16 bytes"
    return None


def descriptor(t, rows, columns):
    """Of tiles (rows, columns) of t (B, H, N, D). A dimension of 1 may have any stride, the descriptor's 16 bytes."""
    step = [s if n > 1 else 8 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*step, 1], [1, 1, rows, columns])


@functools.cache
def sms(device):
    if target() == "interpreter":
        return 2  # so that each takes several tiles
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def forward(q, k, v, o, lse, spec, extras):
    """Fills o, and lse unless it is None, where refuses(...) is None."""
    B, H, Nq, D = q.shape
    Nk, Dv = v.shape[2:]
    block_m, block_n, num_warps, num_stages, on_sm = tile(max(D, Dv), q.dtype)
    tiles, group = triton.cdiv(Nq, block_m) * B * H, H // k.shape[1]
    heads = min(max(1, L2 // (Nk * (D + Dv) * q.element_size())) * group, B * H)
    # Handed out, not dealt: with causal lengths of 2k to 16k the slowest of 132 programs gets 3 to 30 % more than its
    # share of keys when tiles are dealt in rounds, at most 1.7 % when each program asks for its next one.
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    attention_fwd_tma[(min(tiles, sms(q.device.index) * on_sm),)](
        descriptor(q, block_m, block_d(D)), descriptor(k, block_n, block_d(D)), descriptor(v, block_n, block_d(Dv)),
        descriptor(o, block_m, block_d(Dv)), lse, taken, extras, strides(extras, (B, H, Nq, Nk))[2],
        B, H, Nq, Nk, heads, *numbers(spec)[:4],
        D=D, Dv=Dv, BLOCK_D=block_d(D), BLOCK_DV=block_d(Dv), BLOCK_M=block_m, BLOCK_N=block_n,
        **options(spec, q, k), num_warps=num_warps, num_stages=num_stages,
    )


@triton.jit(do_not_specialize=["B", "H", "Nq", "Nk", "heads", "left", "right"])
def attention_fwd_tma(
    q, k, v, o, lse, taken, extras, sslope, B, H, Nq, Nk, heads, scale, left, right, softcap,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    m_tiles, programs, t = tl.cdiv(Nq, BLOCK_M), tl.num_programs(0), tl.program_id(0)
    while t < m_tiles * B * H:
        after = programs + tl.atomic_add(taken, 1, sem="relaxed")  # asked for early: the answer takes a microsecond
        first = t // (heads * m_tiles) * heads  # of the heads whose k and v share the L2 cache
        t -= first * m_tiles
        heads_here = tl.minimum(heads, B * H - first)
        head, m0 = first + t % heads_here, (m_tiles - 1 - t // heads_here) * BLOCK_M
        b, h = head // H, head % H
        acc, lse_row = attend(
            (q, b, h), (k, b, h // GROUP), (v, b, h // GROUP), extras, None, None, None, None, None, sslope,
            b, b, h, m0, Nq, Nk, Dv, scale, left, right, softcap, 0, 1.0,
            D, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, SOFTCAP, DROPOUT, PRECISION)
        o.store([b, h, m0, 0], tl.reshape(acc.to(o.dtype), [1, 1, BLOCK_M, BLOCK_DV]))
        if lse is not None:
            rows = m0 + tl.arange(0, BLOCK_M)
            tl.store(lse + head.to(tl.int64) * Nq + rows, lse_row, mask=rows < Nq)
        t = after
