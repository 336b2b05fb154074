"""transformers: `llmfast.enable_hf()`, then `from_pretrained(..., attn_implementation="llmfast")`.

Both an attention and a mask function are registered: without the second, transformers passes no mask at all and padded inputs
are silently wrong.
"""

from torch import Tensor

from .functional import attention, attention_weights


def enable_hf(name: str = "llmfast") -> None:
    """Registers llmfast with transformers' attention and mask interfaces; calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed or is older than version 5.

    >>> llmfast.enable_hf()
    >>> model = AutoModel.from_pretrained(folder, attn_implementation="llmfast")
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    sliding_window: int | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: query (B, H, N, D), key and value (B, Hk, M, D) give (B, N, H, D) and the weights.

    The mask is None, bool (True = may attend) or added to the scores; where it is None, the module says whether it is causal.
    The weights (B, H, N, M) are None unless output_attentions is asked for.
    """
    Nq, Nk = query.shape[2], key.shape[2]
    causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and attention_mask is None and Nq > 1
    if causal and Nk > Nq and attention_mask is None:  # the prefill of a static cache: only the first Nq keys are filled
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
    options = dict(causal=bool(causal), scale=scaling, softcap=softcap or 0.0, mask=mask, bias=bias)
    options["window"] = sliding_window if causal else None
    options["sinks"] = None if s_aux is None else s_aux.to(query.dtype)
    o = attention(query, key, value, dropout_p=dropout, **options)
    weights = attention_weights(query, key, **options).to(query.dtype) if kwargs.get("output_attentions") else None
    return o.transpose(1, 2).contiguous(), weights
