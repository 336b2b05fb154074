"""What the case table can't show of the CPU backward: chunks of key blocks shared by threads, shared bias gradients,
exact zeros, and the short way, whose gradient is one call.
"""

import pytest
import torch

import llmfast
from llmfast.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))


def gradients(q, k, v, do, threads=None, **options):
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    bias = options.get("bias")
    if bias is not None:
        options["bias"] = bias.clone().requires_grad_()
        inputs.append(options["bias"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        o = llmfast.attention(*inputs[:3], **options, backend="cpu")
        return torch.autograd.grad(o, inputs, do)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 100}, {"bias": (1, 1, 1, 1600)}, {"bias": (1100, 1)}]
)
def test_bits_do_not_depend_on_threads_or_batch(options, dtype):
    """1600 keys make 3 chunks; one head on several threads shares them, many heads do not."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(2, 4, n, 24).to(dtype) for n in (1100, 1600, 1600, 1100))
    if "bias" in options:
        options = {"bias": torch.randn(options["bias"]).to(dtype)}
    one = [t[:1, :1] for t in (q, k, v)]
    alone, shared = (gradients(*one, do[:1, :1], threads, **options) for threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    whole = gradients(q, k, v, do, 2, **options)
    assert all(torch.equal(a, b[:1, :1]) for a, b in zip(alone[:3], whole[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score(dtype):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 40, 40).to(dtype) for _ in range(4))
    dq, _, _ = gradients(q, k, v, do, causal=True)
    assert (dq[:, :, 0] == 0).all()
    assert (dq[:, :, 1:].abs().amax(-1) > 0).all()


def _rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


CU, Y = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([2, 0, 4, 2])
ATTENTION = {
    "plain": {},
    "causal": dict(causal=True),
    "top-left": dict(causal="top_left", scale=-0.3),
    "window, softcap": dict(causal=True, window=3, softcap=2.0),
    "window on both sides": dict(window=2),
    "mask": dict(mask=_rand(5, 7) > -0.5),
    "bias and mask": dict(bias=_rand(4, 1, 7), mask=_rand(2, 1, 5, 7) > -0.5, causal=True),
}
SOFTMAX = {"softmax": (llmfast.softmax, -1), "scaled": (llmfast.softmax, 2), "of columns": (llmfast.softmax, 0)} | {
    "log": (llmfast.log_softmax, -1), "log of columns": (llmfast.log_softmax, 1)
}  # fmt: skip
LOSSES = {
    "mean": {},
    "sum": dict(reduction="sum", z_loss=0.1),
    "none": dict(reduction="none", softcap=3.0),
    "ignored": dict(ignore_index=2, label_smoothing=0.2),
}


def short_calls(dtype):
    """name: (what is differentiated, the call): with backend="cpu" it takes the long way."""
    q, k = _rand(2, 5, 4, 8, dtype=dtype).transpose(1, 2), _rand(2, 2, 7, 8, dtype=dtype)  # B2 H4 Nq5, Hk2 Nk7
    packed, x = _rand(7, 4, 8, dtype=dtype), _rand(3, 4, 5, dtype=dtype)
    attend = lambda given: lambda *t, **kw: llmfast.attention(*t, **given, **kw)
    varlen = lambda **given: lambda *t, **kw: llmfast.attention_varlen(*t, CU, CU, **given, **kw)
    soft = lambda f, dim, scale: lambda x, **kw: f(x, dim, scale=scale, **kw)
    lose = lambda given: lambda x, **kw: llmfast.cross_entropy(x, Y, **given, **kw)
    calls = {name: ((q, k, k.flip(2)), attend(given)) for name, given in ATTENTION.items()}
    calls |= {"no keys": ((q, k[:, :, :0], k[:, :, :0]), attend({})), "no batch": ((q[:0], k[:0], k[:0]), attend({}))}
    calls |= {"varlen": ((packed, packed[:, :2], packed[:, 2:]), varlen())}
    calls |= {"varlen, window": ((packed,) * 3, varlen(causal=True, window=2))}
    calls |= {name: ((x,), soft(f, dim, -0.7 if name == "scaled" else 1.0)) for name, (f, dim) in SOFTMAX.items()}
    return calls | {name: ((x[0],), lose(given)) for name, given in LOSSES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", short_calls(torch.float32))
def test_the_short_way_gives_the_same_gradients(name, dtype, monkeypatch):
    given, call = short_calls(dtype)[name]
    inputs = [t.clone().requires_grad_() for t in given]
    want = call(*inputs, backend="cpu")
    do = _rand(*want.shape, dtype=want.dtype)
    kinds = [do, torch.ones((), dtype=do.dtype).expand_as(do), do.mT.contiguous().mT if do.dim() > 1 else do]
    wanted = [torch.autograd.grad(want, inputs, d, retain_graph=True) for d in kinds]
    took = lambda *_: pytest.fail("took the long way")
    for function in ("attention", "softmax", "cross_entropy"):
        monkeypatch.setattr(llmfast.ops, function, took)
        monkeypatch.setattr(llmfast.ops, function + "_backward", took)
    got = call(*inputs)
    tolerance = 1e-6 if name in LOSSES or "columns" in name else 0.0  # a mean in one rounding, a sum in another order
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    for d, w in zip(kinds, wanted, strict=True):
        for a, b, t in zip(torch.autograd.grad(got, inputs, d, retain_graph=True), w, inputs, strict=True):
            torch.testing.assert_close(
                a, b, atol=tolerance, rtol=tolerance if dtype != torch.bfloat16 else 8 * tolerance
            )
            assert a.stride() == torch.empty_like(t).stride()


@pytest.mark.parametrize("name", short_calls(torch.float32))
def test_the_short_way_is_differentiable_twice(name):
    given, call = short_calls(torch.float64)[name]
    inputs = [t.clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["causal", "varlen", "softmax", "mean"])
def test_the_short_way_leaves_the_rest_to_the_long_one(name):
    given, call = short_calls(torch.float32)[name]
    inputs = [t.clone().requires_grad_() for t in given]
    o = call(*inputs)
    want = torch.autograd.grad(o.sin().sum(), inputs, retain_graph=True)
    close = lambda got: torch.testing.assert_close(got, want)
    with llmfast.use_backend("reference"):
        close(torch.autograd.grad(o.sin().sum(), inputs, retain_graph=True))
    batch = torch.stack([o.cos().detach()] * 2)
    found = torch.autograd.grad(o, inputs, batch, is_grads_batched=True, retain_graph=True)
    close(tuple(g[1] for g in found))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t), torch.autograd.detect_anomaly():
        close(torch.autograd.grad(call(*inputs).sin().sum(), inputs))
    torch.autograd.grad(o.sin().sum(), inputs)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(o.sin().sum(), inputs)
    saved = [t.clone() for t in given]
    o = call(saved[0].requires_grad_(), *saved[1:])
    with torch.no_grad():
        (o if name == "softmax" else saved[-1]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
