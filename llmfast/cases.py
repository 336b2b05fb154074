"""The attention and softmax problems every backend is tested on, and the rule that decides what is right.

One row is one way a kernel can go wrong. It is part of the package so that `llmfast check` runs it on the user's
machine.

The rule, for each (batch, head) of a result x, against float64, with n elements:
    max|x - x64| <= c max|math - x64| + eps max|x64|
    rms(x - x64) <= c rms(math - x64) + floor rms(x64),   floor = eps max(1 / 8, 1 / sqrt(n))
c is 2 for o and lse, 3 for gradients. In one element the two lines say the same, in many the second is the stricter.
math is the worse of PyTorch's MATH attention and the reference in the same dtype (both float32 inside, rounded once; in
a head of a few elements it is chance which of the two errs less), and the reference alone where MATH lacks the feature.
In float64 math is the reference's float32 error times 2^-28: as much smaller as float64 is finer, twice, since x64 is
rounded as much as x.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import arguments, functional

C_FORWARD, C_GRADIENT = 2, 3


class Case(NamedTuple):
    """Shapes and options of one attention problem. Options whose value is a word are made into tensors by `problem`."""

    B: int
    H: int
    Hk: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    options: dict[str, Any]


def _case(B, H, Hk, Nq, Nk, D, Dv=None, **options):
    return Case(B, H, Hk, Nq, Nk, D, D if Dv is None else Dv, options)


# fmt: off
CASES = {  # B, H, Hk, Nq, Nk, D
    "square":              _case(2, 2, 2,  64,  64,  32),
    "one key":             _case(1, 2, 2,   5,   1,  32, through_lse=True),  # otherwise dq and dk are exactly 0
    "ragged":              _case(1, 2, 2, 131, 197,  64),
    "long ragged":         _case(1, 1, 1, 200, 333,  64),
    "wide head":           _case(1, 2, 2,  70,  90, 128),
    "odd head":            _case(1, 2, 2,  66,  50,  59),
    "odd wide head":       _case(1, 1, 1,  65,  70, 111),
    "head 16":             _case(1, 2, 2,  66,  98,  16),
    "head 80":             _case(1, 2, 2,  66,  98,  80),
    "head 256":            _case(1, 1, 1,  66,  70, 256),
    "D beyond 256":        _case(1, 2, 1,  34,  70, 310, 99),
    "Dv beyond 256":       _case(1, 2, 1,  34,  70,  99, 310),
    "Dv != D":             _case(1, 2, 2,  66,  70,  64, 32),
    "Dv > D":              _case(1, 2, 2,  66,  70,  24, 64),
    "causal":              _case(1, 2, 2, 130, 130,  64, causal=True),
    "causal 128":          _case(1, 2, 2, 192, 192, 128, causal=True),
    "causal more keys":    _case(1, 2, 2,  70, 150,  32, causal=True),
    "causal fewer keys":   _case(1, 2, 2, 150,  70,  32, causal=True),
    "top-left more keys":  _case(1, 2, 2,  70, 150,  32, causal="top_left"),
    "top-left fewer keys": _case(1, 2, 2, 150,  70,  32, causal="top_left"),
    "single query":        _case(2, 2, 2,   1,  77,  64, causal=True),
    "grouped heads":       _case(1, 6, 2,  80,  80,  32, causal=True),
    "one kv head":         _case(2, 4, 1,  70,  90,  64),
    "window":              _case(1, 2, 2, 180, 180,  32, window=7),
    "causal window":       _case(1, 2, 2, 180, 180,  32, window=50, causal=True),
    "window pair":         _case(1, 2, 2, 150, 170,  32, window=(20, 3)),
    "window past keys":    _case(1, 1, 1, 190,  40,  32, window=(4, 4)),
    "scale":               _case(1, 2, 2,  70,  70,  32, scale=0.3),
    "negative scale":      _case(1, 2, 2,  70,  70,  32, scale=-0.2, causal=True),
    "zero scale":          _case(1, 2, 2,  70,  70,  32, scale=0.0, causal=True),
    "mask":                _case(2, 2, 2,  70, 100,  32, mask="random"),
    "mask by row":         _case(1, 2, 2,  70, 100,  32, mask="rows"),
    "padding mask":        _case(2, 2, 2,  70, 100,  32, mask="padding", causal=True),
    "nothing visible":     _case(1, 2, 2,  70, 100,  32, mask="none"),
    "bias":                _case(2, 2, 2,  70, 100,  32, bias="full"),
    "bias by head":        _case(2, 4, 2,  70, 100,  32, bias="head", causal=True),
    "bias by key":         _case(2, 2, 2,  70, 100,  32, bias="key"),
    "bias by query":       _case(1, 2, 2,  70, 300,  32, bias="query", through_lse=True),  # otherwise its gradient is 0
    "bias with -inf":      _case(1, 2, 2,  70, 100,  32, bias="hide"),
    "mask and bias":       _case(2, 2, 2,  70, 100,  32, mask="random", bias="full"),
    "softcap":             _case(1, 2, 2,  80,  80,  32, softcap=2.0),
    "softcap causal":      _case(1, 2, 2,  80,  80,  64, softcap=5.0, causal=True, window=33),
    "alibi":               _case(2, 4, 2,  80, 100,  32, alibi="heads", causal=True),
    "alibi by batch":      _case(2, 2, 2,  80, 100,  32, alibi="batch"),
    "sinks":               _case(1, 4, 2,  80, 100,  32, sinks=True, causal=True),
    "sinks, no key":       _case(1, 2, 2, 100,  40,  32, sinks=True, causal=True),
    "dropout":             _case(2, 2, 2,  70, 101,  32, dropout_p=0.3),
    "dropout causal":      _case(1, 4, 2,  90,  90,  32, dropout_p=0.1, causal=True),
    "everything":          _case(2, 4, 2,  90, 101,  40, 24, causal=True, window=60, softcap=4.0, mask="random",
                                 bias="head", alibi="heads", sinks=True, dropout_p=0.2),
    "large scores":        _case(1, 2, 2,  70,  70,  64, magnitude=30.0, forward_only=True),
    "gradient of lse":     _case(1, 4, 2,  70, 100,  32, causal=True, through_lse=True),
    "heads inside":        _case(2, 2, 2,  70,  70,  32, layout="BNHD", causal=True),
    "fused qkv":           _case(2, 2, 2,  70,  70,  32, layout="fused"),
    "strided head":        _case(1, 2, 2,  40,  40,  32, layout="strided"),
    "head dim outermost":  _case(1, 2, 2,  40,  37,  32, layout="turned"),
    "no query":            _case(1, 2, 2,   0,  10,  32),
    "no key":              _case(1, 2, 2,  10,   0,  32),
    "no batch":            _case(0, 2, 2,  10,  10,  32),
    "packed":              _case(3, 2, 2,  70,  70,  32, packed=((0, 17, 17, 70), (0, 17, 17, 70)), causal=True),
    "packed grouped":      _case(3, 4, 2,  90, 150,  64, packed=((0, 1, 65, 90), (0, 40, 41, 150)), causal=True,
                                 sinks=True),
    "packed window":       _case(2, 2, 2, 150, 150,  32, packed=((0, 80, 150), (0, 80, 150)), window=(9, 2),
                                 alibi="heads"),
    "packed dropout":      _case(2, 2, 2,  80,  80,  32, packed=((0, 33, 80), (0, 33, 80)), dropout_p=0.25),
    "packed with a rest":  _case(2, 2, 2,  80,  80,  32, packed=((0, 20, 60), (0, 20, 60))),
    "packed head 256":     _case(2, 2, 1,  50,  90, 256, packed=((0, 17, 50), (0, 30, 90)), causal=True),
}
# fmt: on


class Problem(NamedTuple):
    """The tensors of a case: inputs of `attention` or `attention_varlen`, their options, and the gradients of o and
    lse.

    Without do the case is forward only; without dlse nothing flows back through lse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    do: Tensor | None
    dlse: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype (seeds, slopes and lengths as they are)."""
        wide = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.dtype == self.q.dtype else t
        options = {n: t if n == "alibi_slopes" else wide(t) for n, t in self.options.items()}
        return Problem(*(wide(t) for t in self[:3]), options, wide(self.do), self.dlse)


def problem(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Problem:
    """Random tensors for a case, scores with a standard deviation of about 2: the softmax isn't flat."""
    B, H, Hk, Nq, Nk, D, Dv, options = case
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    options = dict(options)
    packed, layout = options.pop("packed", None), options.pop("layout", None)
    forward_only, through_lse = options.pop("forward_only", False), options.pop("through_lse", False)
    size = 2**0.5 * options.pop("magnitude", 1.0)
    if "scale" in options:
        size = 1.0
    if packed:
        q, k, v = rand(Nq, H, D) * size, rand(Nk, Hk, D) * size, rand(Nk, Hk, Dv)
        do, dlse = rand(Nq, H, Dv), torch.randn(H, Nq, generator=g)
        options |= {f"cu_seqlens_{n}": torch.tensor(c, dtype=torch.int32) for n, c in zip("qk", packed, strict=True)}
    else:
        q, k, v = rand(B, H, Nq, D) * size, rand(B, Hk, Nk, D) * size, rand(B, Hk, Nk, Dv)
        if layout:
            q, k, v = (_in_layout(t, layout) for t in (q, k, v))
        do, dlse = rand(B, H, Nq, Dv), torch.randn(B, H, Nq, generator=g)
    if what := options.get("mask"):
        uniform = lambda *shape: torch.rand(*shape, generator=g)
        if what == "padding":
            lengths = torch.arange(1, B + 1) * Nk // (B + 1)
            options["mask"] = (torch.arange(Nk) < lengths[:, None])[:, None, None]
        else:
            options["mask"] = {
                "random": lambda: uniform(B, H, Nq, Nk) > 0.4,
                "rows": lambda: uniform(1, 1, Nq, 1) > 0.3,
                "none": lambda: torch.zeros(1, 1, Nq, Nk, dtype=torch.bool),
            }[what]()
    if what := options.get("bias"):
        options["bias"] = {
            "full": lambda: rand(B, H, Nq, Nk),
            "head": lambda: rand(1, H, Nq, Nk),
            "key": lambda: rand(B, 1, 1, Nk),
            "query": lambda: rand(1, H, Nq, 1),
            "hide": lambda: rand(Nq, Nk).masked_fill(torch.rand(Nq, Nk, generator=g) < 0.5, float("-inf")),
        }[what]()
    if what := options.pop("alibi", None):
        slopes = 2.0 ** -torch.arange(1, H + 1)
        options["alibi_slopes"] = slopes if what == "heads" else slopes * torch.arange(1, B + 1)[:, None]
    if options.get("sinks"):
        options["sinks"] = rand(H)
    if options.get("dropout_p"):
        options["seed"] = torch.tensor(0x123456789ABCDEF + seed)
    do, dlse = None if forward_only else do, dlse if through_lse else None
    move = lambda t: t.to(device) if isinstance(t, Tensor) else t
    return Problem(*(move(t) for t in (q, k, v)), {n: move(t) for n, t in options.items()}, move(do), move(dlse))


def _in_layout(t, layout):
    """The same values with other strides."""
    if layout == "BNHD":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # one of three slices of a (B, N, 3, H, D) projection
        return torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    if layout == "turned":
        return t.mT.contiguous().mT
    return torch.stack([t, t], -1)[..., 0]  # the head dimension has stride 2


class Result(NamedTuple):
    """o, lse and the gradients by name; a name is missing where the case has no such tensor."""

    o: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def run(p: Problem, backend: str) -> Result:
    """A problem through the public API, forward and, unless it is forward only, backward."""
    inputs = {n: t for n, t in _named(p).items() if t is not None}
    if p.do is not None:
        inputs = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    fn = functional.attention_varlen if "cu_seqlens_q" in p.options else functional.attention
    o, lse = fn(**{**p.options, **inputs}, return_lse=True, backend=backend)
    if p.do is None:
        return Result(o, lse, {})
    flow = [(o, p.do)] if p.dlse is None else [(o, p.do), (lse, p.dlse.to(lse.dtype))]
    return Result(o.detach(), lse.detach(), _gradients(flow, inputs))


def _named(p):
    return {"q": p.q, "k": p.k, "v": p.v, "bias": p.options.get("bias"), "sinks": p.options.get("sinks")}


def _gradients(flow, inputs):
    outputs, grads = zip(*flow, strict=True)
    found = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return {f"d{n}": t for n, t in zip(inputs, found, strict=True)}


def math_attention(p: Problem) -> Result | None:
    """PyTorch's MATH attention in the same dtype; None where it lacks a feature. lse is not among its results."""
    lacking = {"softcap", "sinks", "dropout_p", "cu_seqlens_q"} & p.options.keys()
    if lacking or p.dlse is not None or p.q.dtype == torch.float64 or 0 in (p.q.numel(), p.k.numel()):
        return None
    B, H, Nq, _ = p.q.shape
    Nk, dtype = p.k.shape[2], p.q.dtype
    inputs = {n: t.detach().requires_grad_() for n, t in _named(p).items() if t is not None}
    left, right = arguments.band(p.options.get("causal", False), p.options.get("window"), Nq, Nk)
    distance = torch.arange(Nk, device=p.q.device) - torch.arange(Nq, device=p.q.device)[:, None] - (Nk - Nq)
    hidden = ((distance < -left) | (distance > right)).expand(B, H, Nq, Nk)
    if "mask" in p.options:
        hidden = hidden | ~p.options["mask"]
    added = torch.zeros(B, H, Nq, Nk, dtype=dtype, device=p.q.device)
    if "bias" in inputs:
        added = added + inputs["bias"]
    if "alibi_slopes" in p.options:
        added = (added - p.options["alibi_slopes"][..., None, None] * distance.abs()).to(dtype)
    added = added.masked_fill(hidden, float("-inf"))
    expand = lambda t: t.repeat_interleave(H // p.k.shape[1], 1)
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(
            inputs["q"], expand(inputs["k"]), expand(inputs["v"]), added, scale=p.options.get("scale")
        )
    return Result(o.detach(), None, {} if p.do is None else _gradients([(o, p.do)], inputs))


class Yardsticks(NamedTuple):
    """What results of one problem are held against; math is None where PyTorch's MATH attention lacks a feature."""

    truth: Result
    reference: Result
    math: Result | None


def yardsticks(p: Problem) -> Yardsticks:
    truth = run(p.to(torch.float64), "reference")
    reference = run(p, "reference") if p.q.dtype != torch.float64 else _rounded_float64(p, truth)
    return Yardsticks(truth, reference, math_attention(p))


def disagreements(p: Problem, got: Result, yards: Yardsticks | None = None) -> list[str]:
    """Where a result breaks the rule, in words; empty when it is right. yards: where several backends share them."""
    truth, reference, math = yards or yardsticks(p)
    if "cu_seqlens_q" in p.options:  # (T, heads, D) to (1, heads, T, D): the rule counts by head
        heads_first = lambda r: (
            r and Result(_heads_first("o", r.o), r.lse, {n: _heads_first(n, t) for n, t in r.grads.items()})
        )
        got, truth, reference, math = map(heads_first, (got, truth, reference, math))
    found = [f"{n} is {x.dtype}" for n, x in [("o", got.o), *got.grads.items()] if x.dtype != p.q.dtype]
    yards = [reference] if math is None else [reference, math]
    found += breaks("o", got.o, truth.o, [y.o for y in yards], C_FORWARD, p.q.dtype)
    found += breaks("lse", got.lse, truth.lse, [reference.lse], C_FORWARD, got.lse.dtype)
    for n, g in got.grads.items():
        by_head = n not in ("dbias", "dsinks")
        found += breaks(n, g, truth.grads[n], [y.grads[n] for y in yards], C_GRADIENT, p.q.dtype, by_head)
    return found


def _heads_first(name, t):
    return t.transpose(0, 1)[None] if name in ("o", "dq", "dk", "dv") else t


def _rounded_float64(p, truth):
    """The reference with float64's rounding errors: float32's, 2**-29 as large, doubled because they are other
    draws.
    """
    narrow, ratio = run(p.to(torch.float32), "reference"), 2.0**-28
    rounded = lambda x, x64: torch.where(x64.isfinite(), x64 + (x.double() - x64) * ratio, x64)
    grads = {n: rounded(t, truth.grads[n]) for n, t in narrow.grads.items()}
    return Result(rounded(narrow.o, truth.o), rounded(narrow.lse, truth.lse), grads)


def breaks(name, x, x64, yards, c, dtype, by_head=True) -> list[str]:
    """The rule for one tensor against its yardsticks; by_head: per (batch, head), the first two dimensions."""
    if x.shape != x64.shape:
        return [f"{name} has shape {tuple(x.shape)}, expected {tuple(x64.shape)}"]
    if x.numel() == 0:
        return []
    x, x64, *yards = (t.double().clone() for t in (x, x64, *yards))
    same = (x == x64) | (x.isnan() & x64.isnan())
    if not (x.isfinite() | same).all():
        return [f"{name} has {int((~(x.isfinite() | same)).sum())} elements that should not be infinite or NaN"]
    infinite = ~x64.isfinite()
    if not same[infinite].all():
        return [f"{name} is finite where it should be {x64[infinite][~same[infinite]][0].item()}"]
    for t in (x, x64, *yards):
        t[infinite] = 0.0
    flat = (
        (lambda t: t.reshape(t.shape[0] * t.shape[1], -1)) if by_head and x.dim() > 2 else (lambda t: t.reshape(1, -1))
    )
    x, x64, *yards = (flat(t) for t in (x, x64, *yards))
    eps = torch.finfo(dtype).eps
    worst = lambda t: t.abs().amax(-1)
    rms = lambda t: t.square().mean(-1).sqrt()
    found = []
    rms_floor = max(eps / 8, eps / x.shape[1] ** 0.5)
    for what, size, floor in (("max", worst, eps), ("rms", rms, rms_floor)):
        error = size(x - x64)
        bound = c * torch.stack([size(y - x64) for y in yards]).amax(0) + floor * size(x64)
        if (error > bound).any():
            i = int((error / bound.clamp_min(1e-300)).argmax())
            found.append(f"{name} {what} error {error[i]:.3g} > {bound[i]:.3g} at head {i}")
    return found


class SoftmaxCase(NamedTuple):
    """Shape and options of one softmax; options whose value is a word are made into tensors by `softmax_problem`."""

    shape: tuple[int, ...]
    options: dict[str, Any]


# fmt: off
SOFTMAX_CASES = {
    "row":             SoftmaxCase((1, 7), {}),
    "one column":      SoftmaxCase((5, 1), {}),
    "ragged":          SoftmaxCase((33, 517), {}),
    "wide":            SoftmaxCase((3, 5003), {}),
    "very wide":       SoftmaxCase((2, 70001), {}),
    "3-D":             SoftmaxCase((3, 5, 70), {}),
    "5-D":             SoftmaxCase((2, 1, 3, 4, 20), {}),
    "vector":          SoftmaxCase((300,), {}),
    "first dim":       SoftmaxCase((40, 30), dict(dim=0)),
    "middle dim":      SoftmaxCase((3, 40, 30), dict(dim=1)),
    "long first dim":  SoftmaxCase((600, 90), dict(dim=0)),
    "log":             SoftmaxCase((33, 517), dict(log=True)),
    "log short":       SoftmaxCase((33, 70), dict(log=True, scale=0.3)),
    "log wide":        SoftmaxCase((3, 5003), dict(log=True, scale=0.3)),
    "log first dim":   SoftmaxCase((600, 90), dict(log=True, dim=0)),
    "scale":           SoftmaxCase((33, 130), dict(scale=-2.0)),
    "causal":          SoftmaxCase((2, 2, 66, 66), dict(causal=True)),
    "causal wide":     SoftmaxCase((2, 33, 90), dict(causal=True)),
    "causal tall":     SoftmaxCase((2, 90, 33), dict(causal=True)),
    "top-left":        SoftmaxCase((2, 33, 90), dict(causal="top_left")),
    "log causal tall": SoftmaxCase((2, 90, 33), dict(causal=True, log=True)),
    "mask":            SoftmaxCase((2, 3, 40, 70), dict(mask="random")),
    "padding":         SoftmaxCase((2, 3, 40, 70), dict(mask="padding")),
    "nothing visible": SoftmaxCase((4, 70), dict(mask="none")),
    "log mask":        SoftmaxCase((4, 70), dict(mask="random", log=True)),
    "bias":            SoftmaxCase((2, 3, 40, 70), dict(bias="full", scale=0.5)),
    "bias broadcast":  SoftmaxCase((2, 3, 40, 70), dict(bias="key")),
    "everything":      SoftmaxCase((2, 3, 40, 70), dict(bias="key", mask="random", causal=True, scale=0.5)),
    "large":           SoftmaxCase((9, 300), dict(scale=100.0)),
    "empty":           SoftmaxCase((0, 300), {}),
    "no column":       SoftmaxCase((3, 0), {}),
}
# fmt: on


def softmax_problem(case: SoftmaxCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu"):
    """x, options and dy for a softmax case."""
    g = torch.Generator().manual_seed(seed)
    shape, options = case.shape, dict(case.options)
    rand = lambda *s: torch.randn(*s, generator=g).mul(2).to(dtype).to(device)
    if what := options.get("mask"):
        small = {"random": shape, "padding": (shape[0], 1, 1, shape[-1]), "none": (1, shape[-1])}[what]
        options["mask"] = (torch.rand(*small, generator=g) > (2 if what == "none" else 0.4)).to(device)
    if what := options.get("bias"):
        options["bias"] = rand(*(shape if what == "full" else (1, 1, 1, shape[-1])))
    return rand(*shape), options, rand(*shape)


def run_softmax(x, options, dy, backend):
    """y and, with dy, the gradients of x and bias through the public API."""
    options = dict(options)
    fn = functional.log_softmax if options.pop("log", False) else functional.softmax
    inputs = {n: t.detach() for n, t in (("x", x), ("bias", options.get("bias"))) if t is not None}
    if dy is None:
        return {"y": fn(**{**options, **inputs}, backend=backend)}
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    y = fn(**{**options, **inputs}, backend=backend)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **{f"d{n}": t for n, t in zip(inputs, grads, strict=True)}}


def softmax_disagreements(x, options, dy, got) -> list[str]:
    """Where a softmax result breaks the rule against float64; the yardsticks are the reference and PyTorch in the same
    dtype.
    """
    wide = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
    dy = torch.zeros_like(x) if dy is None else dy
    truth = run_softmax(wide(x), {n: wide(t) for n, t in options.items()}, wide(dy), "reference")
    math = run_softmax(x, options, dy, "reference")
    if x.dtype == torch.float64:  # float32's rounding errors, as in _rounded_float64
        single = lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
        narrow = run_softmax(x.float(), {n: single(t) for n, t in options.items()}, dy.float(), "reference")
        math = {n: torch.where(t.isfinite(), t + (narrow[n].double() - t) * 2.0**-28, t) for n, t in truth.items()}
    yards = [math]
    if x.dtype != torch.float64 and x.numel() and options.keys() <= {"dim", "log", "scale"}:
        leaf = x.detach().requires_grad_()
        y = (torch.log_softmax if options.get("log") else torch.softmax)(
            leaf * options.get("scale", 1.0), options.get("dim", -1)
        )
        yards.append({"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy)[0]})
    found = [f"{n} is {t.dtype}" for n, t in got.items() if t.dtype != x.dtype]
    for name, t in got.items():
        found += breaks(
            name,
            t,
            truth[name],
            [yard[name] for yard in yards],
            C_FORWARD if name == "y" else C_GRADIENT,
            x.dtype,
            by_head=False,
        )
    return found
