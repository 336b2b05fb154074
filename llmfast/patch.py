"""`with llmfast.sdpa():` for code that calls PyTorch's scaled_dot_product_attention, and PyTorch's own flash-attention
registry.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from . import backends, functional
from .spec import NO_EXTRAS, OPEN, AttentionSpec

_PYTORCH = "PyTorch's scaled_dot_product_attention"
_original = F.scaled_dot_product_attention
_fastpath = True  # torch.backends.mha's setting outside
_depth = 0  # how many `with sdpa()` are open, over all threads
_lock = threading.Lock()


@contextmanager
def sdpa() -> Iterator[None]:
    """F.scaled_dot_product_attention, nn.MultiheadAttention and nn.Transformer* run on llmfast inside, in all threads.

    A case that only the reference could run goes to PyTorch's original, with one warning that says why. The C++ fast
    path of nn.MultiheadAttention and nn.TransformerEncoder is off inside, because it never reaches
    scaled_dot_product_attention; nor does nn.MultiheadAttention with need_weights=True (llmfast.nn.MultiheadAttention
    does). A function taken out of torch by `from torch.nn.functional import scaled_dot_product_attention` before is not
    replaced. Everything is restored on exit.

    >>> with llmfast.sdpa():
    ...     loss = model(batch)
    """
    global _depth, _original, _fastpath
    with _lock:
        if _depth == 0:
            _original, _fastpath = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
            F.scaled_dot_product_attention = scaled_dot_product_attention
            torch.backends.mha.set_fastpath_enabled(False)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                if F.scaled_dot_product_attention is scaled_dot_product_attention:  # not what others put there inside
                    F.scaled_dot_product_attention = _original
                torch.backends.mha.set_fastpath_enabled(_fastpath)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """llmfast.scaled_dot_product_attention, or PyTorch's where only the reference is left."""
    given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling():
        return functional.scaled_dot_product_attention(*given)
    if query.is_nested:
        backends.elsewhere("attention", _PYTORCH, "nested tensors are not supported: use attention_varlen")
        return _original(*given[:6], scale=scale, enable_gqa=enable_gqa)
    token = backends.instead.set(_PYTORCH)
    try:
        return functional.scaled_dot_product_attention(*given)
    except backends.OnlyReference:
        pass
    finally:
        backends.instead.reset(token)
    return _original(*given[:6], scale=scale, enable_gqa=enable_gqa)


def register_flash(name: str = "llmfast") -> None:
    """Makes `torch.nn.attention.activate_flash_attention_impl(name)` put llmfast under PyTorch's flash attention on the
    CPU.

    Process-wide, until `torch.nn.attention.restore_flash_attention_impl()`. It serves the calls that PyTorch routes to
    its flash kernel: four dimensions, no dropout, Dv = D; `with sdpa()` serves all.

    Raises:
        NotImplementedError: this torch has no such registry.

    >>> llmfast.register_flash()
    >>> torch.nn.attention.activate_flash_attention_impl("llmfast")
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise NotImplementedError(
            f"torch {torch.__version__} has no registry of flash attention: use `with llmfast.sdpa()`"
        )
    register(name, register_fn=_FlashOnCPU)


class _FlashOnCPU:
    """Overrides of aten's CPU flash attention while they are active: the handle that PyTorch's registry keeps."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "overriding a previously registered kernel": that is the purpose
            self.library.impl("_scaled_dot_product_flash_attention_for_cpu", _flash_forward, allow_override=True)
            self.library.impl(
                "_scaled_dot_product_flash_attention_for_cpu_backward", _flash_backward, allow_override=True
            )

    def remove(self):
        self.library._destroy()


def _flash_problem(q, k, is_causal, attn_mask, scale):
    right = q.shape[2] - k.shape[2] if is_causal else OPEN  # top-left
    spec = AttentionSpec(q.shape[3] ** -0.5 if scale is None else scale, right=right)
    if attn_mask is None:
        return spec, NO_EXTRAS
    return spec, NO_EXTRAS._replace(bias=attn_mask[(None,) * (4 - attn_mask.dim())])


def _flash_forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    spec, extras = _flash_problem(q, k, is_causal, attn_mask, scale)
    return backends.pick("attention", (q, k, v, spec, extras)).forward(q, k, v, spec, extras, True)


def _flash_backward(do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    spec, extras = _flash_problem(q, k, is_causal, attn_mask, scale)
    found = backends.pick("attention", (q, k, v, spec, extras), grad=True)
    return found.backward(do, q, k, v, o, lse, found.rowdot(o, do), spec, extras)[:3]
