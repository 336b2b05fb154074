"""Fused attention and softmax for PyTorch, written in Triton, CUDA C++ and SIMD C++.

Layout (B, H, N, D). Nothing is patched at import.
"""

from pathlib import Path

_checkout = Path(__file__).parent.parent
if (_checkout / "csrc").is_dir():  # kernels/ sits beside this package in a checkout, inside it in a wheel
    __path__.append(str(_checkout))

from . import flash_attn, nn
from .backends import explain, use_backend
from .environment import info
from .functional import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    cross_entropy,
    linear,
    linear_cross_entropy,
    log_softmax,
    merge_attention,
    scaled_dot_product_attention,
    softmax,
)
from .hf import enable_hf
from .patch import register_flash, sdpa
from .spec import AttentionSpec, Extras

__version__ = "0.1.0"
__all__ = [
    "AttentionSpec",
    "Extras",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "enable_hf",
    "explain",
    "flash_attn",
    "info",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "nn",
    "register_flash",
    "scaled_dot_product_attention",
    "sdpa",
    "softmax",
    "use_backend",
]
