"""Every backend on every softmax case, against float64 by the rule of llmfast.cases."""

import itertools

import pytest
import torch
from test_attention import DTYPES, device_of, sampled, skip

import llmfast
from llmfast import backends, cases


@pytest.mark.parametrize(("name", "dtype", "backend"), list(sampled(cases.SOFTMAX_CASES, 0.5, 0.2)))
def test_agrees_with_float64(name, dtype, backend):
    x, options, dy = cases.softmax_problem(cases.SOFTMAX_CASES[name], DTYPES[dtype], device=device_of(backend))
    got = run_or_skip(x, options, dy, backend)
    assert cases.softmax_disagreements(x, options, dy, got) == []


def run_or_skip(x, options, dy, backend):
    try:
        return cases.run_softmax(x, options, dy, backend)
    except NotImplementedError as reason:
        skip(reason, backend)


@pytest.mark.parametrize("backend", backends.ORDER)
def test_properties(backend):
    x = torch.randn(40, 333, device=device_of(backend)) * 3
    mask = torch.rand(40, 333, device=x.device) > 0.5
    run_or_skip(x, {"mask": mask}, None, backend)
    p = llmfast.softmax(x, mask=mask, backend=backend)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]))
    assert (p[~mask] == 0).all()
    y = llmfast.softmax(x, backend=backend)
    torch.testing.assert_close(llmfast.softmax(x + 5, backend=backend), y, atol=1e-6, rtol=2e-5)
    rising = y.gather(-1, x.argsort(-1))
    assert (rising.diff() >= -1e-6 * rising[:, 1:]).all()


@pytest.mark.parametrize("backend", backends.ORDER)
def test_rows_of_infinities_and_nan(backend):
    x = torch.randn(4, 100, device=device_of(backend))
    x[0] = float("-inf")
    x[1, 5] = float("nan")
    run_or_skip(x, {}, None, backend)
    y = llmfast.softmax(x, backend=backend)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert torch.equal(y[2:], llmfast.softmax(x[2:], backend=backend))
    assert (llmfast.log_softmax(x, backend=backend)[0] == float("-inf")).all()


@pytest.mark.parametrize("backend", backends.ORDER)
def test_out(backend):
    x = torch.randn(3, 40, 70, device=device_of(backend))
    run_or_skip(x, {}, None, backend)
    for dim in (-1, 0, 1):
        want, out = llmfast.softmax(x, dim, backend=backend), torch.full_like(x, float("nan"))
        assert llmfast.softmax(x, dim, out=out, backend=backend) is out
        assert torch.equal(out, want)
        inplace = x.clone()
        llmfast.softmax(inplace, dim, out=inplace, backend=backend)
        assert torch.equal(inplace, want)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_long_rows_far_below_zero(backend, log):
    x = torch.randn(3, 9001) - 900
    x[1, :5000] = float("-inf")
    mask = torch.ones_like(x, dtype=torch.bool)
    softmax = llmfast.log_softmax if log else llmfast.softmax
    want = (torch.log_softmax if log else torch.softmax)(x.double(), -1)
    for options in ({}, {"mask": mask}):
        run_or_skip(x, options, None, backend)
        torch.testing.assert_close(softmax(x, **options, backend=backend).double(), want, atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [40, 700, 9001])
def test_wherever_the_largest_number_lies(columns, dtype):
    run_or_skip(torch.zeros(1, 1), {}, None, "cpu")
    info = torch.finfo(dtype)
    x = torch.randn(9, columns).to(dtype)
    x[0, -1] = 90  # far above all before it
    x[1, columns // 2 :] += 200
    x[2] = torch.linspace(-300, 300, columns).to(dtype)
    x[3, : columns // 2] = info.min
    x[4] = info.min
    x[5, -3:] = info.max
    x[6, 1:] = -torch.inf
    x[7, 0], x[7, -1] = info.max, info.min
    x[8] = -torch.inf
    want = torch.softmax(x.double(), -1).nan_to_num(0)
    got = llmfast.softmax(x, backend="cpu").double()
    assert (got - want).abs().max() <= 2 * info.eps
    want = torch.log_softmax(x.double(), -1).nan_to_num(-torch.inf, neginf=-torch.inf)
    got = llmfast.log_softmax(x, backend="cpu")
    assert (got <= 0).all()
    torch.testing.assert_close(got, want.to(dtype), atol=2 * info.eps, rtol=2 * info.eps)


def test_past_the_caches():
    run_or_skip(torch.zeros(1, 1), {}, None, "cpu")
    for dtype, cols in ((torch.float32, 4111), (torch.bfloat16, 8221)):
        x = torch.randn(1021 * cols + 1).to(dtype)[1:].view(1021, cols)  # rows start at any element of a cache line
        one_by_one = torch.stack([llmfast.softmax(row, backend="cpu") for row in x])
        assert torch.equal(llmfast.softmax(x, backend="cpu"), one_by_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 100, 200, 300])
@pytest.mark.parametrize("log", [False, True])
def test_a_row_depends_on_itself_alone(log, columns, dtype):
    """Not on how many rows there are, where they lie, or which of them it is."""
    run_or_skip(torch.zeros(1, 1), {}, None, "cpu")
    torch.manual_seed(0)
    options = dict(log=log)
    x, dy = (torch.randn(4, 10, columns).to(DTYPES[dtype])[:, :9] for _ in range(2))  # not evenly spaced
    whole = cases.run_softmax(x, options, dy, "cpu")
    packed = cases.run_softmax(x.contiguous(), options, dy.contiguous(), "cpu")
    for n, t in whole.items():
        assert torch.equal(packed[n], t), n
        for i in ((0, 0), (1, 5), (3, 8)):
            assert torch.equal(cases.run_softmax(x[i][None], options, dy[i][None], "cpu")[n][0], t[i]), (n, i)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", range(-4, 4))
def test_causal_over_any_dimension(dim, log):
    """The rows are the last of the other dimensions."""
    x = torch.randn(3, 4, 5, 6)
    f, theirs = (llmfast.log_softmax, torch.log_softmax) if log else (llmfast.softmax, torch.softmax)
    rows = x.movedim(dim, -1)
    M, N = rows.shape[-2:]
    for causal, offset in (("top_left", 0), (True, N - M)):
        hidden = torch.ones(M, N, dtype=torch.bool).triu(offset + 1)
        want = theirs(rows.masked_fill(hidden, float("-inf")), -1).masked_fill(hidden.all(-1, keepdim=True), 0)
        if log:
            want = want.masked_fill(hidden, float("-inf"))
        torch.testing.assert_close(f(x, dim, causal=causal), want.movedim(-1, dim))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 5, 6)])
def test_out_compiles_whole(shape):
    torch._dynamo.reset()
    x = torch.randn(shape)
    for made in (torch.empty(shape), torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))):
        for dim in (-1, 0):
            compiled = torch.compile(
                lambda x, out, d=dim: llmfast.softmax(x, d, out=out), fullgraph=True, backend="aot_eager"
            )
            assert compiled(x, made) is made
            torch.testing.assert_close(made, x.softmax(dim))
            inplace = x.clone()
            compiled(inplace, inplace)
            torch.testing.assert_close(inplace, x.softmax(dim))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_out_is_seen_by_autograd(backend):
    """y was kept for a gradient: over it nothing is written unseen."""
    run_or_skip(torch.zeros(1, 1), {}, None, backend)
    x = torch.randn(4, 9, requires_grad=True)
    y = x.exp()
    with torch.no_grad():
        llmfast.softmax(y, out=y, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_that_is_not_its_own_memory():
    buffer = torch.randn(5, 6)
    flat, x = buffer.view(-1), torch.randn(4, 6)
    with pytest.raises(ValueError, match="out: several of its elements are one in memory"):
        llmfast.softmax(x, out=torch.zeros(6).expand(4, 6))
    with pytest.raises(ValueError, match="out: shares a part of x's memory"):
        llmfast.softmax(flat[:24].view(4, 6), out=flat[1:25].view(4, 6))
    between = torch.randn(4, 12)
    want = between[:, ::2].softmax(-1)
    assert torch.equal(llmfast.softmax(between[:, ::2], out=between[:, 1::2]), llmfast.softmax(between[:, ::2]))
    torch.testing.assert_close(between[:, 1::2], want)
    for given, out in ((flat[:12].view(2, 6), flat[12:24].view(2, 6)), (x, x)):
        want = given.softmax(-1)
        torch.testing.assert_close(llmfast.softmax(given, out=out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 33), (2, 3, 130, 257), (64, 1030), (17, 2)])
def test_the_gradient_does_not_depend_on_how_dy_lies(shape, dtype):
    """x, and so y, lies with its rows side by side or one after the other, dy likewise, or with room between."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape).to(DTYPES[dtype]), torch.randn(shape).to(DTYPES[dtype])
    turned = lambda t: t.mT.contiguous().mT
    for f in (llmfast.softmax, llmfast.log_softmax):
        for lies in (turned, torch.Tensor.contiguous):
            leaf = lies(x).requires_grad_()
            y = f(leaf)
            room = torch.cat((dy, dy), -1)[..., : shape[-1]]
            found = [torch.autograd.grad(y, leaf, d, retain_graph=True)[0] for d in (lies(dy), turned(dy), dy, room)]
            assert all(torch.equal(found[0], other) for other in found[1:])


def lengths():
    """In the long tier more of them, and the interpreter's long rows: half a minute for a million columns."""
    for columns, backend in itertools.product((1, 7, 4097, 262145, 2, 65537, 1_000_003, 2**20), backends.ORDER):
        long = columns not in (1, 7, 4097, 262145) or (columns > 4097 and backend == "triton")
        yield pytest.param(columns, backend, marks=pytest.mark.long if long else ())


@pytest.mark.parametrize(("columns", "backend"), list(lengths()))
def test_any_number_of_columns(columns, backend):
    """Rows of one dtype and the other, over the last dimension and over the first, and their gradients."""
    torch.manual_seed(0)
    x, dy = (
        torch.randn(2, 3, columns, device=device_of(backend)),
        torch.rand(3, columns, device=device_of(backend)) - 0.5,
    )
    run_or_skip(x, {}, None, backend)
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        for f, theirs in ((llmfast.softmax, torch.softmax), (llmfast.log_softmax, torch.log_softmax)):
            for move in (lambda t: t, lambda t: t.t().contiguous()):
                dim = -1 if move(x[0]).shape == x[0].shape else 0
                leaf = move(x[0]).to(dtype).requires_grad_()
                wide = leaf.detach().double().requires_grad_()
                y, want = f(leaf, dim, backend=backend), theirs(wide, dim)
                torch.testing.assert_close(y.double(), want, atol=atol, rtol=atol)
                grads = [torch.autograd.grad(o, t, move(dy).to(o.dtype))[0] for o, t in ((y, leaf), (want, wide))]
                bound = 8 * atol * max(1.0, grads[1].abs().max().item())
                assert (grads[0] - grads[1]).abs().max() <= bound


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("log", [False, True])
def test_gradcheck(log, backend):
    """Every option with every other, first and second derivatives, in float64."""
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    mask = torch.rand(2, 1, 4) > 0.3
    mask[..., 0] = True
    run_or_skip(x, {}, None, backend)
    f = llmfast.log_softmax if log else llmfast.softmax
    seen = (lambda y: y.masked_fill(y == float("-inf"), 0.0)) if log else lambda y: y
    for scale, masked, biased, causal in itertools.product((1.0, -0.7), (False, True), (False, True), (False, True)):
        options = dict(scale=scale, causal=causal, backend=backend, mask=mask if masked else None)
        inputs = (x.clone().requires_grad_(), bias.clone().requires_grad_())[: 1 + biased]
        fn = lambda x, b=None, o=options: seen(f(x, bias=b, **o))
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_gradients(context):
    x, y = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 8, 3, 3])
    for f in (llmfast.softmax, lambda x: llmfast.log_softmax(x, 0), lambda x: llmfast.cross_entropy(x, y)):
        want = f(x)
        assert want.requires_grad
        with context():
            got = f(x)
        assert not got.requires_grad
        assert torch.equal(got, want)
