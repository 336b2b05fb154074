"""Binds csrc/cpu: SIMD kernels for every instruction set, chosen at run time (LLMFAST_ISA forces one)."""

import os

import torch

from .. import ops
from ..ops import LINEAR_ROWS, lse_dtype
from ..spec import (
    NO_CROSS_ENTROPY_EXTRAS,
    NO_SOFTMAX_EXTRAS,
    OPEN,
    AttentionSpec,
    CrossEntropySpec,
    Extras,
    Grads,
    SoftmaxSpec,
)
from . import Op

try:
    from .. import _cpu
except ImportError as problem:
    _cpu = None
    _NOT_BUILT = f"llmfast._cpu is not built: run python setup.py build_ext --inplace ({problem.msg.split(' (')[0]})"

if _cpu is not None and os.environ.get("LLMFAST_ISA"):
    _cpu.select(os.environ["LLMFAST_ISA"])

_absent = lambda *_: None
attention_fast = _absent if _cpu is None else _cpu.attention_fast
softmax_fast = _absent if _cpu is None else _cpu.softmax_fast
cross_entropy_fast = _absent if _cpu is None else _cpu.cross_entropy_fast
linear_fast = _absent if _cpu is None else _cpu.linear_fast
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _short_way(ctx, d, kernel):
    """The gradient in one call, or None: it is differentiated again, traced or forced, or d is of another kind."""
    return None if ops.compiling() else kernel(d, ctx.saved_tensors, ctx.numbers)


class _Recorded(torch.autograd.Function):
    """What attention_fast, softmax_fast or cross_entropy_fast has computed: done is (result, saved, numbers)."""

    @staticmethod
    def forward(ctx, *given):
        result, saved, ctx.numbers = given[-1]
        ctx.save_for_backward(*saved)
        return result


class _Attention(_Recorded):
    """saved is (q, k, v, o, lse), where one is given mask, bias, cu_seqlens_q, cu_seqlens_k; numbers is the spec."""

    @staticmethod
    def backward(ctx, do):
        if (found := _short_way(ctx, do, _cpu.attention_gradient)) is not None:
            return found
        q, k, v, o, lse, *given = ctx.saved_tensors
        mask, bias, cu_q, cu_k = given or (None,) * 4
        four = lambda t: None if t is None else t[(None,) * (4 - t.dim())]
        extras = Extras(four(mask), four(bias), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        spec = AttentionSpec(*ctx.numbers)
        if extras.packed:  # (T, H, D) to (1, H, T, D)
            q, k, v, o, do = (t.transpose(0, 1)[None] for t in (q, k, v, o, do))
        if torch.is_grad_enabled():  # lse as a function of the inputs
            o, lse = ops.attention(q, k, v, spec, extras, None, True)
        grads = ops.attention_backward((do, None), q, k, v, o, lse, spec, extras, None)[:3]
        return *(t[0].transpose(0, 1) if extras.packed else t for t in grads), None


class _Softmax(_Recorded):
    """saved is (y,), numbers (scale, log, dim)."""

    @staticmethod
    def backward(ctx, dy):
        if (found := _short_way(ctx, dy, _cpu.softmax_gradient)) is not None:
            return found
        scale, log, dim = ctx.numbers
        dy, y = (t.movedim(dim, -1) for t in (dy, *ctx.saved_tensors))
        four = lambda t: t[(None,) * (4 - t.dim())]
        dx, _ = ops.softmax_backward(four(dy), four(y), SoftmaxSpec(scale, OPEN, log), NO_SOFTMAX_EXTRAS, None)
        return dx.reshape(y.shape).movedim(-1, dim), None


class _CrossEntropy(_Recorded):
    """saved is (logits, target, lse), numbers the spec, what a mean divides by and inplace."""

    @staticmethod
    def backward(ctx, dloss):
        *spec, divisor, inplace = ctx.numbers
        if (found := _short_way(ctx, dloss, _cpu.cross_entropy_gradient)) is not None:
            if inplace:
                ops.written(ctx.saved_tensors[0])
            return found
        x, target, lse = ctx.saved_tensors
        if dloss.dim() == 0:
            dloss = (dloss / divisor).expand(x.shape[0])
        spec = CrossEntropySpec(*spec)
        dx = ops.cross_entropy_backward(dloss, x, target, lse, spec, NO_CROSS_ENTROPY_EXTRAS, None, inplace)
        return dx, None, None


if (
    _cpu is not None
):  # C's apply: Function.apply first asks for torch.func's transforms, which the short way never meets
    _cpu.record_with(*(super(torch.autograd.Function, f).apply for f in (_Attention, _Softmax, _CrossEntropy)))


def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return _NOT_BUILT if _cpu is None else None


def details() -> dict:
    """What `llmfast.info()` shows of this backend."""
    return {} if _cpu is None else {"instruction set": _cpu.isa(), "instruction sets": _cpu.supported()}


def peak(dtype: str) -> float:
    """FLOP/s that one core reaches on registers alone, in float32, bfloat16, float16 or float64."""
    return _cpu.peak(("float32", "bfloat16", "float16", "float64").index(dtype))


def _attention_supports(q, k, v, spec, extras):
    if _cpu is None:
        return _NOT_BUILT
    if not q.is_cpu:
        return f"needs a CPU tensor, got {q.device}"
    if q.dtype not in _DTYPES:
        return f"dtype {str(q.dtype)[6:]} is not float32, bfloat16, float16 or float64"
    return None


def _attention_forward(q, k, v, spec, extras, need_lse=True):
    return _cpu.attention_forward(q, k, v, spec, extras, need_lse)


def _attention_decode(q, k, v, spec, extras, need_lse=True):
    return _cpu.attention_decode(q, k, v, spec, extras, need_lse)


def _attention_backward(do, q, k, v, o, lse, delta, spec, extras):
    if extras.bias is None and extras.sinks is None:
        return Grads(*_cpu.attention_backward(do, q, k, v, o, lse, delta, None, None, spec, extras))
    wide = lambda t: None if t is None else lse.new_zeros(t.shape)
    dbias, dsinks = wide(extras.bias), wide(extras.sinks)
    dq, dk, dv = _cpu.attention_backward(do, q, k, v, o, lse, delta, dbias, dsinks, spec, extras)
    narrow = lambda t, like: None if t is None else t.to(like.dtype)
    return Grads(dq, dk, dv, narrow(dbias, extras.bias), narrow(dsinks, extras.sinks))


def _rowdot(o, do):
    o, do = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (o, do))
    delta = o.new_empty(o.shape[:3], dtype=lse_dtype(o))
    _cpu.rowdot(o, do, delta)
    return delta


attention = Op(
    _attention_supports,
    _attention_forward,
    _attention_backward,
    _rowdot,
    decode=_attention_decode,
    makes_delta=True,
)


def _fresh(x):
    """An output like x; a large one asks for huge pages, as a fault for each 4 KiB takes longer than the kernel."""
    y = torch.empty_like(x)
    _cpu.huge_pages(y)
    return y


def _softmax_supports(x, spec, extras):
    if _cpu is None:
        return _NOT_BUILT
    return None if x.is_cpu else f"needs a CPU tensor, got {x.device}"


_ACROSS = 16384  # columns that a group of rows with options may have where the rows, not the columns, lie side by side


def _softmax_forward(x, out, spec, extras):
    rows = x.stride(-1) == 1 or x.shape[-1] == 1
    plain = extras.mask is None and extras.bias is None and spec.offset >= x.shape[-1] - 1
    if not rows and not (x.stride(-2) == 1 and (plain or x.shape[-1] <= _ACROSS)):
        x, rows = x.contiguous(), True
    y = _fresh(x) if out is None else out
    direct = y.stride(-1) == 1 or y.shape[-1] == 1 if rows else y.stride(-2) == 1 and y.stride(-1) != 1
    target = y if direct else torch.empty_like(x)
    _cpu.softmax_forward(x, target, *extras, *spec)
    return y if direct else y.copy_(target)


def _softmax_backward(dy, y, spec, extras):
    lanes = lambda t: t.stride(-2) == 1 and t.stride(-1) != 1
    if not (extras.bias is None and lanes(y) and (lanes(dy) or dy.stride(-1) == 1)):  # rows of dy may lie otherwise
        dy, y = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (dy, y))
    dx = _fresh(y)
    dbias = None if extras.bias is None else y.new_zeros(extras.bias.shape, dtype=lse_dtype(y))
    _cpu.softmax_backward(dy, y, dx, dbias, spec.scale, spec.log)
    return dx, None if dbias is None else dbias.to(extras.bias.dtype)


softmax = Op(_softmax_supports, _softmax_forward, _softmax_backward)


def _cross_entropy_supports(x, target, spec, extras):
    return _softmax_supports(x, spec, extras)


def _rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _cross_entropy_forward(x, target, spec, extras):
    loss, lse = (x.new_empty(x.shape[0], dtype=lse_dtype(x)) for _ in range(2))
    _cpu.cross_entropy_forward(_rows(x), target, loss, lse, extras.weight, *spec)
    return loss, lse


def _cross_entropy_backward(dloss, x, target, lse, spec, extras, out=None):
    x = _rows(x)
    dx = _fresh(x) if out is None or _rows(out) is not out else out
    _cpu.cross_entropy_backward(dloss.to(lse.dtype), x, target, lse, dx, extras.weight, *spec)
    return dx if out is None or dx is out else out.copy_(dx)


cross_entropy = Op(_cross_entropy_supports, _cross_entropy_forward, _cross_entropy_backward)


_LINEAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _linear_supports(x, weight, bias):
    if _cpu is None:
        return _NOT_BUILT
    if not x.is_cpu:
        return f"needs a CPU tensor, got {x.device}"
    if x.dtype not in _LINEAR_DTYPES:
        return f"dtype {str(x.dtype)[6:]} is not float32, bfloat16 or float16"
    return None if x.shape[0] <= LINEAR_ROWS else f"{x.shape[0]} rows are more than {LINEAR_ROWS}"


def _linear_forward(x, weight, bias):
    x, weight = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (x, weight))
    y = x.new_empty(x.shape[0], weight.shape[0])
    _cpu.linear(x, weight, bias, y)
    return y


linear = Op(_linear_supports, _linear_forward, None)
