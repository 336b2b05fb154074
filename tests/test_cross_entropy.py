"""Cross entropy, and linear cross entropy that never holds the logits, on every backend against PyTorch in float64."""

import itertools
import random
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from test_attention import DTYPES, device_of, skip
from torch.utils._python_dispatch import TorchDispatchMode

import llmfast
from llmfast import backends, cases
from llmfast.backends import cpu

OPTIONS = {
    "plain": {},
    "ignore": dict(ignore_index=3),
    "smoothing": dict(label_smoothing=0.2),
    "weight": dict(weight=True),
    "everything PyTorch has": dict(weight=True, label_smoothing=0.1, ignore_index=1),
    "z loss": dict(z_loss=0.01),
    "softcap": dict(softcap=3.0),
    "everything": dict(weight=True, label_smoothing=0.1, ignore_index=1, z_loss=0.01, softcap=5.0),
}
SHAPES = [(1, 2), (7, 5), (33, 517), (5, 5003), (3, 70001)]


def problem(shape, name, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    options = dict(OPTIONS[name])
    x = torch.randn(*shape, generator=g).mul(3).to(dtype).to(device)
    y = torch.randint(0, shape[1], shape[:1], generator=g).to(device)
    y[::3] = options.get("ignore_index", int(y[0])) % shape[1]
    y[-1] = 0
    if options.get("weight"):
        options["weight"] = (torch.rand(shape[1], generator=g) + 0.5).to(
            device, torch.float64 if dtype == torch.float64 else torch.float32
        )
    return x, y, options


def truth(x, y, options, reduction="none"):
    """PyTorch's, in float64, with the softcap and the z-loss around it."""
    options = dict(options)
    cap, z = options.pop("softcap", 0.0), options.pop("z_loss", 0.0)
    x = cap * torch.tanh(x / cap) if cap else x
    if "weight" in options:
        options["weight"] = options["weight"].double()
    loss = F.cross_entropy(x, y, reduction="none", **options)
    loss = loss + z * x.logsumexp(-1).square() * (y != options.get("ignore_index", -100))
    if reduction == "none":
        return loss
    w = options.get("weight", torch.ones(x.shape[1], dtype=x.dtype, device=x.device))[y]
    return loss.sum() if reduction == "sum" else loss.sum() / (w * (y != options.get("ignore_index", -100))).sum()


def run(x, y, options, backend, inplace=False):
    """The loss of each row and the gradient of x."""
    x = x.detach().clone().requires_grad_()
    loss = llmfast.cross_entropy(x, y, reduction="none", inplace_backward=inplace, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss, x, dloss(loss))[0]


def dloss(loss):
    return torch.linspace(0.5, 1.5, len(loss), device=loss.device).to(loss.dtype)


@lru_cache(1)  # the backends follow each other
def judge(shape, name, dtype, device):
    """The problem, its loss and gradient in float64, and the reference's in its own dtype."""
    x, y, options = problem(shape, name, DTYPES[dtype], device)
    wide = x.double().requires_grad_()
    loss64 = truth(wide, y, options)
    right = loss64.detach(), torch.autograd.grad(loss64, wide, dloss(loss64))[0]
    return (x, y, options), right, run(x, y, options, "reference")


def rows():
    """In the short tier a seeded sample of the shapes and dtypes of every option, and the longest rows once."""
    draw = random.Random(0)
    for shape, name, dtype in itertools.product(SHAPES, OPTIONS, DTYPES):
        short = draw.random() < 0.4 if shape[1] < 70001 else (name, dtype) == ("everything", "bf16")
        for backend in backends.ORDER:
            marks = [] if short else pytest.mark.long
            yield pytest.param(shape, name, dtype, backend, marks=marks, id=f"{shape}-{name}-{dtype}-{backend}")


@pytest.mark.parametrize(("shape", "name", "dtype", "backend"), list(rows()))
def test_agrees_with_float64(shape, name, dtype, backend):
    given, (loss64, dx64), near = judge(shape, name, dtype, device_of(backend))
    try:
        loss, dx = run(*given, backend)
    except NotImplementedError as reason:
        skip(reason, backend)
    if dtype == "fp64":  # the truth itself is rounded alike
        for got, want in ((loss, loss64), (dx, dx64)):
            torch.testing.assert_close(got, want, atol=1e-12 * want.abs().max().item(), rtol=1e-12)
    else:
        assert cases.breaks("loss", loss, loss64, [near[0]], cases.C_FORWARD, loss.dtype, by_head=False) == []
        assert cases.breaks("dx", dx, dx64, [near[1]], cases.C_GRADIENT, DTYPES[dtype], by_head=False) == []
    assert torch.equal(run(*given, backend, inplace=True)[1], dx)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("logits", "target"), [((9,), ()), ((4, 9), (4,)), ((4, 9, 3), (4, 3)), ((2, 9, 3, 5), (2, 3, 5)), ((0, 9), (0,))]
)
def test_is_pytorchs(logits, target, reduction):
    x, y = torch.randn(logits), torch.randint(0, 9, target)
    for options in ({}, dict(ignore_index=2, label_smoothing=0.1), dict(weight=torch.rand(9))):
        got = llmfast.cross_entropy(x, y, reduction=reduction, **options)
        torch.testing.assert_close(got, F.cross_entropy(x, y, reduction=reduction, **options), equal_nan=True)


@pytest.mark.parametrize("backend", backends.ORDER)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 4])
def test_linear(name, reduction, chunk, backend):
    device = device_of(backend)
    _, y, options = problem((33, 29), name, torch.float32, device)
    inputs = [torch.randn(*size, device=device) for size in ((33, 8), (29, 8), (29,))]
    mine = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    try:
        got = linear(mine, y, options, reduction=reduction, chunk=chunk, backend=backend)
    except NotImplementedError as reason:
        skip(reason, backend)
    want = truth(F.linear(*wide), y, options, reduction)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    g = torch.linspace(2, 4, 33, dtype=torch.float64, device=device) if reduction == "none" else want.new_tensor(3)
    grads = (torch.autograd.grad(t, leaves, g.to(t.dtype)) for t, leaves in ((got, mine), (want, wide)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def linear(inputs, y, options, **call):
    x, w, b = inputs
    options = {"class_weight" if n == "weight" else n: t for n, t in options.items()}
    return llmfast.linear_cross_entropy(x, w, y, bias=b, **options, **call)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_in_float16_takes_a_loss_scale(reduction, scale):
    """Where 1 / rows of a probability has no bits left in float16, and where the scale itself has none above it."""
    torch.manual_seed(0)
    x, w, y = torch.randn(4096, 32), torch.randn(2000, 32) / 6, torch.randint(0, 2000, (4096,))
    halves = x.half(), w.half()
    narrow, wide = ([t.to(d, copy=True).requires_grad_() for t in halves] for d in (torch.float16, torch.float64))
    got = llmfast.linear_cross_entropy(*narrow, y, reduction=reduction)
    want = F.cross_entropy(F.linear(*wide), y)
    grads = torch.autograd.grad(scale * got.mean(), narrow), torch.autograd.grad(scale * want, wide)
    for a, b in zip(*grads, strict=True):  # what stays of a scale of 1 is the rounding of the gradient itself
        error = (a.double() - b).norm() / b.norm()
        assert error <= (0.02 if reduction == "none" and scale == 1 else 0.004 if scale == 1 else 1e-3), error


@pytest.mark.parametrize("chunk", [None, 4])
def test_linear_under_autocast(chunk):
    """1500 classes: two blocks of the weight's gradient, which of several chunks is summed and stays in float32."""
    x, w, y = torch.randn(33, 8), torch.randn(1500, 8), torch.randint(0, 1500, (33,))
    mine, wide = [t.clone().requires_grad_() for t in (x, w)], [t.double().requires_grad_() for t in (x, w)]
    with torch.autocast("cpu", torch.bfloat16):
        got = llmfast.linear_cross_entropy(*mine, y, chunk=chunk)
    want = F.cross_entropy(F.linear(*wide), y)
    for scale in (1, 3):
        pair = zip(
            *(torch.autograd.grad(scale * a, b, retain_graph=True) for a, b in ((got, mine), (want, wide))), strict=True
        )
        for a, b in pair:
            assert a.dtype == torch.float32
            assert (a.double() - b).norm() <= 0.02 * b.norm()
    (_, dw) = torch.autograd.grad(got, mine)
    assert torch.equal(dw, dw.bfloat16().float()) == (chunk is None)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_never_holds_the_logits(reduction):
    """The largest tensor made is a chunk of logits, not (T, V)."""
    x, w = torch.randn(256, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    y = torch.randint(0, 1000, (256,))
    with Largest() as seen:
        llmfast.linear_cross_entropy(x, w, y, chunk=16, reduction=reduction, backend="reference").sum().backward()
    assert seen.size < 256 * 1000 * 4 / 2


@pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
def test_no_float32_copy_of_the_logits():
    x = torch.randn(64, 1000).bfloat16().requires_grad_()
    with Largest() as seen:
        llmfast.cross_entropy(x, torch.randint(0, 1000, (64,)), label_smoothing=0.1, backend="cpu").backward()
    assert seen.size == 64 * 1000 * 2


def test_linear_makes_no_gradients_that_nobody_asked_for():
    """Inputs that require a gradient, in evaluation: no more memory and time than without."""
    x, w = torch.randn(64, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    y = torch.randint(0, 100, (64,))
    want = llmfast.linear_cross_entropy(x, w, y)
    with torch.profiler.profile() as seen, torch.no_grad():
        got = llmfast.linear_cross_entropy(x, w, y)
    assert torch.equal(got, want)
    assert not got.requires_grad
    assert sum(e.count for e in seen.key_averages() if e.key in ("aten::mm", "aten::addmm")) == 1


@pytest.mark.parametrize("size", [(0, 4), (2, 0, 4), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_of_nothing_is_pytorchs(size, reduction):
    x, w = torch.randn(size, requires_grad=True), torch.randn(5, size[-1], requires_grad=True)
    y = torch.zeros(size[:-1], dtype=torch.int64)
    got = llmfast.linear_cross_entropy(x, w, y, reduction=reduction)
    want = F.cross_entropy(F.linear(x, w).reshape(-1, 5), y.reshape(-1), reduction=reduction)
    torch.testing.assert_close(got, want.reshape(got.shape), equal_nan=True)
    for a, b in zip(*(torch.autograd.grad(t.sum(), (x, w)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("backend", backends.ORDER)
def test_class_weights_of_any_stride(backend):
    device = device_of(backend)
    x, y = X.to(device).requires_grad_(), Y.to(device)
    for weight in (torch.tensor(2.0).expand(9), torch.arange(1.0, 19.0)[::2], torch.arange(9.0, 0.0, -1).double()):
        weight = weight.to(device)
        try:
            got = llmfast.cross_entropy(x, y, weight=weight, label_smoothing=0.1, reduction="sum", backend=backend)
        except NotImplementedError as reason:
            skip(reason, backend)
        want = F.cross_entropy(x.double(), y, weight=weight.double(), label_smoothing=0.1, reduction="sum")
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(t, x)[0] for t in (got, want)))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_logits_that_were_written_over_are_an_error(backend):
    """Where the gradient took the logits' place, what needs the logits says so instead of taking it for them."""
    if backend and (reason := llmfast.info()["backends"][backend]):
        pytest.skip(reason)
    x, changed = torch.randn(6, 9, requires_grad=True), "modified by an inplace operation"
    loss = lambda t: llmfast.cross_entropy(t, torch.arange(6), inplace_backward=True, backend=backend)
    for make in (lambda: x.tanh(), lambda: x.exp()):
        with pytest.raises(RuntimeError, match=changed):
            loss(make()).backward()
    logits = x * 2
    with pytest.raises(RuntimeError, match=changed):
        (logits.square().mean() + loss(logits)).backward()
    once = loss(x * 2)
    once.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=changed):
        once.backward()


def test_gradcheck_of_reductions_and_weights():
    torch.manual_seed(0)
    y, w = torch.tensor([0, 4, 2, 2]), torch.rand(5, dtype=torch.float64) + 0.5
    x, h, v, b = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((4, 5), (4, 3), (5, 3), (5,)))
    for reduction, weight, chunk in itertools.product(("mean", "sum", "none"), (None, w), (1, 3, None)):
        options = dict(reduction=reduction, ignore_index=2, label_smoothing=0.2, softcap=3.0, z_loss=0.1)
        fn = lambda x, o=options, w=weight: llmfast.cross_entropy(x, y, weight=w, **o)
        if chunk is None:
            assert torch.autograd.gradcheck(fn, (x,))
            assert torch.autograd.gradgradcheck(fn, (x,))
        whole = lambda h, v, b, o=options, w=weight, c=chunk: llmfast.linear_cross_entropy(
            h, v, y, bias=b, class_weight=w, chunk=c, **o
        )
        assert torch.autograd.gradcheck(whole, (h, v, b))


def test_gradcheck():
    x, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2, 2])
    for smoothing, z, cap in itertools.product((0.0, 0.3), (0.0, 0.1), (0.0, 2.0)):
        fn = lambda x, s=smoothing, z=z, c=cap: llmfast.cross_entropy(
            x, y, label_smoothing=s, z_loss=z, softcap=c, ignore_index=2
        )
        assert torch.autograd.gradcheck(fn, (x,))
        assert torch.autograd.gradgradcheck(fn, (x,))


def test_compiles_whole():
    torch._dynamo.reset()
    x, y = torch.randn(6, 11, requires_grad=True), torch.randint(0, 11, (6,))
    w = torch.randn(11, 4, requires_grad=True)
    h = torch.randn(6, 4, requires_grad=True)
    for fn, inputs in (
        (lambda x: llmfast.cross_entropy(x, y, label_smoothing=0.1), (x,)),
        (lambda h, w: llmfast.linear_cross_entropy(h, w, y), (h, w)),
    ):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(fn(*inputs), inputs)
        )
    torch.library.opcheck(torch.ops.llmfast.cross_entropy_fwd.default, (x, y, -100, 0.1, 0.0, 0.0, None, -1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_whole_with_dynamic_shapes(reduction):
    torch._dynamo.reset()
    fn = lambda x, y: llmfast.cross_entropy(x, y, reduction=reduction, ignore_index=2, label_smoothing=0.1)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        x, y = torch.randn(n, 9, requires_grad=True), torch.randint(0, 9, (n,))
        losses = compiled(x, y), fn(x, y)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x) for loss in losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_rise(dtype):
    """A chunk is summed against the largest number before it: rows that grow by little and by much, and fall again."""
    steps = torch.arange(70000) / 2048
    rows = [
        steps * 0.3,
        steps * 9,
        (steps // 5) * 70,
        -steps * 9,
        (steps - 17).abs() * 50,
        (steps // 3) % 2 * 300 - 900,
    ]
    x = (torch.stack(rows) + torch.randn(6, 70000)).to(dtype)
    y = torch.randint(0, 70000, (6,))
    for options in ({}, dict(label_smoothing=0.1), dict(softcap=2e3)):
        got = llmfast.cross_entropy(x, y, reduction="none", backend="cpu", **options)
        want = truth(x.double(), y, options)
        torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=2e-6)


def test_half_precision_has_a_float32_loss():
    x, y = (torch.randn(64, 1000) * 4).bfloat16(), torch.randint(0, 1000, (64,))
    loss = llmfast.cross_entropy(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(x.double(), y), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_rows(dtype):
    """70001 columns are cut in three parts, each with its own maximum."""
    x, y = torch.randn(5, 70001).mul(3).to(dtype), torch.arange(5)
    before, found = torch.get_num_threads(), []
    try:
        for threads, rows in ((1, 5), (3, 5), (3, 1)):
            torch.set_num_threads(threads)
            leaf = x[:rows].clone().requires_grad_()
            loss = llmfast.cross_entropy(leaf, y[:rows], label_smoothing=0.1, reduction="none", backend="cpu")
            found.append((loss.detach()[:1], torch.autograd.grad(loss.sum(), leaf)[0][:1]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_far_below_zero(backend):
    x = torch.randn(3, 70000) - 900
    x[1, :40000] = float("-inf")
    y = torch.full((3,), 60000)
    try:
        got = llmfast.cross_entropy(x, y, reduction="none", backend=backend)
    except NotImplementedError as reason:
        skip(reason, backend)
    want = torch.nn.functional.cross_entropy(x.double(), y, reduction="none")
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("column", [0, 3000, 69999])
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_nan_spoils_its_row_only(backend, column):
    if reason := llmfast.info()["backends"][backend]:
        pytest.skip(reason)
    x, y = torch.randn(3, 70000), torch.tensor([1, 2, 3])
    x[1, column] = float("nan")
    loss = llmfast.cross_entropy(x, y, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    spread = torch.randn(3, 70000 * 2)[:, 70000:]  # rows that don't lie side by side
    got, want = (llmfast.cross_entropy(t, y, reduction="none", backend=backend) for t in (spread, spread.contiguous()))
    assert torch.equal(got, want)


X, Y = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
BAD = [
    (lambda: llmfast.cross_entropy(X.int(), Y), TypeError, "logits: expected a floating"),
    (lambda: llmfast.cross_entropy(X, Y.int()), TypeError, "target: expected int64"),
    (lambda: llmfast.cross_entropy(X, X), TypeError, "target: expected int64"),
    (lambda: llmfast.cross_entropy(X, Y[:3]), ValueError, "target: expected shape .4,."),
    (lambda: llmfast.cross_entropy(X, Y + 1), IndexError, "target: 9 is not one of 9 classes"),
    (lambda: llmfast.cross_entropy(X, Y - 1), IndexError, "target: -1 is not one of 9"),
    (lambda: llmfast.cross_entropy(X, Y, reduction="max"), ValueError, "reduction: expected"),
    (lambda: llmfast.cross_entropy(X, Y, label_smoothing=2.0), ValueError, "label_smoothing: expected"),
    (lambda: llmfast.cross_entropy(X, Y, weight=torch.ones(4)), ValueError, "weight: expected .9,."),
    (lambda: llmfast.cross_entropy(X, Y, ignore_index=1.5), TypeError, "ignore_index: expected an int"),
    (lambda: llmfast.linear_cross_entropy(X, torch.ones(5, 8), Y), ValueError, "weight: expected .V, 9."),
    (lambda: llmfast.linear_cross_entropy(X, torch.ones(5, 9), Y), IndexError, "target: 8 is not one of 5"),
    (lambda: llmfast.linear_cross_entropy(X, torch.ones(9, 9).half(), Y), ValueError, "expected one dtype"),
    (lambda: llmfast.cross_entropy(X, Y, ignore_index=2**70), ValueError, "ignore_index: expected an int64"),
    (
        lambda: llmfast.cross_entropy(X, Y, weight=torch.ones(9, requires_grad=True)),
        ValueError,
        "^weight: has no gradient",
    ),
    *(
        (lambda o=o: llmfast.linear_cross_entropy(X, o.pop("weight", torch.ones(9, 9)), Y, **o), error, message)
        for o, error, message in (
            (dict(bias=torch.ones(3)), ValueError, "^bias: expected .9,."),
            (dict(bias=[1.0] * 9), TypeError, "^bias: expected a torch.Tensor"),
            (dict(bias=torch.ones(9, device="meta")), ValueError, "^bias: is on meta and x on cpu"),
            (dict(weight=torch.ones(9, 9, device="meta")), ValueError, "^weight: is on meta and x on cpu"),
            (dict(class_weight=torch.ones(4)), ValueError, "^class_weight: expected .9,."),
            (dict(class_weight=torch.ones(9, requires_grad=True)), ValueError, "^class_weight: has no gradient"),
            (dict(reduction="max"), ValueError, "^reduction: expected"),
            *((dict(chunk=c), ValueError, "^chunk: expected a number of rows") for c in (-3, 0, 1.5, "a")),
        )
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[f"{i}-{m[:30]}" for i, (_, _, m) in enumerate(BAD)])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "columns", [1, 7, 50257, *(pytest.param(n, marks=pytest.mark.long) for n in (151936, 1_000_003, 2**20))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", backends.ORDER)
def test_any_number_of_classes(columns, dtype, backend):
    torch.manual_seed(0)
    device = device_of(backend)
    x, y = torch.randn(3, columns).to(device, dtype).requires_grad_(), torch.randint(0, columns, (3,)).to(device)
    wide = x.detach().double().requires_grad_()
    try:
        got, want = llmfast.cross_entropy(x, y, backend=backend), F.cross_entropy(wide, y)
    except NotImplementedError as reason:
        skip(reason, backend)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    grads = [torch.autograd.grad(loss, t)[0] for loss, t in ((got, x), (want, wide))]
    torch.testing.assert_close(grads[0].double(), grads[1], atol=1e-9, rtol=1e-5 if dtype == torch.float32 else 8e-3)
