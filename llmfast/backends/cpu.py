"""Binds csrc/cpu: SIMD kernels for every instruction set, chosen at run time (LLMFAST_ISA forces one)."""

import os

import torch

from ..ops import LINEAR_ROWS, lse_dtype
from ..spec import Grads
from . import Op

try:
    from .. import _cpu
except ImportError as problem:
    _cpu = None
    _NOT_BUILT = f"llmfast._cpu is not built: run python setup.py build_ext --inplace ({problem.msg.split(' (')[0]})"

if _cpu is not None and os.environ.get("LLMFAST_ISA"):
    _cpu.select(os.environ["LLMFAST_ISA"])

attention_fast, extras_fast, softmax_fast, linear_fast = (
    (lambda *_: None,) * 4
    if _cpu is None
    else (_cpu.attention_fast, _cpu.extras_fast, _cpu.softmax_fast, _cpu.linear_fast)
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    wide = lambda t: None if t is None else torch.zeros(t.shape, dtype=lse.dtype)
    dbias, dsinks = wide(extras.bias), wide(extras.sinks)
    dq, dk, dv = _cpu.attention_backward(do, q, k, v, o, lse, delta, dbias, dsinks, spec, extras)
    narrow = lambda t, like: None if t is None else t.to(like.dtype)
    return Grads(dq, dk, dv, narrow(dbias, extras.bias), narrow(dsinks, extras.sinks))


def _rowdot(o, do):
    o, do = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (o, do))
    delta = torch.empty(o.shape[:3], dtype=lse_dtype(o))
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
    if y.nbytes >= 1 << 23:
        _cpu.huge_pages(y)
    return y


def _softmax_supports(x, spec, extras):
    if _cpu is None:
        return _NOT_BUILT
    return None if x.is_cpu else f"needs a CPU tensor, got {x.device}"


_ACROSS = 16384  # columns that a group of rows may have where the rows, not the columns, lie side by side


def _softmax_forward(x, out, spec, extras):
    rows = x.stride(-1) == 1 or x.shape[-1] == 1
    if not rows and not (x.stride(-2) == 1 and x.shape[-1] <= _ACROSS):
        x, rows = x.contiguous(), True
    y = _fresh(x) if out is None else out
    direct = y.stride(-1) == 1 or y.shape[-1] == 1 if rows else y.stride(-2) == 1 and y.stride(-1) != 1
    target = y if direct else torch.empty_like(x)
    _cpu.softmax_forward(x, target, *extras, *spec)
    return y if direct else y.copy_(target)


def _softmax_backward(dy, y, spec, extras):
    dy, y = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (dy, y))
    dx = _fresh(y)
    dbias = None if extras.bias is None else torch.zeros(extras.bias.shape, dtype=lse_dtype(y))
    _cpu.softmax_backward(dy, y, dx, dbias, spec.scale, spec.log)
    return dx, None if dbias is None else dbias.to(extras.bias.dtype)


softmax = Op(_softmax_supports, _softmax_forward, _softmax_backward)


def _cross_entropy_supports(x, target, spec, extras):
    return _softmax_supports(x, spec, extras)


def _rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _cross_entropy_forward(x, target, spec, extras):
    loss, lse = (torch.empty(x.shape[0], dtype=lse_dtype(x)) for _ in range(2))
    weight = None if extras.weight is None else extras.weight.contiguous()
    _cpu.cross_entropy_forward(_rows(x), target, loss, lse, weight, *spec)
    return loss, lse


def _cross_entropy_backward(dloss, x, target, lse, spec, extras, out=None):
    x = _rows(x)
    dx = _fresh(x) if out is None or _rows(out) is not out else out
    weight = None if extras.weight is None else extras.weight.contiguous()
    _cpu.cross_entropy_backward(dloss.to(lse.dtype), x, target, lse, dx, weight, *spec)
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
