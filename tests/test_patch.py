"""`with llmfast.sdpa()`: PyTorch's own modules on llmfast's kernels, and everything as before afterwards."""

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from llmfast import backends, functional, patch

ORIGINAL = F.scaled_dot_product_attention
X = torch.randn(2, 9, 32)


@pytest.fixture(autouse=True)
def restored():
    yield
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach llmfast."""
    seen, inner = [], functional.scaled_dot_product_attention

    def spy(*args):
        seen.append(args[0].shape)
        return inner(*args)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return seen


def module(kind, dropout=0.0):
    torch.manual_seed(0)
    options = dict(dropout=dropout, batch_first=True)
    if kind == "mha":
        return nn.MultiheadAttention(32, 4, **options)
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **options), 2)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, **options), 2)


def run(kind, m, padding=None, causal=False):
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    if kind == "mha":
        return m(X, X, X, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]
    if kind == "encoder":
        return m(X, mask=mask, src_key_padding_mask=padding, is_causal=causal)
    return m(X, X, tgt_mask=mask, tgt_key_padding_mask=padding, tgt_is_causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("kind", ["mha", "encoder", "decoder"])
def test_modules(kind, mode, padded, causal, calls):
    m = module(kind).train(mode == "train")
    padding = torch.arange(9) >= torch.tensor([[9], [6]]) if padded else None
    if padded and causal:
        padding = torch.zeros(2, 9).masked_fill(padding, float("-inf"))  # PyTorch warns where their types differ
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        want = run(kind, m, padding, causal)
        with llmfast.sdpa():
            got = run(kind, m, padding, causal)
    assert len(calls) == {"mha": 1, "encoder": 2, "decoder": 4}[kind]
    real = torch.arange(9) < torch.tensor([[9], [6 if padded else 9]])  # PyTorch's nested path zeroes the others
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-5)
    if mode == "train":
        grads = [torch.autograd.grad(o.square().sum(), m.parameters()) for o in (got, want)]
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1)


def test_dropout_trains(calls):
    m = module("encoder", 0.3).train()
    with llmfast.sdpa():
        torch.manual_seed(1)
        first = m(X)
        torch.manual_seed(1)
        again = m(X)
        assert torch.equal(first, again)
        assert not torch.equal(first, m(X))
    first.sum().backward()
    assert len(calls) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradients(dtype, calls):
    grads = []
    for context in (llmfast.sdpa, nullcontext):
        inputs = [
            t.clone().requires_grad_() for t in torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
        ]
        with torch.autocast("cpu", dtype), context():
            o = F.scaled_dot_product_attention(*inputs, is_causal=True)
            assert o.dtype == dtype
            o.float().sin().sum().backward()
        grads.append([t.grad for t in inputs])
    assert len(calls) == 1
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoint(reentrant, dropout, calls):
    m, grads = module("encoder", dropout).train(), []
    layer = m.layers[0]
    for run in (lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant), layer):
        x = X.clone().requires_grad_()
        with llmfast.sdpa():
            torch.manual_seed(0)
            grads.append(torch.autograd.grad(run(x).sin().sum(), x)[0] if not reentrant else backward(run, x))
    assert len(calls) == 3
    torch.testing.assert_close(*grads, atol=0, rtol=0)


def backward(run, x):
    run(x).sin().sum().backward()
    return x.grad


def test_transforms_and_second_derivatives(calls):
    q, k, v = torch.randn(3, 5, 2, 6, 8, dtype=torch.float64)
    loss = lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin().sum()
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.vmap(torch.func.grad(loss))(q, k, v)
    with llmfast.sdpa():
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k, v), want)
        leaves = [t[:1, :, :3].clone().requires_grad_() for t in (q, k, v)]
        assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, leaves)
    assert calls


def test_an_exception_in_one_thread_leaves_the_others_inside():
    inside, failed, wrong = threading.Barrier(2), threading.Event(), []

    def fails():
        q = torch.randn(1, 2, 4, 8)
        try:
            with llmfast.sdpa():
                inside.wait()
                F.scaled_dot_product_attention(q, q, q, torch.ones(4, 4), is_causal=True)
            wrong.append("accepted")
        except ValueError:
            failed.set()

    def stays():
        with llmfast.sdpa(), llmfast.sdpa():
            inside.wait()
            failed.wait(60)
            if F.scaled_dot_product_attention is not patch.scaled_dot_product_attention:
                wrong.append("restored too early")

    threads = [threading.Thread(target=f) for f in (fails, stays)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_restores_after_an_exception_and_when_nested():
    class Oops(Exception):
        pass

    with pytest.raises(Oops), llmfast.sdpa():  # noqa: PT012
        with llmfast.sdpa():
            pass
        assert F.scaled_dot_product_attention is patch.scaled_dot_product_attention
        assert not torch.backends.mha.get_fastpath_enabled()
        raise Oops


def test_keeps_the_fast_path_off_where_it_was():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with llmfast.sdpa():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_threads_overlap():
    """The last one out restores, whichever came first."""
    inside, leave, wrong = threading.Barrier(4), threading.Event(), []

    def work(i):
        with llmfast.sdpa():
            inside.wait()
            if i:
                leave.wait()
            if F.scaled_dot_product_attention is not patch.scaled_dot_product_attention:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    threads[0].join()
    leave.set()
    for t in threads:
        t.join()
    assert not wrong


def test_unsupported_runs_pytorchs_original(monkeypatch, calls):
    q, v = (
        torch.randn(1, 2, 5, 8),
        torch.randn(1, 2, 5, 4),
    )  # Dv != D: not one of the calls that go to the kernel directly
    monkeypatch.setitem(backends._ops, ("attention", "cpu"), backends.Op(lambda *_: "is out today", None, None))
    backends._warned.clear()
    mask = torch.ones(5, 5).tril() > 0
    with warnings.catch_warnings(record=True) as caught, llmfast.sdpa():
        warnings.simplefilter("always")
        got = F.scaled_dot_product_attention(q, q, v, mask)
        F.scaled_dot_product_attention(q, q, v, mask)
        found = llmfast.explain(F.scaled_dot_product_attention, q, q, v, mask)
        with llmfast.use_backend("reference"):
            llmfast.attention(q, q, v, mask=mask)
    assert torch.equal(got, ORIGINAL(q, q, v, mask))
    assert [
        "PyTorch's scaled_dot_product_attention" in str(w.message) and "cpu: is out today" in str(w.message)
        for w in caught
    ] == [True]
    assert found.chosen == "PyTorch's scaled_dot_product_attention"
    assert found.reasons["cpu"] == "is out today"
    assert "runs in its place" in found.reasons["reference"]


def test_nested_tensors_stay_with_pytorch():
    q = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])
    backends._warned.clear()
    with llmfast.sdpa():
        with pytest.warns(UserWarning, match="nested tensors are not supported"):
            got = F.scaled_dot_product_attention(q, q, q)
        assert "nested" in str(llmfast.explain(F.scaled_dot_product_attention, q, q, q))
    for a, b in zip(got.unbind(), ORIGINAL(q, q, q).unbind(), strict=True):
        assert torch.equal(a, b)


def test_explain_through_a_module():
    with llmfast.sdpa():
        found = llmfast.explain(module("encoder").eval(), X)
    assert found.chosen == "cpu"


@pytest.mark.parametrize("kind", ["direct", "mha", "encoder"])
def test_compile(kind, calls):
    """Compiled before, used inside and after: each call takes what is in force."""
    torch._dynamo.reset()
    m = None if kind == "direct" else module(kind).eval()
    q = torch.randn(1, 4, 9, 8, requires_grad=True)
    work = (lambda: F.scaled_dot_product_attention(q, q, q)) if m is None else lambda: run(kind, m)
    want = work()
    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    compiled()
    assert not calls
    with llmfast.sdpa():
        torch.testing.assert_close(compiled(), want, atol=2e-5, rtol=1e-5)
        compiled().square().sum().backward()
        traced = len(calls)
        assert traced
    compiled()
    assert len(calls) == traced
    torch._dynamo.reset()


def flash(*tensors, **options):
    return F.scaled_dot_product_attention(*tensors, **options)


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this torch has no registry"
)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"attn_mask": torch.ones(9, 11).tril() > 0}],
    ids=str,
)
def test_flash_registry(options):
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    q, k, v = (
        torch.randn(2, n, m, 16, requires_grad=True)
        for n, m in ((4, 9), *((2 if "enable_gqa" in options else 4, 11),) * 2)
    )
    do = torch.randn(2, 4, 9, 16)
    want = flash(q, k, v, **options)
    grads = torch.autograd.grad(want, (q, k, v), do)
    llmfast.register_flash()
    activate_flash_attention_impl("llmfast")
    seen, forward = [], backends.op("attention", "cpu").forward
    try:
        backends._ops["attention", "cpu"] = backends.op("attention", "cpu")._replace(
            forward=lambda *a: (seen.append(1), forward(*a))[1]
        )
        got = flash(q, k, v, **options)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), do), grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    finally:
        backends._ops["attention", "cpu"] = backends._ops["attention", "cpu"]._replace(forward=forward)
        restore_flash_attention_impl()
    assert seen
    assert torch.equal(flash(q, k, v, **options), want)


def test_no_registry(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(NotImplementedError, match=r"use `with llmfast.sdpa\(\)`"):
        llmfast.register_flash()


def test_leaves_what_others_put_there_inside():
    other = lambda *args, **options: None
    with llmfast.sdpa():
        F.scaled_dot_product_attention = other
    try:
        assert F.scaled_dot_product_attention is other
    finally:
        F.scaled_dot_product_attention = ORIGINAL
