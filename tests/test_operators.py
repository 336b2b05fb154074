"""The operations under torch.compile, vmap, FakeTensor, meta, export, checkpoint, autocast and double backward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import llmfast

attend = lambda q, k, v: llmfast.attention(q, k, v, causal=True, window=9)


def tensors(dtype=torch.float32, grad=True, B=2, H=4, Hk=2, N=24, D=16):
    torch.manual_seed(0)
    shapes = ((B, H, N, D), (B, Hk, N, D), (B, Hk, N, D))
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


def grads(fn, inputs, **kwargs):
    y = fn(*inputs, **kwargs)
    return y, torch.autograd.grad(y.sin().sum(), inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiles_whole_with_backward(engine, dynamic):
    torch._dynamo.reset()
    fn = torch.compile(attend, fullgraph=True, backend=engine, dynamic=dynamic)
    for n in (24, 40):
        inputs = tensors(N=n)
        torch.testing.assert_close(grads(fn, inputs), grads(attend, inputs))


def test_compiles_extras():
    torch._dynamo.reset()
    bias, sinks = torch.randn(4, 24, 24, requires_grad=True), torch.randn(4, requires_grad=True)

    def fn(q, k, v, bias, sinks):
        mask = torch.ones(24, 24, dtype=torch.bool, device=q.device).tril()
        o, lse = llmfast.attention(q, k, v, mask=mask, bias=bias, sinks=sinks, softcap=3.0, return_lse=True)
        return o + lse[..., None]

    inputs = [*tensors(), bias, sinks]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads(compiled, inputs), grads(fn, inputs))


def test_compiles_softmax():
    torch._dynamo.reset()
    x, bias = torch.randn(3, 5, 30, requires_grad=True), torch.randn(5, 30, requires_grad=True)
    for fn in (lambda x, b: llmfast.softmax(x, bias=b, causal=True), lambda x, b: llmfast.log_softmax(x, 1, bias=b)):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(grads(compiled, [x, bias]), grads(fn, [x, bias]))


def test_opcheck():
    q, k, v = tensors()
    none = (None,) * 9
    spec = (0.25, 5, 0, 0.0, 0.0)
    torch.library.opcheck(torch.ops.llmfast.attention_fwd.default, (q, k, v, *spec, *none, -1, True))
    bias = torch.randn(1, 4, 24, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.llmfast.attention_fwd.default, (q, k, v, *spec, None, bias, *none[2:], 3, True))
    x = torch.randn(2, 1, 5, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.llmfast.softmax_fwd.default, (x, 1.0, 0, False, None, None, -1))
    with torch.no_grad():
        o, lse = llmfast.attention(q, k, v, return_lse=True)
        args = (o, q, k, v, o, lse, lse, *spec, *none, -1)
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
        torch.library.opcheck(torch.ops.llmfast.attention_bwd.default, tuple(detached))
        p = x.softmax(-1)
        torch.library.opcheck(torch.ops.llmfast.softmax_bwd.default, (p, p, 1.0, 2**30, False, None, None, -1))
        x, y = torch.randn(5, 9), torch.randint(0, 9, (5,))
        loss, lse = torch.ops.llmfast.cross_entropy_fwd(x, y, 3, 0.1, 0.0, 0.0, None, -1)
        args = (loss, x, y, lse, 3, 0.1, 0.0, 0.0, torch.rand(9), -1)
        torch.library.opcheck(torch.ops.llmfast.cross_entropy_bwd.default, args)


def test_fake_strides_are_real_strides():
    for make in (
        lambda: torch.randn(2, 4, 24, 16),
        lambda: torch.randn(2, 24, 4, 16).transpose(1, 2),
        lambda: torch.randn(24, 2, 4, 16).permute(1, 2, 0, 3),
        lambda: torch.randn(2, 24, 3, 4, 16)[:, :, 1].transpose(1, 2),
    ):
        for Dv in (16, 8):
            q, v = make(), torch.randn(2, 4, 24, Dv)
            real = llmfast.attention(q, make(), v)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = [mode.from_tensor(t) for t in (q, make(), v)]
                assert llmfast.attention(*fake).stride() == real.stride()
            meta = llmfast.attention(*(t.to("meta") for t in (q, q, v)))
            assert meta.shape == real.shape


def test_vmap():
    q, k, v = torch.randn(5, 2, 4, 12, 8), torch.randn(5, 2, 2, 12, 8), torch.randn(5, 2, 2, 12, 8)
    want = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(q, k, v), want)
    torch.testing.assert_close(torch.vmap(attend, in_dims=1)(*(t.movedim(0, 1) for t in (q, k, v))), want)
    shared = torch.vmap(attend, in_dims=(0, None, None))(q, k[0], v[0])
    torch.testing.assert_close(shared, torch.stack([attend(x, k[0], v[0]) for x in q]))
    bias = torch.randn(5, 4, 12, 12)
    biased = lambda q, k, v, b: llmfast.attention(q, k, v, bias=b)
    want = torch.stack([biased(*x) for x in zip(q, k, v, bias, strict=True)])
    torch.testing.assert_close(torch.vmap(biased)(q, k, v, bias), want)
    x = torch.randn(4, 6, 9)
    torch.testing.assert_close(torch.vmap(llmfast.softmax)(x), x.softmax(-1))
    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: attend(q, k, v).sin().sum()))(q, k, v)
    wanted = torch.stack(
        [grads(attend, [t.clone().requires_grad_() for t in x])[1][0] for x in zip(q, k, v, strict=True)]
    )
    torch.testing.assert_close(per_sample, wanted)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap_of_cross_entropy():
    x, y, w = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6)), torch.rand(4, 9)
    for work in (
        lambda fn: torch.vmap(fn)(x, y),
        lambda fn: torch.vmap(fn, (0, None))(x, y[0]),
        lambda fn: torch.vmap(lambda x, y, w: fn(x, y, weight=w))(x, y, w),
        lambda fn: torch.vmap(torch.func.grad(fn))(x, y),
        lambda fn: torch.func.jacrev(torch.func.jacrev(lambda x: fn(x, y[0])))(x[0]),
    ):
        torch.testing.assert_close(work(llmfast.cross_entropy), work(F.cross_entropy))
    with pytest.raises(NotImplementedError, match="transforms are not supported"):
        torch.func.grad(lambda h: llmfast.linear_cross_entropy(h, x[0, :, :], y[0, :4] % 6))(torch.randn(4, 9))


def test_vmap_of_a_mask():
    q, k, v = (torch.randn(5, 2, 12, 8) for _ in range(3))
    mask = torch.rand(5, 12, 12) > 0.4
    mask[..., 0] = True
    gradient = lambda fn: torch.vmap(torch.func.grad(lambda q, k, v, m: fn(q, k, v, m).sin().sum(), argnums=(0, 1, 2)))(
        q, k, v, mask
    )
    found = (gradient(f) for f in (llmfast.scaled_dot_product_attention, F.scaled_dot_product_attention))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_forward_mode_is_refused():
    """A tangent is never dropped."""
    q, x = torch.randn(1, 2, 5, 8), torch.randn(4, 9)
    y = torch.tensor([0, 8, 3, 3])
    for fn, a in (
        (lambda q: llmfast.attention(q, q, q), q),
        (lambda q: llmfast.scaled_dot_product_attention(q, q, q), q),
        (llmfast.softmax, x),
        (lambda x: llmfast.cross_entropy(x, y), x),
    ):
        with pytest.raises(NotImplementedError, match="take reverse mode"):
            torch.func.jvp(fn, (a,), (a,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(a, a)
            with pytest.raises(NotImplementedError, match="take reverse mode"):
                fn(dual)
            fn(a)  # no tangent
    w = torch.randn(3, 9)
    tangents = [torch.func.jvp(lambda x, f=f: f(x, w), (x,), (x,)) for f in (llmfast.linear, F.linear)]
    torch.testing.assert_close(*tangents)


def test_compiled_autograd():
    torch._dynamo.reset()
    inputs = tensors()
    want = grads(attend, inputs)[1]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        attend(*inputs).sin().sum().backward()
    torch.testing.assert_close([t.grad for t in inputs], list(want))


def test_fake_and_meta_cross_entropy():
    given = torch.randn(5, 9), torch.randint(0, 9, (5,)), torch.randn(5, 4), torch.randn(9, 4)

    def run(x, y, h, w):
        x = x.detach().requires_grad_()
        loss = llmfast.cross_entropy(x, y, reduction="none")
        (loss.sum() + llmfast.cross_entropy(x, y, label_smoothing=0.1)).backward()
        return loss.shape, x.grad.shape, llmfast.linear_cross_entropy(h, w, y).shape, llmfast.softmax(x, 0).stride()

    want = run(*given)
    with torch._subclasses.FakeTensorMode() as mode:
        assert run(*(mode.from_tensor(t) for t in given)) == want
    assert run(*(t.to("meta") for t in given)) == want


def test_functional_grad():
    q, k, v = tensors(grad=False)
    got = torch.func.grad(lambda q: attend(q, k, v).sin().sum())(q)
    torch.testing.assert_close(got, grads(lambda q: attend(q, k, v), [q.clone().requires_grad_()])[1][0])


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return llmfast.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    inputs = tuple(tensors(grad=False))
    exported = torch.export.export(Model(), inputs)
    assert "llmfast" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), Model()(*inputs))


def test_export_with_dynamic_shapes():
    class Model(torch.nn.Module):
        def forward(self, q, x, y, mask):
            o = llmfast.scaled_dot_product_attention(q, q, q, is_causal=True)
            return o, llmfast.softmax(x, 0), llmfast.cross_entropy(llmfast.log_softmax(x, mask=mask), y)

    make = lambda b, n: (torch.randn(b, 2, n, 8), torch.randn(n, 9), torch.randint(0, 9, (n,)), torch.rand(n, 9) < 2)
    B, N = torch.export.Dim("B", min=1, max=64), torch.export.Dim("N", min=2, max=512)
    exported = torch.export.export(Model(), make(2, 12), dynamic_shapes=({0: B, 2: N}, {0: N}, {0: N}, {0: N}))
    inputs = make(3, 30)
    torch.testing.assert_close(exported.module()(*inputs), Model()(*inputs))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every number it keeps
def test_jit_trace_keeps_no_results():
    q, x = torch.randn(2, 2, 5, 8), torch.randn(4, 9)
    y = torch.tensor([0, 8, 3, 3])
    for fn, a in (
        (lambda q: llmfast.attention(q, q, q), q),
        (llmfast.softmax, x),
        (lambda x: llmfast.cross_entropy(x, y), x),
    ):
        traced = torch.jit.trace(fn, (a,), check_trace=False)
        torch.testing.assert_close(traced(a + a.flip(-1)), fn(a + a.flip(-1)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpoint(reentrant, dropout_p):
    fn = lambda *x: llmfast.attention(*x, causal=True, dropout_p=dropout_p)
    again = lambda *x: torch.utils.checkpoint.checkpoint(fn, *x, use_reentrant=reentrant)
    found = []
    for call in (again, fn):
        inputs = tensors()
        torch.manual_seed(1)
        call(*inputs).sin().sum().backward()
        found.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_double_backward():
    q, k, v = tensors(torch.float64, H=2, Hk=1, N=5, D=3, B=1)
    assert torch.autograd.gradgradcheck(attend, (q, k, v))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(llmfast.softmax, (x,))
    assert torch.autograd.gradgradcheck(llmfast.log_softmax, (x,))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_of_softmax_and_cross_entropy(dtype, autocast):
    """PyTorch's autocast leaves softmax alone on a CPU; the loss of half-precision logits is float32 everywhere."""
    x, y = torch.randn(4, 9).to(dtype).requires_grad_(), torch.tensor([0, 8, 3, 3])
    with torch.autocast("cpu", dtype=autocast):
        for ours, theirs in ((llmfast.softmax, torch.softmax), (llmfast.log_softmax, F.log_softmax)):
            assert ours(x, -1).dtype == theirs(x, -1).dtype
        got, want = llmfast.cross_entropy(x, y), F.cross_entropy(x, y)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    torch._dynamo.reset()
    q, k, v = tensors(grad=False)
    fn = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fn(q, k, v).dtype == F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        assert llmfast.softmax(q.bfloat16()).dtype == torch.softmax(q.bfloat16(), -1).dtype


def test_modules_copy_and_pickle():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kv = torch.nn.Parameter(torch.randn(1, 2, 6, 8))

        def forward(self, q):
            return llmfast.attention(q, self.kv, self.kv, causal=True)

    model, q = Model(), torch.randn(1, 2, 6, 8)
    for twin in (copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)):
        torch.testing.assert_close(twin(q), model(q))
    state = pickle.loads(pickle.dumps(model.state_dict()))
    model.load_state_dict(state)
    model(q).sum().backward()
    assert model.kv.grad.abs().sum() > 0


def test_only_some_inputs_need_gradients():
    q, k, v = tensors(grad=False)
    for i in range(3):
        inputs = [q.clone(), k.clone(), v.clone()]
        inputs[i].requires_grad_()
        o, lse = llmfast.attention(*inputs, return_lse=True)
        lse_only = torch.autograd.grad(lse.sum(), inputs[i], retain_graph=True, allow_unused=True)[0]
        assert lse_only is None or lse_only.shape == inputs[i].shape
        o.sum().backward()  # a gradient with stride 0
        assert inputs[i].grad.isfinite().all()
