"""transformers: `llmfast.enable_hf()`, then `from_pretrained(..., attn_implementation="llmfast")`.

Both an attention and a mask function are registered: without the second, transformers passes no mask at all and padded
inputs are silently wrong.
"""

import inspect
import re
import sys
from functools import cache

import torch
from torch import Tensor

from .functional import attention, attention_varlen, attention_weights


def enable_hf(name: str = "llmfast") -> None:
    """Registers llmfast with transformers' attention and mask interfaces; calling it again changes nothing.

    Models that compute attention in code of their own (Bloom, MPT, GPT-J, Falcon, RoFormer, DeBERTa) keep it, and
    transformers doesn't say so: `model.config._attn_implementation` is "llmfast" where llmfast is asked.

    Raises:
        ImportError: transformers is not installed or is older than version 5.

    >>> llmfast.enable_hf()
    >>> model = AutoModel.from_pretrained(folder, attn_implementation="llmfast")
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    sliding_window: int | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: query (B, H, N, D), key and value (B, Hk, M, D) give (B, N, H, Dv) and the
    weights.

    The mask is None, bool (True = may attend) or added to the scores; where it is None, the module says whether it is
    causal. The weights (B, H, N, M), before dropout, are None unless output_attentions is asked for. With cu_seq_lens_q
    and cu_seq_lens_k the one row of the batch holds packed sequences, and they alone say who sees whom.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    softcap = softcap or 0.0
    if kwargs.get("cu_seq_lens_q") is not None:
        options = dict(scale=scaling, softcap=softcap, sinks=s_aux, causal=bool(causal), dropout_p=dropout)
        options["window"] = sliding_window if causal else None
        return _packed(query, key, value, kwargs, position_bias, options), None
    if query.shape[0] != key.shape[0]:  # learned queries shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    Nq, Nk = query.shape[2], key.shape[2]
    causal = bool(causal) and attention_mask is None
    if causal and Nq > 1 and Nk > Nq:  # the prefill of a static cache: only the first Nq keys are filled
        key, value, Nk = key[:, :, :Nq], value[:, :, :Nq], Nq
    mask = bias = None
    if attention_mask is not None:
        if attention_mask.dtype.is_floating_point:
            bias = attention_mask[..., :Nk]
        else:
            mask = attention_mask[..., :Nk]
    if position_bias is not None:
        position_bias = position_bias[..., :Nk]
        bias = position_bias if bias is None else bias + position_bias
    window = sliding_window if causal else None
    o = attention(
        query, key, value, causal=causal, window=window, scale=scaling, softcap=softcap, mask=mask, bias=bias,
        sinks=s_aux, dropout_p=dropout,
    )  # fmt: skip
    weights = None
    if _wants_weights(kwargs):
        options = dict(causal=causal, window=window, scale=scaling, softcap=softcap, mask=mask, bias=bias, sinks=s_aux)
        weights = attention_weights(query, key, **options).to(query.dtype)
    return o.transpose(1, 2).contiguous(), weights


def _wants_weights(kwargs):
    """GPT-2 keeps output_attentions to itself: then only transformers' collector of outputs knows of it."""
    if kwargs.get("output_attentions"):
        return True
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def _packed(query, key, value, kwargs, position_bias, options):
    """Packed sequences (1, H, T, D) without a mask between them: (1, T, H, Dv)."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: packed sequences lie in one row, got a batch of {query.shape[0]}")
    if position_bias is not None:
        raise ValueError("cu_seq_lens_q: packed sequences can't have a position_bias; pad them instead")
    if _wants_weights(kwargs):
        raise ValueError("output_attentions: packed sequences have no weights; pad them instead")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, H, D)
    cu_q, cu_k = (kwargs[f"cu_seq_lens_{x}"].to(torch.int32) for x in "qk")
    return attention_varlen(q, k, v, cu_q, cu_k, **options)[None]


def attention_mask(*args, local_size: int | None = None, config=None, **kwargs) -> Tensor | None:
    """transformers' mask function: None or bool (B, 1, N, M), True = may attend.

    It is sdpa_mask, which leaves out a mask that says no more than causal; here a sliding window is left out too where
    the model tells it to `attention_forward`.
    """
    from transformers.masking_utils import sdpa_mask

    chunked = getattr(config, "attention_chunk_size", None) is not None
    told = local_size is not None and not chunked and local_size == getattr(config, "sliding_window", None)
    plain = kwargs.get("allow_is_causal_skip", True) and not torch.compiler.is_compiling()
    if told and plain and _tells_window(type(config)):
        local_size = None
    return sdpa_mask(*args, local_size=local_size, config=config, **kwargs)


@cache
def _tells_window(config: type) -> bool:
    """Whether a configuration's model passes sliding_window on: Mistral does, Qwen2-MoE only builds the mask."""
    modeling = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    calls = (
        []
        if modeling is None
        else re.findall(r"\battention_interface\((.*?)\n\s*\*\*kwargs", inspect.getsource(modeling), re.DOTALL)
    )
    return bool(calls) and all("sliding_window=" in call for call in calls)
