"""Attention over a sequence that is spread over processes (context parallel), on torch.distributed.

    o = merge of attention(q_here, k_r, v_r) over the parts r that pass by, by their lse

The keys and values travel round the ring of processes; each process keeps its queries and merges what the parts say
(Ring Attention, arXiv 2310.01889). With causal, a part from later in the text says nothing, so that in the plain order
the last process would do all the work: here each process holds two of the 2 P pieces, the p-th from the front and the
p-th from the back (zigzag), and has the same work in every round. `shard` cuts a sequence so, `unshard` puts it
together.
"""

import re

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments
from . import functional as llmfast
from .ops import attention_backward
from .spec import NO_EXTRAS, OPEN, AttentionSpec


def shard(x: Tensor, dim: int = 2, *, group=None, causal: bool = False) -> Tensor:
    """This process's part of x along dim: its P-th, or with causal piece p and piece 2 P - 1 - p of 2 P.

    Raises ValueError where the pieces aren't of one length.

    >>> q, k, v = (shard(t, causal=True) for t in (q, k, v))  # (B, H, N, D) -> (B, H, N / P, D)
    """
    p, P = dist.get_rank(group), dist.get_world_size(group)
    pieces = 2 * P if causal else P
    if x.shape[dim] % pieces:
        raise ValueError(f"x: dimension {dim} of size {x.shape[dim]} can't be cut into {pieces} equal pieces")
    cut = x.chunk(pieces, dim)
    return torch.cat([cut[p], cut[-1 - p]], dim) if causal else cut[p].contiguous()


def unshard(x: Tensor, dim: int = 2, *, group=None, causal: bool = False) -> Tensor:
    """The whole of what `shard` cut, on every process; not differentiable."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    if not causal:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([a for a, _ in halves] + [b for _, b in reversed(halves)], dim)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group=None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention of the whole sequence; each process has a part of it, as `shard` with the same causal cuts it.

    Args:
        q: (B, H, N, D); k, v: (B, Hk, N, D): this process's part, as long on every process. All differentiable, once.
        group: of torch.distributed; None is the default one.
        causal: a query sees the keys up to itself.

    Returns:
        o (B, H, N, D), the same part of the result. Each process holds two parts of k and v at a time.

    Raises:
        ValueError, on every process: shapes or dtypes that contradict each other or those of another process; with
            causal, an odd N, or q and k of two lengths.

    >>> o = ring_attention(*(shard(t, causal=True) for t in (q, k, v)), causal=True)
    """
    agree(q, k, v, group, causal, scale)
    return RingAttention.apply(q, k, v, group, causal, scale)


def agree(q, k, v, group, causal, scale) -> None:
    """Before anything is sent: one process's mistake, or a difference between two, is a ValueError on all of them."""
    said, mistake = None, None
    try:
        arguments.qkv(q, k, v)
        said = f"q {arguments.say(q)}, k {arguments.say(k)}, v {arguments.say(v)}, causal {causal}, scale {scale}"
        if causal and (q.shape[2] % 2 or q.shape[2] != k.shape[2]):
            mistake = f"causal: expected one even length of q and k, got {q.shape[2]} and {k.shape[2]}"
    except (TypeError, ValueError) as problem:
        mistake = f"q, k, v: {problem}"
    found = [(said, mistake)] * dist.get_world_size(group)
    if len(found) > 1:
        dist.all_gather_object(found, (said and re.sub(r"cuda:\d+", "cuda", said), mistake), group)
    for p, (_, mistake) in enumerate(found):
        if mistake is not None:
            raise ValueError(mistake if len(found) == 1 else f"process {p}: {mistake}")
    if len({said for said, _ in found}) > 1:
        every = "; ".join(f"process {p}: {said}" for p, (said, _) in enumerate(found))
        raise ValueError(f"expected the same on every process, got {every}")


def passed_on(tensors: list[Tensor], group) -> tuple[list[Tensor], list]:
    """Starts sending tensors to the next process; what comes from the one before, and what to wait for."""
    p, P = dist.get_rank(group), dist.get_world_size(group)
    if P == 1:
        return tensors, []
    to, source = (dist.get_global_rank(group, r % P) if group is not None else r % P for r in (p + 1, p - 1))
    came = [torch.empty_like(t) for t in tensors]
    ops = [dist.P2POp(dist.isend, t, to, group) for t in tensors]
    ops += [dist.P2POp(dist.irecv, t, source, group) for t in came]
    return came, dist.batch_isend_irecv(ops)


def seen(p: int, r: int, half: int, causal: bool) -> tuple[slice, slice, bool]:
    """Of process p's queries and process r's keys: the rows and columns that meet, and whether by the diagonal.

    From an earlier process only the front piece is before both of p's; from a later one both pieces are before p's
    back piece and after its front one.
    """
    every = slice(None)
    if not causal or r == p:
        return every, every, causal
    return (every, slice(0, half), False) if r < p else (slice(half, None), every, False)


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, group, causal, scale):
        p, P = dist.get_rank(group), dist.get_world_size(group)
        half = q.shape[2] // 2
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)  # P roundings of it would be seen in dv
        kv = [k.contiguous(), v.contiguous()]
        for step in range(P):
            coming, pending = passed_on(kv, group) if step + 1 < P else (kv, [])
            rows, columns, diagonal = seen(p, (p - step) % P, half, causal)
            part, part_lse = llmfast.attention(
                q[:, :, rows], kv[0][:, :, columns], kv[1][:, :, columns], causal=diagonal, scale=scale, return_lse=True
            )
            whole = torch.logaddexp(lse[:, :, rows], part_lse.double())
            share = lambda lse, whole=whole: (lse - whole).exp().to(wide)[..., None]
            o[:, :, rows] = o[:, :, rows] * share(lse[:, :, rows]) + part * share(part_lse)
            lse[:, :, rows] = whole
            for request in pending:
                request.wait()
            kv = coming
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse.to(wide))
        ctx.options = group, causal, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        """With the whole lse every part's gradient is its own share; dk and dv travel with their k and v."""
        q, k, v, o, lse = ctx.saved_tensors
        group, causal, scale = ctx.options
        p, P = dist.get_rank(group), dist.get_world_size(group)
        half, wide = q.shape[2] // 2, lse.dtype
        scale = q.shape[3] ** -0.5 if scale is None else scale
        dq = torch.zeros_like(q, dtype=wide)
        travelling = [k.contiguous(), v.contiguous(), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)]
        for step in range(P):
            k, v, dk, dv = travelling
            rows, columns, diagonal = seen(p, (p - step) % P, half, causal)
            spec = AttentionSpec(scale, right=0 if diagonal else OPEN)
            parts = q[:, :, rows], k[:, :, columns], v[:, :, columns], o[:, :, rows], lse[:, :, rows]
            grads = attention_backward((do[:, :, rows], None), *parts, spec, NO_EXTRAS, None)
            dq[:, :, rows] += grads.dq
            dk[:, :, columns] += grads.dk
            dv[:, :, columns] += grads.dv
            travelling, pending = passed_on(travelling, group)  # after P steps dk and dv are at home again
            for request in pending:
                request.wait()
        _, _, dk, dv = travelling
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
