"""Binds kernels/: Triton, on any GPU it knows; CPU tensors only in its interpreter (TRITON_INTERPRET=1), when named."""

import os
import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch

from ..environment import tiles_path
from ..ops import DECODE_QUERIES, like
from ..spec import Grads
from . import Op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides once, at import
_MISSING = None if find_spec("triton") else "triton is not installed"


def _read_tiles():
    """What `llmfast tune` measured on this machine, read once: the file, or None where the built-in tables serve."""
    path = tiles_path()
    try:
        if _MISSING or not path.is_file():
            return None
        from ..kernels.attention import TUNED
        from ..tune import read_table

        TUNED.update(read_table(path))
    except (OSError, ValueError) as problem:
        warnings.warn(f"{path} is not a table of llmfast tune, the built-in tiles serve: {problem}", stacklevel=2)
        return None
    return str(path)


_TILES = _read_tiles()


def details() -> dict:
    """What `llmfast info` says of this backend."""
    return {"tiles": _TILES or "built in"}


def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return _MISSING or (
        None if _INTERPRET or torch.cuda.is_available() else "needs a GPU, or TRITON_INTERPRET=1 and its name"
    )


def _refuses(t):
    """Why no kernel takes this tensor, or None."""
    if _MISSING:
        return _MISSING
    if not t.is_cuda and not (_INTERPRET and t.is_cpu):
        return f"needs a GPU tensor, got {t.device}"
    if t.dtype not in _DTYPES:
        return f"dtype {str(t.dtype)[6:]} is not float32, bfloat16 or float16"
    return None


def _too_old(arch):
    """Why Triton's kernels don't run on a GPU, or None."""
    old = arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80
    return f"{arch} is older than Ampere (sm_80), whose shared memory and tensor cores the tiles need" if old else None


@cache
def _gpu_refuses(device):
    from ..kernels.attention import target

    with torch.cuda.device(device):
        return _too_old(target())


def _only_named(t, *_):
    return None if t.is_cuda else "the interpreter runs only when backend='triton' is named"


def _on(t):
    """Launches inside go to the tensor's GPU, whatever the current one is."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _attention_supports(q, k, v, spec, extras):
    if (reason := _refuses(q)) is not None:
        return reason
    if q.is_cuda and (reason := _gpu_refuses(q.device)) is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > 512:
        return f"head dim {max(q.shape[-1], v.shape[-1])} is over 512"
    return None


def _rows(t):
    """t itself where its rows are contiguous, a copy otherwise."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _narrow(extras):
    """A float64 bias as float32, as which the kernels add it: tiles of 8 bytes an element are over shared memory."""
    wide = extras.bias is not None and extras.bias.dtype is torch.float64
    return extras._replace(bias=extras.bias.float()) if wide else extras


def _attention_forward(q, k, v, spec, extras, need_lse=True):
    if extras.seqlens_k is not None:
        return _attention_decode(q, k, v, spec, extras, need_lse)
    from ..kernels import attention, attention_tma

    with _on(q):
        kernels = attention if attention_tma.refuses(q, k, v, spec, extras) else attention_tma
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = like(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else None
    if extras.packed:  # rows that no sequence covers
        o.zero_()
        if need_lse:
            lse.fill_(float("-inf"))
    with _on(q):
        kernels.forward(q, k, v, o, lse, spec, _narrow(extras))
    return o, lse


def _attention_decode(q, k, v, spec, extras, need_lse=True):
    from ..kernels import decode as kernels

    q, k, v = _rows(q), _rows(k), _rows(v)
    o = like(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else None
    with _on(q):
        kernels.forward(q, k, v, o, lse, spec, _narrow(extras))
    return o, lse


def _attention_backward(do, q, k, v, o, lse, delta, spec, extras):
    from ..kernels import attention_backward as kernels

    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    new = torch.zeros_like if extras.packed else torch.empty_like
    grads = Grads(
        new(q), new(k), new(v), *(None if t is None else torch.zeros_like(t) for t in (extras.bias, extras.sinks))
    )
    with _on(q):
        kernels.backward(do, q, k, v, lse.contiguous(), delta.contiguous(), *grads, spec, _narrow(extras))
    return grads


def _rowdot(o, do):
    from ..kernels import attention_backward as kernels

    delta = torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)
    with _on(o):
        kernels.rowdot(_rows(o), _rows(do), delta)
    return delta


def _attention_kernel(q, k, v, spec, extras, grad):
    """Which kernel the forward runs, and why not the one for Hopper and later."""
    few = q.shape[2] <= DECODE_QUERIES and not grad and not extras.packed and not spec.dropout_p
    if few or extras.seqlens_k is not None:
        return "attention_decode"
    from ..kernels import attention_tma

    with _on(q):
        why_not = attention_tma.refuses(q, k, v, spec, extras)
    return f"attention_fwd (attention_fwd_tma: {why_not})" if why_not else "attention_fwd_tma"


attention = Op(
    _attention_supports,
    _attention_forward,
    _attention_backward,
    _rowdot,
    _attention_decode,
    _only_named,
    _attention_kernel,
)


def _softmax_supports(x, spec, extras):
    return _refuses(x)


def _softmax_forward(x, out, spec, extras):
    from ..kernels import softmax as kernels

    with _on(x):
        return kernels.forward(x, out, spec, extras)


def _softmax_backward(dy, y, spec, extras):
    from ..kernels import softmax as kernels

    with _on(y):
        return kernels.backward(dy, y, spec, extras)


softmax = Op(_softmax_supports, _softmax_forward, _softmax_backward, only_named=_only_named)


def _cross_entropy_supports(x, target, spec, extras):
    return _refuses(x)


def _cross_entropy_forward(x, target, spec, extras):
    from ..kernels import cross_entropy as kernels

    loss, lse = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    with _on(x):
        kernels.forward(x, target, loss, lse, spec, extras)
    return loss, lse


def _cross_entropy_backward(dloss, x, target, lse, spec, extras, out=None):
    from ..kernels import cross_entropy as kernels

    dx = torch.empty_like(x) if out is None else out
    with _on(x):
        kernels.backward(dloss, x, target, lse.contiguous(), dx, spec, extras)
    return dx


cross_entropy = Op(_cross_entropy_supports, _cross_entropy_forward, _cross_entropy_backward, only_named=_only_named)
