"""The operations as PyTorch sees them: a direct path for eager calls, registered operators for everything else.

An eager call on plain tensors goes straight to the backend's kernel, inside an autograd.Function when a gradient is
needed: 4 to 10 us. Under torch.compile, vmap, FakeTensor, meta and the like the call goes through torch.ops.llmfast.*,
which has a fake implementation and autograd; a raw-pointer call on such tensors would crash the process.
"""

import torch
from torch import Tensor

from .backends import ORDER, check_name, elsewhere, forced, op, pick, reference, unforced
from .spec import (
    NO_EXTRAS,
    AttentionSpec,
    CrossEntropyExtras,
    CrossEntropySpec,
    Extras,
    Grads,
    SoftmaxExtras,
    SoftmaxSpec,
    schema,
)

LINEAR_ROWS = 16  # beyond, a product is no longer bound by reading the weight, and PyTorch's is good
DECODE_QUERIES = 16  # at most this many queries without gradient take the decode kernel

compiling = torch.compiler.is_compiling
_dispatch_modes = getattr(
    torch._C, "_len_torch_dispatch_stack", None
)  # private: without them every call takes the operator
_functorch_level = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_tracing = getattr(torch._C, "_get_tracing_state", None)  # torch.jit.trace, which would keep a result as a constant
_forward_mode = torch.autograd.forward_ad
_batched = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda t: False
)  # is_grads_batched
_grad_enabled = torch.is_grad_enabled


def plain(*tensors: Tensor | None) -> bool:
    """True when raw pointers may be taken: eager, no modes, ordinary CPU or CUDA tensors."""
    if compiling() or _dispatch_modes is None or _functorch_level is None or _tracing is None:
        return False
    if _dispatch_modes() or _functorch_level() is not None or _tracing() is not None:
        return False
    if getattr(_forward_mode, "_current_level", 0) >= 0:
        return False
    for t in tensors:
        if t is not None and not ((type(t) is Tensor or type(t) is torch.nn.Parameter) and (t.is_cpu or t.is_cuda)):
            return False
        if t is not None and t.is_neg():  # a view of the numbers' negatives: the dispatcher makes a copy of it
            return False
    return True


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives, which an operator would drop without a word, are an error."""
    if compiling() or getattr(_forward_mode, "_current_level", 0) < 0:
        return
    if any(t is not None and _forward_mode.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual numbers) are not supported; "
            "take reverse mode: torch.func.vjp, jacrev, or jacrev of jacrev"
        )


def transforming() -> bool:
    """Whether a torch.func transform is around the call."""
    return not compiling() and _functorch_level is not None and _functorch_level() is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- attention


def attention(q, k, v, spec: AttentionSpec, extras: Extras, backend: str | None, return_lse: bool):
    """(o, lse); lse is None or empty unless return_lse or a gradient asks for it."""
    check_name(backend)
    if extras is NO_EXTRAS:
        eager, grad = plain(q, k, v), _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    else:
        eager, grad = plain(q, k, v, *extras), needs_grad(q, k, v, *extras)
    if eager:
        found = pick("attention", (q, k, v, spec, extras), backend, grad)
        if grad:
            return _Attention.apply(q, k, v, extras.bias, extras.sinks, spec, extras, found, backend)
        return _inference(found, q, extras, spec)(q, k, v, spec, extras, return_lse)
    refuse_tangents(q, k, v, *extras)
    code = ORDER.index(backend) if backend else -1
    call = _Transformed.apply if grad and transforming() else torch.ops.llmfast.attention_fwd
    return call(q, k, v, *spec, *extras, code, return_lse or grad)


def _inference(found, q, extras, spec):
    """The decode kernel for few queries, the forward otherwise."""
    few = q.shape[2] <= DECODE_QUERIES and extras.cu_seqlens_q is None and not spec.dropout_p
    return found.decode if few and found.decode is not None else found.forward


def attention_backward(grads, q, k, v, o, lse, spec, extras, backend):
    """Gradients of (o, lse) to (q, k, v, bias, sinks): the one place where delta = rowsum(o * do) - dlse is made."""
    do, dlse = grads
    if do is None:
        do = torch.zeros_like(o)
    if do.dtype != q.dtype:
        do = do.to(q.dtype)
    delta = lambda rowdot: rowdot(o, do) if dlse is None else rowdot(o, do) - dlse
    if _grad_enabled():  # double backward: the formula in differentiable operations, N x N matrices and all
        return reference.backward(do, q, k, v, o, lse, delta(reference.rowdot), spec, extras)
    if plain(do, q, k, v, o, lse) and not _batched(do):
        found = pick("attention", (q, k, v, spec, extras), backend, True)
        d = None if dlse is None and found.makes_delta else delta(found.rowdot)
        return found.backward(do, q, k, v, o, lse, d, spec, extras)
    code = ORDER.index(backend) if backend else -1
    g = torch.ops.llmfast.attention_bwd(do, q, k, v, o, lse, delta(reference.rowdot), *spec, *extras, code)
    return Grads(*g[:3], None if extras.bias is None else g[3], None if extras.sinks is None else g[4])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, spec, extras, found, backend):
        o, lse = found.forward(q, k, v, spec, extras, True)
        ctx.save_for_backward(q, k, v, o, lse, *extras)
        ctx.spec, ctx.backend = spec, backend or forced()  # the backward runs outside of use_backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, *extras = ctx.saved_tensors
        return *attention_backward((do, dlse), q, k, v, o, lse, ctx.spec, Extras(*extras), ctx.backend), *(None,) * 4


_lib = torch.library.Library("llmfast", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_problem = f"{schema(AttentionSpec)}, {schema(Extras)}, int backend"
_lib.define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_problem}, bool need_lse) -> (Tensor, Tensor)", tags=_tags)
_lib.define(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor delta, {_problem}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_tags,
)
_SPEC, _EXTRAS = len(AttentionSpec._fields), len(Extras._fields)


def _split(rest):
    """spec, extras, backend name and what follows from an operator's flat arguments."""
    spec, extras = AttentionSpec(*rest[:_SPEC]), Extras(*rest[_SPEC : _SPEC + _EXTRAS])
    code, *more = rest[_SPEC + _EXTRAS :]
    return spec, extras, None if code < 0 else ORDER[code], *more


def like(q: Tensor, Dv: int) -> Tensor:
    """An empty o (B, H, Nq, Dv) that keeps the order of q's dimensions in memory."""
    if q.shape[-1] == Dv:
        return torch.empty_like(q)
    order = sorted(range(3), key=lambda i: (-q.stride(i), i))  # outermost first
    o = q.new_empty(*(q.shape[i] for i in order), Dv)
    return o.permute(*(order.index(i) for i in range(3)), 3)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fwd(q, k, v, *rest):
    spec, extras, backend, need_lse = _split(rest)
    found = pick("attention", (q, k, v, spec, extras), backend)
    forward = found.forward if need_lse else _inference(found, q, extras, spec)
    o, lse = forward(q, k, v, spec, extras, need_lse)
    return o, q.new_empty(0, dtype=lse_dtype(q)) if lse is None else lse


def _fwd_fake(q, k, v, *rest):
    lse = q.new_empty(q.shape[:3] if rest[-1] else (0,), dtype=lse_dtype(q))
    return like(q, v.shape[-1]), lse


def _bwd(do, q, k, v, o, lse, delta, *rest):
    spec, extras, backend = _split(rest)
    asked = extras if extras.bias is None else extras._replace(bias=extras.bias.detach().requires_grad_())
    found = pick("attention", (q, k, v, spec, asked), backend, True)  # one that makes a bias's gradient
    g = found.backward(do, q, k, v, o, lse, delta, spec, extras)
    return tuple(q.new_empty(0) if t is None else t for t in g)


def _bwd_fake(do, q, k, v, o, lse, delta, *rest):
    _, extras, _ = _split(rest)
    small = (q.new_empty(0) if t is None else torch.empty_like(t) for t in (extras.bias, extras.sinks))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *small


def _fwd_setup(ctx, inputs, output):
    q, k, v, *rest = inputs
    ctx.spec, extras, backend, _ = _split(rest)
    ctx.backend = backend or forced()
    ctx.save_for_backward(q, k, v, *output, *extras)
    ctx.set_materialize_grads(False)


def _fwd_grad(ctx, do, dlse):
    q, k, v, o, lse, *extras = ctx.saved_tensors
    extras = Extras(*extras)
    g = attention_backward((do, dlse), q, k, v, o, lse, ctx.spec, extras, ctx.backend)
    tensors = Extras(bias=g.dbias, sinks=g.dsinks)
    return g.dq, g.dk, g.dv, *(None,) * _SPEC, *tensors, None, None


def _transformed(operator, setup, grad):
    """An operator with its gradient under torch.func transforms, which register_autograd doesn't serve."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

        setup_context = staticmethod(setup)
        backward = staticmethod(grad)

    return Transformed


_Transformed = _transformed(torch.ops.llmfast.attention_fwd, _fwd_setup, _fwd_grad)


def _register_vmap(name, first, joins):
    """A vmap rule: where joins(args, in_dims) the new dimension goes into the first one, otherwise a loop.

    `first` is the number of leading tensors that have such a dimension of their own (q, k, v or do ... delta).
    """
    operator = getattr(torch.ops.llmfast, name)

    def rule(info, in_dims, *args):
        n = info.batch_size
        front = [
            a if d is None or not isinstance(a, Tensor) else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)
        ]
        whole = lambda outputs: (outputs,) if isinstance(outputs, Tensor) else outputs
        if joins(args, in_dims):
            fold = [
                (t.expand(n, *t.shape) if d is None else t).flatten(0, 1)
                for t, d in zip(front[:first], in_dims[:first], strict=True)
            ]
            found = operator(*fold, *args[first:])
            has = lambda o: o.dim() >= fold[0].dim() - 1 and o.shape[0] == fold[0].shape[0]  # empty dbias: no
            outputs = tuple(o.unflatten(0, (n, -1)) if has(o) else o for o in whole(found))
            dims = tuple(0 if has(o) else None for o in whole(found))
        else:
            rows = [
                operator(*(a if d is None else a[i] for a, d in zip(front, in_dims, strict=True))) for i in range(n)
            ]
            found, outputs = rows[0], tuple(torch.stack(x) for x in zip(*map(whole, rows), strict=True))
            dims = (0,) * len(outputs)
        return (outputs[0], dims[0]) if isinstance(found, Tensor) else (outputs, dims)

    torch.library.register_vmap(f"llmfast::{name}", rule, lib=_lib)


_lib.impl("attention_fwd", _fwd, "CompositeExplicitAutograd")
_lib.impl("attention_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("llmfast::attention_fwd", _fwd_fake, lib=_lib)
torch.library.register_fake("llmfast::attention_bwd", _bwd_fake, lib=_lib)
torch.library.register_autograd("llmfast::attention_fwd", _fwd_grad, setup_context=_fwd_setup, lib=_lib)
for _name, _first in (("attention_fwd", 3), ("attention_bwd", 7)):
    _register_vmap(_name, _first, lambda args, _, n=_first + _SPEC: all(t is None for t in args[n : n + _EXTRAS]))


def written(t: Tensor) -> None:
    """A kernel wrote over t, unseen by PyTorch: from now on a gradient that needs what was there is an error."""
    torch.autograd.graph.increment_version(t)


# ---- softmax


def softmax(x, out, spec: SoftmaxSpec, extras: SoftmaxExtras, backend: str | None):
    check_name(backend)
    grad = needs_grad(x, *extras)
    if plain(x, out, *extras):
        found = pick("softmax", (x, spec, extras), backend, grad)
        if grad:
            return _Softmax.apply(x, extras.bias, spec, extras, found, backend)
        y = found.forward(x, out, spec, extras)
        if out is not None:
            written(out)
        return y
    refuse_tangents(x, *extras)
    code = ORDER.index(backend) if backend else -1
    call = _TransformedSoftmax.apply if grad and transforming() else torch.ops.llmfast.softmax_fwd
    y = call(x, *spec, *extras, code)
    return y if out is None else out.copy_(y)


def softmax_backward(dy, y, spec, extras, backend):
    if _grad_enabled():
        return reference.softmax_backward(dy, y, spec, extras)
    if plain(dy, y) and not _batched(dy):
        return pick("softmax", (y, spec, extras), backend, True).backward(dy, y, spec, extras)
    dx, dbias = torch.ops.llmfast.softmax_bwd(dy, y, *spec, *extras, ORDER.index(backend) if backend else -1)
    return dx, None if extras.bias is None else dbias


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, spec, extras, found, backend):
        y = found.forward(x, None, spec, extras)
        ctx.save_for_backward(y, *extras)
        ctx.spec, ctx.backend = spec, backend or forced()
        return y

    @staticmethod
    def backward(ctx, dy):
        y, *extras = ctx.saved_tensors
        return *softmax_backward(dy, y, ctx.spec, SoftmaxExtras(*extras), ctx.backend), *(None,) * 4


_softmax_problem = f"{schema(SoftmaxSpec)}, {schema(SoftmaxExtras)}, int backend"
_lib.define(f"softmax_fwd(Tensor x, {_softmax_problem}) -> Tensor", tags=_tags)
_lib.define(f"softmax_bwd(Tensor dy, Tensor y, {_softmax_problem}) -> (Tensor, Tensor)", tags=_tags)
_SSPEC = len(SoftmaxSpec._fields)


def _softmax_split(rest):
    return SoftmaxSpec(*rest[:_SSPEC]), SoftmaxExtras(*rest[_SSPEC:-1]), None if rest[-1] < 0 else ORDER[rest[-1]]


def _softmax_fwd(x, *rest):
    spec, extras, backend = _softmax_split(rest)
    return pick("softmax", (x, spec, extras), backend).forward(x, None, spec, extras)


def _softmax_bwd(dy, y, *rest):
    spec, extras, backend = _softmax_split(rest)
    dx, dbias = pick("softmax", (y, spec, extras), backend, True).backward(dy, y, spec, extras)
    return dx, y.new_empty(0) if dbias is None else dbias


def _softmax_setup(ctx, inputs, output):
    ctx.spec, extras, ctx.backend = _softmax_split(inputs[1:])
    ctx.save_for_backward(output, *extras)


def _softmax_grad(ctx, dy):
    y, *extras = ctx.saved_tensors
    dx, dbias = softmax_backward(dy, y, ctx.spec, SoftmaxExtras(*extras), ctx.backend)
    return dx, *(None,) * _SSPEC, *SoftmaxExtras(bias=dbias), None


_TransformedSoftmax = _transformed(torch.ops.llmfast.softmax_fwd, _softmax_setup, _softmax_grad)

_lib.impl("softmax_fwd", _softmax_fwd, "CompositeExplicitAutograd")
_lib.impl("softmax_bwd", _softmax_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("llmfast::softmax_fwd", lambda x, *_: torch.empty_like(x), lib=_lib)
torch.library.register_fake(
    "llmfast::softmax_bwd",
    lambda dy, y, *rest: (
        torch.empty_like(y),
        y.new_empty(0) if rest[-2] is None else torch.empty_like(rest[-2]),
    ),
    lib=_lib,
)
torch.library.register_autograd("llmfast::softmax_fwd", _softmax_grad, setup_context=_softmax_setup, lib=_lib)
for _name, _first in (("softmax_fwd", 1), ("softmax_bwd", 2)):
    _register_vmap(_name, _first, lambda args, _: args[-3] is None and args[-2] is None)  # no mask, no bias


# ---- cross entropy


def cross_entropy(x, target, spec: CrossEntropySpec, extras: CrossEntropyExtras, backend: str | None, inplace: bool):
    """The loss of each row (T,); only x has a gradient, written over x itself when inplace."""
    check_name(backend)
    grad = needs_grad(x)
    if plain(x, target, *extras):
        found = pick("cross_entropy", (x, target, spec, extras), backend, grad)
        if grad:
            return _CrossEntropy.apply(x, target, spec, extras, found, backend, inplace)
        return found.forward(x, target, spec, extras)[0]
    refuse_tangents(x)
    call = _TransformedCrossEntropy.apply if grad and transforming() else torch.ops.llmfast.cross_entropy_fwd
    return call(x, target, *spec, *extras, ORDER.index(backend) if backend else -1)[0]


def cross_entropy_rows(x, target, spec, extras, backend):
    """(loss, lse) of each row without a gradient of its own, for linear_cross_entropy."""
    if plain(x, target, *extras):
        return pick("cross_entropy", (x, target, spec, extras), backend).forward(x, target, spec, extras)
    return torch.ops.llmfast.cross_entropy_fwd(x, target, *spec, *extras, ORDER.index(backend) if backend else -1)


def cross_entropy_backward(dloss, x, target, lse, spec, extras, backend, inplace):
    if _grad_enabled() and (dloss.requires_grad or x.requires_grad):
        lse = torch.logsumexp(reference.capped(reference.wide(x), spec)[0], -1)
        return reference.cross_entropy_backward(dloss, x, target, lse, spec, extras)
    if plain(dloss, x, target, lse) and not _batched(dloss):
        found = pick("cross_entropy", (x, target, spec, extras), backend, True)
        dx = found.backward(dloss, x, target, lse, spec, extras, x if inplace else None)
        if inplace:
            written(x)
        return dx
    code = ORDER.index(backend) if backend else -1
    return torch.ops.llmfast.cross_entropy_bwd(dloss, x, target, lse, *spec, *extras, code)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, spec, extras, found, backend, inplace):
        loss, lse = found.forward(x, target, spec, extras)
        ctx.save_for_backward(x, target, lse, *extras)
        ctx.spec, ctx.backend, ctx.inplace = spec, backend or forced(), inplace
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, lse, *extras = ctx.saved_tensors
        extras = CrossEntropyExtras(*extras)
        dx = cross_entropy_backward(dloss, x, target, lse, ctx.spec, extras, ctx.backend, ctx.inplace)
        return dx, *(None,) * 6


_ce_problem = f"{schema(CrossEntropySpec)}, {schema(CrossEntropyExtras)}, int backend"
_lib.define(f"cross_entropy_fwd(Tensor x, Tensor target, {_ce_problem}) -> (Tensor, Tensor)", tags=_tags)
_lib.define(
    f"cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, Tensor lse, {_ce_problem}) -> Tensor", tags=_tags
)
_CSPEC = len(CrossEntropySpec._fields)


def _ce_split(rest):
    backend, weight = None if rest[-1] < 0 else ORDER[rest[-1]], rest[_CSPEC]
    extras = CrossEntropyExtras(None if weight is None else weight.contiguous())
    return CrossEntropySpec(*rest[:_CSPEC]), extras, backend


def _ce_fwd(x, target, *rest):
    spec, extras, backend = _ce_split(rest)
    return pick("cross_entropy", (x, target, spec, extras), backend).forward(x, target, spec, extras)


def _ce_bwd(dloss, x, target, lse, *rest):
    spec, extras, backend = _ce_split(rest)
    found = pick("cross_entropy", (x, target, spec, extras), backend, True)
    return found.backward(dloss, x, target, lse, spec, extras)


def _ce_setup(ctx, inputs, output):
    ctx.spec, extras, ctx.backend = _ce_split(inputs[2:])
    ctx.save_for_backward(*inputs[:2], output[1], *extras)
    ctx.set_materialize_grads(False)


def _ce_grad(ctx, dloss, dlse):
    x, target, lse, *extras = ctx.saved_tensors
    dloss = torch.zeros_like(lse) if dloss is None else dloss
    dx = cross_entropy_backward(dloss, x, target, lse, ctx.spec, CrossEntropyExtras(*extras), ctx.backend, False)
    if dlse is not None:  # only for callers of the operator itself: llmfast.cross_entropy gives no lse
        capped, dcap = reference.capped(reference.wide(x), ctx.spec)
        dx = dx + (dlse[:, None] * torch.exp(capped - lse[:, None]) * dcap).to(x.dtype)
    return dx, *(None,) * (1 + _CSPEC + len(extras) + 1)


_TransformedCrossEntropy = _transformed(torch.ops.llmfast.cross_entropy_fwd, _ce_setup, _ce_grad)

_lib.impl("cross_entropy_fwd", _ce_fwd, "CompositeExplicitAutograd")
_lib.impl("cross_entropy_bwd", _ce_bwd, "CompositeExplicitAutograd")
torch.library.register_fake(
    "llmfast::cross_entropy_fwd",
    lambda x, target, *_: tuple(x.new_empty(x.shape[:1], dtype=lse_dtype(x)) for _ in range(2)),
    lib=_lib,
)
torch.library.register_fake("llmfast::cross_entropy_bwd", lambda dloss, x, *_: torch.empty_like(x), lib=_lib)
torch.library.register_autograd("llmfast::cross_entropy_fwd", _ce_grad, setup_context=_ce_setup, lib=_lib)

for _name, _first in (("cross_entropy_fwd", 2), ("cross_entropy_bwd", 4)):
    _register_vmap(_name, _first, lambda _, in_dims: in_dims[-2] is None)  # one set of class weights


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x weight^T + bias) in chunks of rows, so that the logits never exist whole.

    x (T, D), weight (V, D), bias (V,); share is what each row's loss counts in the sum, or None: then the losses (T,).
    A sum's gradients are made in the forward, while a chunk's logits are there (Liger Kernel, arXiv 2410.10989), and
    scaled in the backward; those of single losses make the logits once more. In fp16 share comes in the backward too,
    where a loss scale makes up for it: 1 / T leaves too few bits of a probability. Under autocast weight stays wide
    outside, and so does its gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target, share, *rest):
        wanted = ctx.needs_input_grad[:3]
        ctx.late = share is not None and x.dtype == torch.float16
        ctx.wanted, ctx.rest = wanted, rest
        dloss = None
        if share is not None and any(wanted):
            dloss = torch.ones_like(share) if ctx.late else share
        loss, grads = _linear_cross_entropy(x, weight, bias, target, dloss, wanted, *rest)
        if share is None:
            ctx.save_for_backward(x, weight, bias, target)
            return loss
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*grads, share)
        return loss.sum() * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if g.dim():
            x, weight, bias, target = ctx.saved_tensors
            _, grads = _linear_cross_entropy(x, weight, bias, target, g, ctx.wanted, *ctx.rest)
            dtypes, whole = (x.dtype, weight.dtype, None if bias is None else bias.dtype), True
        else:
            *grads, share = ctx.saved_tensors
            g, dtypes = g * share if ctx.late else g, (None if grads[0] is None else grads[0].dtype, *ctx.dtypes)
            whole = not compiling() and g.is_cpu and g == 1  # of a loss that is the last thing computed
        scaled = (None if t is None else (t if whole else t * g).to(d) for t, d in zip(grads, dtypes, strict=True))
        return *scaled, *(None,) * (2 + len(ctx.rest))


def _linear_cross_entropy(x, weight, bias, target, dloss, wanted, spec, extras, backend, chunk):
    """The loss of each row (T,) and where dloss () or (T,) is given the wanted of (dx, dweight, dbias)."""
    wide = lse_dtype(x)  # of sums over chunks
    dx, dweight, dbias = (None,) * 3
    if dloss is not None:
        dloss = dloss.expand(len(x))
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] and not len(x) else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
    losses, weight = [x.new_empty(0, dtype=wide)], weight.to(x.dtype)
    for i in range(0, len(x), chunk):
        rows = slice(i, i + chunk)
        logits = torch.nn.functional.linear(x[rows], weight, bias)  # (chunk, V)
        loss, lse = cross_entropy_rows(logits, target[rows], spec, extras, backend)
        losses.append(loss)
        if dloss is None:
            continue
        d = cross_entropy_backward(dloss[rows], logits, target[rows], lse, spec, extras, backend, True)
        if dx is not None:
            dx[rows] = d @ weight
        if wanted[1]:
            part = d.mT @ x[rows]  # (V, D)
            if dweight is None:
                dweight = part if chunk >= len(x) else part.to(wide)
            else:
                block = 1024 if x.is_cpu else max(1, len(part))  # widened in cache, not in memory
                for to, added in zip(dweight.split(block), part.split(block), strict=True):
                    to += added
        if dbias is not None:
            dbias += d.sum(0, dtype=wide)
    return torch.cat(losses), (dx, dweight, dbias)


# ---- linear


def linear(x, weight, bias, backend: str | None):
    """x (..., D) weight (V, D)^T + bias (V,) without gradient and of few rows on a backend, PyTorch's otherwise."""
    check_name(backend)
    grad = needs_grad(x, weight, bias)
    if compiling() or _dispatch_modes is None or _dispatch_modes():
        if backend is None and (grad or not x.is_cpu or x.shape[:-1].numel() > LINEAR_ROWS):
            return torch.nn.functional.linear(x, weight, bias)
        return torch.ops.llmfast.linear(x, weight, bias, ORDER.index(backend) if backend else -1)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if backend is None and forced() is None:
        why = "has no backward" if grad else _why_pytorch(rows, weight, bias)
        if why is None and not plain(x, weight, bias):
            why = "needs plain tensors"
        if why is not None:
            if not unforced():
                elsewhere("linear", "torch.nn.functional.linear", why)
            return torch.nn.functional.linear(x, weight, bias)
    y = pick("linear", (rows, weight, bias), backend, grad).forward(rows, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _why_pytorch(rows, weight, bias):
    return op("linear", "cpu").supports(rows, weight, bias)


def _linear(x, weight, bias, code):
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if code < 0 and _why_pytorch(rows, weight, bias) is not None:
        return torch.nn.functional.linear(x, weight, bias)
    found = pick("linear", (rows, weight, bias), None if code < 0 else ORDER[code])
    return found.forward(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


_lib.define("linear(Tensor x, Tensor weight, Tensor? bias, int backend) -> Tensor", tags=_tags)
_lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "llmfast::linear", lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_lib
)
