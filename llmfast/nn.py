"""Modules: PyTorch's, the same parameters and state_dict, on llmfast's kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import attention, cross_entropy, log_softmax, softmax


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention, the same arguments and state_dict.

    Unlike PyTorch's: need_weights=False never builds the scores, is_causal needs no attn_mask, bool and float masks
    mix, a row that sees no key gives the output's bias instead of NaN. It also serves as `self_attn` of
    nn.TransformerEncoderLayer, in eval too: the layer's C++ fast path never runs in its place.

    >>> m = llmfast.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> o, _ = m(x, x, x, need_weights=False, is_causal=True)
    """

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False  # what a TransformerEncoderLayer asks before it takes its C++ fast path

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The output, shaped as query, and the weights or None.

        Args:
            query: (N, B, E), (B, N, E) with batch_first, or (N, E) unbatched; key and value likewise.
            key_padding_mask: (B, S) or (S,); bool, True = ignored, or float, added.
            attn_mask: (N, S) or (B * H, N, S); bool, True = hidden, or float, added.
            is_causal: says that attn_mask, if given, is the causal mask (row i sees columns up to i).

        Returns:
            weights (B, N, S) averaged over the heads, or (B, H, N, S); None without need_weights.
        """
        batched = self._check(query, key, value)
        sequence_first = batched and not self.batch_first
        q, k, v = self._project(query, key, value)
        if not batched or sequence_first:
            q, k, v = (x.transpose(0, 1) if batched else x[None] for x in (q, k, v))  # (B, N, E)
        B, S, E = k.shape
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(B, 1, E)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(B, 1, E)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = k.shape[1] - S
        causal = "top_left" if is_causal and not (added and attn_mask is not None) else False
        if causal and added:
            raise ValueError("is_causal: with bias_k or add_zero_attn, give attn_mask too")
        mask, bias = self._masks(key_padding_mask, None if causal else attn_mask, B, q.shape[1], S, added)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
        dropout_p, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            weights = softmax(q @ k.mT, scale=self.head_dim**-0.5, mask=mask, bias=bias, causal=causal)
            weights = F.dropout(weights, dropout_p)
            o = weights @ v
        else:
            o = attention(q, k, v, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p)
        o = o.permute(2, 0, 1, 3) if sequence_first else o.transpose(1, 2)
        o = F.linear(o.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return o[0], weights[0] if need_weights else None
        return o, weights

    def _check(self, query, key, value):
        """Whether there is a batch."""
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.is_nested:
                raise ValueError(f"{name}: nested tensors are not supported; use llmfast.attention_varlen")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name}: expected (..., {width}) with {query.dim()} dimensions, 2 or 3, got {tuple(x.shape)}"
                )
        return query.dim() == 3

    def _project(self, query, key, value):
        """q, k and v (..., E), one matrix product where the three are one tensor."""
        if self.in_proj_weight is None:
            w = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            w = self.in_proj_weight.chunk(3)
        b = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, *wb) for x, *wb in zip((query, key, value), w, b, strict=True))

    def _masks(self, padding, attn_mask, B, N, S, added):
        """The bool mask (True = may attend) and the bias, each broadcasting to (B, H, N, S + added), or None."""
        hidden, bias = [], []
        if padding is not None:
            if padding.numel() != B * S:
                raise ValueError(f"key_padding_mask: expected ({B}, {S}), got {tuple(padding.shape)}")
            (hidden if padding.dtype is torch.bool else bias).append(padding.reshape(B, 1, 1, S))
        if attn_mask is not None:
            if tuple(attn_mask.shape) not in ((N, S), (B * self.num_heads, N, S)):
                raise ValueError(
                    f"attn_mask: expected ({N}, {S}) or ({B * self.num_heads}, {N}, {S}), got {tuple(attn_mask.shape)}"
                )
            lead = (1, 1) if attn_mask.dim() == 2 else (B, self.num_heads)
            (hidden if attn_mask.dtype is torch.bool else bias).append(attn_mask.reshape(*lead, N, S))
        mask = None if not hidden else ~(hidden[0] | hidden[1] if len(hidden) == 2 else hidden[0])
        bias = None if not bias else bias[0] + bias[1] if len(bias) == 2 else bias[0]
        if added:  # the keys that the module adds are seen by all
            mask = mask if mask is None else F.pad(mask, (0, added), value=True)
            bias = bias if bias is None else F.pad(bias, (0, added))
        return mask, bias


class _Softmax(nn.Module):
    def __init__(self, dim: int | None = None, *, scale: float = 1.0, causal: bool | str = False) -> None:
        super().__init__(dim)
        self.scale, self.causal = scale, causal

    def extra_repr(self) -> str:
        """The arguments that aren't PyTorch's defaults."""
        scale = f", scale={self.scale}" if self.scale != 1 else ""
        return f"dim={self.dim}{scale}" + (f", causal={self.causal!r}" if self.causal else "")

    def _options(self, input, mask, bias):
        dim = self.dim
        if dim is None:  # as PyTorch chooses, and warns of it
            dim = F._get_softmax_dim(type(self).__name__, input.dim(), 6)
        return dict(dim=dim, scale=self.scale, mask=mask, bias=bias, causal=self.causal)


class Softmax(_Softmax, nn.Softmax):
    """softmax(scale * input) over one dimension; a row that is all -inf gives zeros (PyTorch: NaN).

    >>> p = llmfast.nn.Softmax(dim=-1)(scores)
    """

    def forward(self, input: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """input's shape; mask (bool, True = counts) and bias broadcast to input."""
        return softmax(input, **self._options(input, mask, bias))


class LogSoftmax(_Softmax, nn.LogSoftmax):
    """log(softmax(scale * input)) over one dimension.

    >>> logp = llmfast.nn.LogSoftmax(dim=-1)(logits)
    """

    def forward(self, input: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """input's shape; hidden entries are -inf."""
        return log_softmax(input, **self._options(input, mask, bias))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss for class indices, PyTorch's arguments and the options of `llmfast.cross_entropy`.

    A target of probabilities is a TypeError. The loss of half-precision logits is float32.

    >>> loss = llmfast.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target)
    """

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
        reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *, z_loss: float = 0.0,
        softcap: float = 0.0, inplace_backward: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.inplace_backward = z_loss, softcap, inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (V,), (N, V) or (N, V, d1, ...); target int64 of shape (), (N,) or (N, d1, ...)."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
        )
