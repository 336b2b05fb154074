"""The one description of an attention problem, passed unchanged from the API to the innermost kernel.

`AttentionSpec` holds the plain numbers, `Extras` the optional tensors. The fields of both generate the operator schema
in `llmfast.ops`, so a new option is a new field here, an argument in `llmfast.functional` and its use in the kernels.
"""

from typing import NamedTuple, get_type_hints

from torch import Tensor

OPEN = 2**30  # an open side of the band: 2**31 - 1 would overflow in i + offset + right, and -1 is a legal value


class AttentionSpec(NamedTuple):
    """Query i attends to key j when -left <= j - i - (Nk - Nq) <= right.

    Bottom-right causal attention is right=0, top-left causal is right=Nq-Nk, a causal window of w keys is left=w-1,
    right=0.
    """

    scale: float  # multiplies q @ k^T
    left: int = OPEN
    right: int = OPEN
    softcap: float = 0.0  # scores become softcap * tanh(scores / softcap); 0 turns it off
    dropout_p: float = 0.0  # Philox-4x32-10, see llmfast.backends.reference.keep


class Extras(NamedTuple):
    """Optional tensors of an attention problem."""

    mask: Tensor | None = None  # bool, broadcasts to (B, H, Nq, Nk); True = may attend
    bias: Tensor | None = None  # float, broadcasts to (B, H, Nq, Nk); added to the scores, -inf hides
    alibi_slopes: Tensor | None = None  # (H,) or (B, H) float32; adds -slope * |i + Nk - Nq - j|
    sinks: Tensor | None = None  # (H,): one more logit in each row's denominator
    seed: Tensor | None = None  # () int64, the dropout seed
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32: packed sequences, q (1, H, Tq, D)
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32: packed sequences, k and v (1, Hk, Tk, D)
    seqlens_k: Tensor | None = None  # (B,) int32: the keys of each sequence that count
    page_table: Tensor | None = None  # (B, pages) int32: k and v are pages (P, Hk, page, D)

    @property
    def packed(self) -> bool:
        """Sequences lie one after another in one row of the batch."""
        return self.cu_seqlens_q is not None


class SoftmaxSpec(NamedTuple):
    """softmax or log_softmax over the last dimension of (..., M, N): column j of row i counts when j <= i + offset."""

    scale: float = 1.0
    offset: int = OPEN  # causal: N - M (bottom-right) or 0 (top-left); open otherwise
    log: bool = False


class SoftmaxExtras(NamedTuple):
    """Optional tensors of a softmax, broadcast to x."""

    mask: Tensor | None = None  # bool, True = counts
    bias: Tensor | None = None  # float, added to scale * x


class CrossEntropySpec(NamedTuple):
    """The loss of a row: (1 - label_smoothing) * w[y] * (lse - x[y]) + label_smoothing / V * sum w (lse - x) + z_loss *
    lse^2.

    x are the logits after softcap; a row whose target is ignore_index has loss 0.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


class CrossEntropyExtras(NamedTuple):
    """Optional tensors of a cross entropy."""

    weight: Tensor | None = None  # (V,) contiguous, float32 (float64 for float64 logits): a factor for each class


class Grads(NamedTuple):
    """What a backward returns; None where the input was not given or needs no gradient."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


NO_EXTRAS = Extras()
NO_SOFTMAX_EXTRAS = SoftmaxExtras()
NO_CROSS_ENTROPY_EXTRAS = CrossEntropyExtras()
_SCHEMA_TYPES = {float: "float", int: "int", bool: "bool", Tensor | None: "Tensor?"}


def schema(spec: type) -> str:
    """The fields of a spec as operator schema: 'float scale, SymInt left, ...'."""
    return ", ".join(f"{_SCHEMA_TYPES[t]} {name}" for name, t in get_type_hints(spec).items()).replace(
        "int ", "SymInt "
    )
