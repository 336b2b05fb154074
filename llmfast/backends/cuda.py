"""Binds csrc/cuda: tensor-core kernels for NVIDIA GPUs from Ampere (sm_80) on."""

from functools import cache

import torch

from ..ops import like
from ..spec import Grads
from . import Op

try:
    from .. import _cuda
except ImportError as problem:
    _cuda = None
    _NOT_BUILT = (
        "llmfast._cuda is not built: run LLMFAST_CUDA=1 python setup.py build_ext --inplace "
        f"({problem.msg.split(' (')[0]})"
    )

_ATTENTION_DTYPES = (torch.float16, torch.bfloat16)
_SOFTMAX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPLITS, _SPLIT_KEYS = 64, 256  # at 8k keys of 8 heads 256 blocks for 132 SMs; beyond 16k splits grow instead


@cache
def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return _NOT_BUILT if _cuda is None else _cuda.unavailable()


@cache
def _too_old(index):
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"needs compute capability 8.0 or later, got {major}.{minor}"


def _refuses(t):
    """Why no kernel takes this tensor, or None."""
    if not t.is_cuda:
        return f"needs a CUDA tensor, got {t.device}"
    return available() or _too_old(t.device.index)


def _launch(name, t, *args):
    """Calls a launcher on the tensor's device and its current stream."""
    with torch.cuda.device(t.device):
        getattr(_cuda, name)(*args, torch.cuda.current_stream().cuda_stream)


def attention_op(refuses, launch) -> Op:
    """The operation over any library with these launchers: tests give it the host model of the kernels."""

    def supports(q, k, v, spec, extras):
        if (why := refuses(q)) is not None:
            return why
        if q.dtype not in _ATTENTION_DTYPES:
            return f"dtype {str(q.dtype)[6:]} is not float16 or bfloat16"
        if max(q.shape[3], v.shape[3]) > 256:
            return f"head dim {max(q.shape[3], v.shape[3])} is more than 256"
        if max(q.shape[2], _keys(k, extras)) > 2**30:
            return f"{max(q.shape[2], _keys(k, extras))} rows are more than 2**30"
        if spec.dropout_p:
            return "dropout is not supported"
        if extras.bias is not None and extras.bias.requires_grad:
            return "the gradient of bias is not supported"
        return None

    def forward(q, k, v, spec, extras, need_lse=True):
        if extras.seqlens_k is not None:
            return decode(q, k, v, spec, extras, need_lse)
        o = like(q, v.shape[3])
        rows = _row(o)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else None
        if extras.packed:  # rows that no sequence covers
            rows.zero_()
            lse = lse if lse is None else lse.fill_(float("-inf"))
        launch("attention_forward", q, _aligned(q), _aligned(k), _aligned(v), rows, lse, spec, _as_kernels_read(extras))
        return _filled(o, rows), lse

    def decode(q, k, v, spec, extras, need_lse=True):
        B, H, Nq, _ = q.shape
        rows, Dv = B * H * Nq, v.shape[3]
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)
        o, lse = like(q, Dv), new(B, H, Nq) if need_lse else None
        to = _row(o)
        splits = min(_SPLITS, -(-_keys(k, extras) // _SPLIT_KEYS))
        scratch = None, None, None
        if splits > 1 and rows:
            tiles = -(-rows // (B * k.shape[1] * 16))
            scratch = (
                new(splits, rows, max(-(-Dv // 8) * 8, 8)),
                new(splits, rows, 2),
                torch.zeros(B * k.shape[1] * tiles, dtype=torch.int32, device=q.device),  # who comes last merges
            )
        tensors = _aligned(q), _aligned(k), _aligned(v), to, lse
        launch("attention_decode", q, *tensors, *scratch, spec, _as_kernels_read(extras))
        return _filled(o, to), lse

    def backward(do, q, k, v, o, lse, delta, spec, extras):
        new = torch.zeros_like if extras.packed else torch.empty_like  # rows that no sequence covers
        grads = new(q), new(k), new(v)
        to = [_row(t) for t in grads]
        dsinks = None
        if extras.sinks is not None:
            share = torch.exp(extras.sinks.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
            dsinks = -(share * delta).sum((0, 2)).to(extras.sinks.dtype)
        rows = (_aligned(t) for t in (do, q, k, v))
        extras = _as_kernels_read(extras._replace(sinks=None))
        launch("attention_backward", q, *rows, lse, delta, *to, spec, extras)
        return Grads(*map(_filled, grads, to), None, dsinks)

    def rowdot(o, do):
        delta = torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)
        launch("attention_rowdot", o, _row(o), _row(do), delta)
        return delta

    return Op(supports, forward, backward, rowdot, decode)


def softmax_op(refuses, launch) -> Op:
    def supports(x, spec, extras):
        if (why := refuses(x)) is not None:
            return why
        return None if x.dtype in _SOFTMAX_DTYPES else f"dtype {str(x.dtype)[6:]} is not float32, bfloat16 or float16"

    def forward(x, out, spec, extras):
        rows = _row(x)
        y = (
            out
            if out is not None and _row(out) is out
            else torch.empty_like(rows, memory_format=torch.contiguous_format)
        )
        if extras.bias is not None:
            extras = extras._replace(bias=_narrow(extras.bias))
        launch("softmax_forward", x, rows, y, spec, extras)
        return y if out is None or out is y else out.copy_(y)

    def backward(dy, y, spec, extras):
        dx = torch.empty_like(y, memory_format=torch.contiguous_format)
        if extras.bias is None:
            launch("softmax_backward", y, _row(dy), _row(y), dx, spec.scale, spec.log)
            return dx, None
        ds = torch.empty_like(dx, dtype=torch.float32)  # dbias sums what dx rounds
        launch("softmax_backward", y, _row(dy.float()), _row(y.float()), ds, 1.0, spec.log)
        return dx.copy_(ds * spec.scale), ds.sum_to_size(extras.bias.shape).to(extras.bias.dtype)

    return Op(supports, forward, backward)


def cross_entropy_op(refuses, launch) -> Op:
    def supports(x, target, spec, extras):
        if (why := refuses(x)) is not None:
            return why
        return None if x.dtype in _SOFTMAX_DTYPES else f"dtype {str(x.dtype)[6:]} is not float32, bfloat16 or float16"

    def forward(x, target, spec, extras):
        loss, lse = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
        weight = None if extras.weight is None else extras.weight.float()
        launch("cross_entropy", x, _row(x), target, weight, None, loss, lse, None, spec)
        return loss, lse

    def backward(dloss, x, target, lse, spec, extras, out=None):
        weight = None if extras.weight is None else extras.weight.float()
        total = None if weight is None else weight.sum()[None]
        rows = _row(x)
        dx = rows if out is not None else torch.empty_like(rows, memory_format=torch.contiguous_format)
        launch("cross_entropy", x, rows, target, weight, total, dloss.float(), lse, dx, spec)
        return dx if out is None or out is dx else out.copy_(dx)

    return Op(supports, forward, backward)


def _row(t):
    """The tensor, or a copy where its last dimension is strided."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _filled(t, rows):
    return t if rows is t else t.copy_(rows)


def _keys(k, extras):
    """The keys that a sequence has room for."""
    return k.shape[2] * (1 if extras.page_table is None else extras.page_table.shape[1])


def _as_kernels_read(extras):
    """Sinks in float32, bias in no more."""
    sinks, bias = extras.sinks, extras.bias
    return extras._replace(sinks=None if sinks is None else sinks.float(), bias=None if bias is None else _narrow(bias))


def _narrow(t):
    return t.float() if t.dtype == torch.float64 else t


def _aligned(t):
    """The tensor, or a copy where a row doesn't begin at a multiple of 16 bytes or has gaps."""
    size = t.element_size()
    steps = [t.stride(i) * size for i in range(3) if t.shape[i] > 1]
    if (t.stride(3) == 1 or t.shape[3] == 1) and not any(n % 16 for n in (t.data_ptr(), *steps)):
        return t
    padded = -(-t.shape[3] * size // 16) * 16 // size
    return t.new_empty(*t.shape[:3], padded)[..., : t.shape[3]].copy_(t)


attention = attention_op(_refuses, _launch)
softmax = softmax_op(_refuses, _launch)
cross_entropy = cross_entropy_op(_refuses, _launch)
