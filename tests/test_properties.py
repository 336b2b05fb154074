"""What must hold of any attention and any softmax, on random shapes. The shapes are drawn by hypothesis, without a
clock.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmfast
from llmfast import cases

size = st.integers(1, 150)
small = st.integers(1, 3)
shapes = st.tuples(small, small, small, size, size, st.integers(1, 80), st.integers(0, 2**20))


def quick(test):
    return settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(test)


def thorough(test):
    return settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(test)


PROPERTIES = []


def for_any(strategy):
    """Registers a property: a few examples in the short tier, many in the long one."""

    def register(fn):
        PROPERTIES.append((fn, strategy))
        return fn

    return register


def tensors(shape, square=False):
    B, G, Hk, Nq, Nk, D, seed = shape
    torch.manual_seed(seed)
    Nk = Nq if square else Nk
    return torch.randn(B, Hk * G, Nq, D), torch.randn(B, Hk, Nk, D), torch.randn(B, Hk, Nk, D)


def attend(*tensors, **options):
    return llmfast.attention(*tensors, **{"backend": "cpu", "return_lse": True, **options})


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@for_any(shapes)
def keys_may_come_in_any_order(shape):
    q, k, v = tensors(shape)
    order = torch.randperm(k.shape[2])
    close(attend(q, k[:, :, order], v[:, :, order]), attend(q, k, v))


@for_any(shapes)
def causal_is_a_mask(shape):
    q, k, v = tensors(shape)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    close(attend(q, k, v, causal=True), attend(q, k, v, mask=mask))


@for_any(st.tuples(shapes, st.integers(0, 60), st.integers(0, 60)))
def a_window_is_a_mask(drawn):
    shape, left, right = drawn
    q, k, v = tensors(shape)
    d = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    close(attend(q, k, v, window=(left, right)), attend(q, k, v, mask=(d >= -left) & (d <= right)))


@for_any(shapes)
def alignments_agree_on_squares(shape):
    q, k, v = tensors(shape, square=True)
    for a, b in zip(attend(q, k, v, causal=True), attend(q, k, v, causal="top_left"), strict=True):
        assert torch.equal(a, b)


@for_any(shapes)
def batches_and_heads_are_independent(shape):
    q, k, v = tensors(shape)
    o, lse = attend(q, k, v, causal=True)
    b, h = q.shape[0] - 1, q.shape[1] - 1
    hk = h * k.shape[1] // q.shape[1]
    one = attend(q[b:, h:], k[b:, hk : hk + 1], v[b:, hk : hk + 1], causal=True)
    assert torch.equal(o[b:, h:], one[0])
    assert torch.equal(lse[b:, h:], one[1])


@for_any(shapes)
def threads_change_no_bit(shape):
    q, k, v = (t.requires_grad_() for t in tensors(shape))
    threads, results = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        o, lse = attend(q, k, v, causal=True)
        results.append((o, lse, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@for_any(shapes)
def halves_merge(shape):
    q, k, v = tensors(shape)
    n = k.shape[2] // 2
    parts = [attend(q, k[:, :, s], v[:, :, s]) for s in (slice(0, n), slice(n, None))]
    close(llmfast.merge_attention(*parts[0], *parts[1]), attend(q, k, v))


@for_any(shapes)
def scale_may_move_into_q(shape):
    q, k, v = tensors(shape)
    close(attend(q * 4, k, v, scale=0.03125), attend(q, k, v, scale=0.125))


@for_any(shapes)
def a_constant_bias_shifts_lse_alone(shape):
    q, k, v = tensors(shape)
    o, lse = attend(q, k, v)
    shifted = attend(q, k, v, bias=torch.full((1, 1), 3.0))
    close(shifted, (o, lse + 3))


@for_any(shapes)
def padding_is_cropping(shape):
    q, k, v = tensors(shape)
    n = (k.shape[2] + 1) // 2
    mask = torch.arange(k.shape[2]) < n
    close(attend(q, k, v, mask=mask), attend(q, k[:, :, :n], v[:, :, :n]))


@for_any(shapes)
def packing_is_one_by_one(shape):
    B, G, Hk, Nq, _, D, seed = shape
    torch.manual_seed(seed)
    lengths = torch.randint(0, max(Nq, 2), (B + 1,))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    T = int(cu[-1])
    q, k, v = torch.randn(T, Hk * G, D), torch.randn(T, Hk, D), torch.randn(T, Hk, D)
    o, lse = llmfast.attention_varlen(q, k, v, cu, cu, causal=True, return_lse=True, backend="cpu")
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        one = attend(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)), causal=True)
        close((o[a:b].transpose(0, 1), lse[:, a:b]), (one[0][0], one[1][0]))


@for_any(shapes)
def strides_change_no_bit(shape):
    q, k, v = tensors(shape)
    want = attend(q, k, v, causal=True)
    for layout in ("BNHD", "fused", "strided"):
        got = attend(*(cases._in_layout(t, layout) for t in (q, k, v)), causal=True)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@for_any(shapes)
def every_output_is_written(shape):
    """Deterministic mode fills fresh memory with NaN."""
    q, k, v = (t.requires_grad_() for t in tensors(shape))
    torch.use_deterministic_algorithms(True)
    try:
        o, lse = attend(q, k, v, window=3)
        found = (o, *torch.autograd.grad(o.sum(), (q, k, v)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in found)
    assert not lse.isnan().any()


@for_any(shapes)
def outputs_are_averages_of_values(shape):
    q, k, v = tensors(shape)
    o, _ = attend(q, k, v)
    v = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    assert (o <= v.amax(2, keepdim=True) + 1e-5).all()
    assert (o >= v.amin(2, keepdim=True) - 1e-5).all()
    close(attend(q, k, torch.ones_like(k))[0], torch.ones_like(q))


@for_any(shapes)
def linear_in_values(shape):
    q, k, v = tensors(shape)
    w = torch.randn_like(v)
    close(attend(q, k, 2 * v - w)[0], 2 * attend(q, k, v)[0] - attend(q, k, w)[0], 5e-5)


@for_any(shapes)
def grouped_heads_are_repeated_heads(shape):
    q, k, v = tensors(shape)
    repeat = lambda t: t.repeat_interleave(q.shape[1] // k.shape[1], 1)
    close(attend(q, k, v, causal=True), attend(q, repeat(k), repeat(v), causal=True))


@for_any(shapes)
def a_sink_is_a_key_without_value(shape):
    q, k, v = tensors(shape)
    sinks = torch.randn(q.shape[1])
    lse = sinks[:, None].expand(q.shape[:3]).contiguous()
    close(attend(q, k, v, sinks=sinks), llmfast.merge_attention(*attend(q, k, v), torch.zeros_like(q), lse))


@for_any(shapes)
def alibi_is_a_bias(shape):
    q, k, v = tensors(shape)
    slopes = torch.rand(q.shape[1])
    d = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    close(attend(q, k, v, alibi_slopes=slopes), attend(q, k, v, bias=-slopes[:, None, None] * d.abs()), 5e-5)


@for_any(shapes)
def a_huge_softcap_caps_nothing(shape):
    q, k, v = tensors(shape)
    close(attend(q, k, v, softcap=1e4), attend(q, k, v), 1e-3)


@for_any(shapes)
def later_keys_are_not_seen(shape):
    q, k, v = tensors(shape, square=True)
    n = (q.shape[2] + 1) // 2
    want = attend(q, k, v, causal=True)[0][:, :, :n]
    k[:, :, n:], v[:, :, n:] = 1e4, -1e4
    close(attend(q, k, v, causal=True)[0][:, :, :n], want)


@for_any(shapes)
def doubled_keys_add_ln2(shape):
    q, k, v = tensors(shape)
    o, lse = attend(q, k, v)
    close(attend(q, torch.cat([k, k], 2), torch.cat([v, v], 2)), (o, lse + 0.6931472))


@for_any(shapes)
def gradients_balance(shape):
    """Scores are bilinear in q and k, so q . dq = k . dk; each row's weights sum to one, so the rows of dv sum to those
    of do.
    """
    q, k, v = (t.requires_grad_() for t in tensors(shape))
    o, _ = attend(q, k, v)
    do = torch.randn_like(o)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    scale = (q * dq).abs().sum() + 1
    assert ((q * dq).sum() - (k * dk).sum()).abs() < 1e-5 * scale
    close(dv.sum(2), do.unflatten(1, (k.shape[1], -1)).sum((2, 3)), 1e-3)


@for_any(shapes)
def lse_has_a_gradient(shape):
    """The gradient of the sum of lse to the scores is the weights: to v it is zero, to a bias by key it sums to the
    rows.
    """
    q, k, v = tensors(shape)
    bias = torch.zeros(k.shape[2], requires_grad=True)
    v.requires_grad_()
    _, lse = attend(q, k, v, bias=bias)
    db, dv = torch.autograd.grad(lse.sum(), (bias, v), allow_unused=True)
    close(db.sum(), torch.tensor(float(lse.numel())), 1e-3)
    assert dv is None or (dv == 0).all()


@for_any(st.tuples(size, st.integers(1, 3000), st.integers(0, 2**20)))
def softmax_rows_sum_to_one(drawn):
    rows, n, seed = drawn
    torch.manual_seed(seed)
    x = torch.randn(rows % 20 + 1, n) * 4
    p = llmfast.softmax(x, backend="cpu")
    close(p.sum(-1), torch.ones(len(x)))
    close(llmfast.softmax(x - 7, backend="cpu"), p)
    assert torch.equal(p.argmax(-1), x.argmax(-1))


@for_any(st.tuples(size, st.integers(1, 3000), st.integers(0, 2**20)))
def log_softmax_is_its_logarithm(drawn):
    rows, n, seed = drawn
    torch.manual_seed(seed)
    x = torch.randn(rows % 20 + 1, n)
    close(llmfast.log_softmax(x, backend="cpu").exp(), llmfast.softmax(x, backend="cpu"))


@for_any(st.tuples(size, st.integers(1, 3000), st.integers(0, 2**20)))
def softmax_hides_what_is_masked(drawn):
    rows, n, seed = drawn
    torch.manual_seed(seed)
    x, mask = torch.randn(rows % 20 + 1, n), torch.rand(rows % 20 + 1, n) > 0.5
    p = llmfast.softmax(x, mask=mask, backend="cpu")
    assert (p[~mask] == 0).all()
    x[~mask] = float("nan")
    assert torch.equal(llmfast.softmax(x.nan_to_num(1e30), mask=mask, backend="cpu"), p)


@for_any(st.tuples(size, st.integers(1, 300), st.integers(0, 2**20)))
def softmax_dims_are_alike(drawn):
    rows, n, seed = drawn
    torch.manual_seed(seed)
    x = torch.randn(3, rows, n)
    close(llmfast.softmax(x, 1, backend="cpu"), llmfast.softmax(x.transpose(1, 2), backend="cpu").transpose(1, 2))
    close(llmfast.softmax(x, 0, backend="cpu"), x.softmax(0))


rows_of = st.tuples(st.integers(1, 12), st.integers(1, 3000), st.integers(0, 2**20))


def logits(drawn, scale=4.0):
    rows, n, seed = drawn
    torch.manual_seed(seed)
    return torch.randn(rows, n) * scale, torch.randint(0, n, (rows,))


@for_any(rows_of)
def softmax_keeps_the_order(drawn):
    x, _ = logits(drawn)
    for f in (llmfast.softmax, llmfast.log_softmax):
        rising = f(x, backend="cpu").gather(-1, x.argsort(-1))
        assert (rising.diff() >= -2e-7 * rising.abs().amax()).all()


@for_any(rows_of)
def softmax_of_nothing_is_nothing(drawn):
    x, _ = logits(drawn)
    mask, x.requires_grad = torch.rand(x.shape) > 0.5, True
    mask[0] = False
    p, logp = (f(x, mask=mask, backend="cpu") for f in (llmfast.softmax, llmfast.log_softmax))
    assert (p[0] == 0).all()
    assert (logp[~mask] == float("-inf")).all()
    dx, dlog = (torch.autograd.grad(y, x, torch.randn_like(y))[0] for y in (p, logp))
    assert (dx[~mask] == 0).all()
    assert (dlog[0] == 0).all()
    assert dlog.isfinite().all()


@for_any(rows_of)
def nan_stays_in_its_row(drawn):
    x, y = logits(drawn)
    row = drawn[2] % len(x)
    x[row, drawn[2] % x.shape[1]] = float("nan")
    other = torch.arange(len(x)) != row
    for f in (llmfast.softmax, llmfast.log_softmax):
        for got in (f(x, backend="cpu"), f(x.t().contiguous(), 0, backend="cpu").t()):
            assert got[row].isnan().all()
            assert got[other].isfinite().all()
    loss = llmfast.cross_entropy(x, y, reduction="none", backend="cpu")
    assert torch.equal(loss.isnan(), ~other)


@for_any(rows_of)
def strides_of_a_softmax_do_not_matter(drawn):
    x, y = logits(drawn)
    for far in (torch.stack([x, x], 1)[:, 1], torch.cat([x, x], 1)[:, : x.shape[1]], x.t().contiguous().t()):
        for f in (llmfast.softmax, llmfast.log_softmax):
            close(f(far, backend="cpu"), f(x, backend="cpu"), 2e-6)
        leaf, near = far.detach().requires_grad_(), x.clone().requires_grad_()
        losses = [llmfast.cross_entropy(t, y, reduction="none", backend="cpu") for t in (leaf, near)]
        assert torch.equal(*losses)
        grads = [torch.autograd.grad(a.sum(), t)[0] for a, t in zip(losses, (leaf, near), strict=True)]
        assert torch.equal(*grads)


@for_any(rows_of)
def softmax_in_place_is_out_of_place(drawn):
    x, _ = logits(drawn)
    options = [{}, dict(mask=torch.rand(x.shape) > 0.3), dict(bias=torch.randn(x.shape[1])), dict(causal=True)]
    for given_ in options:
        for f in (llmfast.softmax, llmfast.log_softmax):
            want, inplace = f(x, backend="cpu", **given_), x.clone()
            assert f(inplace, out=inplace, backend="cpu", **given_) is inplace
            assert torch.equal(inplace, want)


@for_any(rows_of)
def gradients_of_a_row_add_up_to_nothing(drawn):
    x, y = logits(drawn, 1.0)
    x.requires_grad_()
    for f in (llmfast.softmax, lambda x, **o: llmfast.cross_entropy(x, y, reduction="none", label_smoothing=0.1, **o)):
        o = f(x, backend="cpu")
        (dx,) = torch.autograd.grad(o, x, torch.rand_like(o))
        assert (dx.sum(-1).abs() <= 1e-5 * (1 + dx.abs().sum(-1))).all()


@for_any(rows_of)
def cross_entropy_is_the_targets_log_softmax(drawn):
    x, y = logits(drawn)
    loss = llmfast.cross_entropy(x, y, reduction="none", backend="cpu")
    close(loss, -llmfast.log_softmax(x, backend="cpu").gather(-1, y[:, None])[:, 0])
    close(llmfast.cross_entropy(x - 30, y, reduction="none", backend="cpu"), loss, 1e-4)
    order = torch.randperm(x.shape[1])
    close(llmfast.cross_entropy(x[:, order], order.argsort()[y], reduction="none", backend="cpu"), loss)
    for reduction, want in (("sum", loss.sum()), ("mean", loss.mean())):
        close(llmfast.cross_entropy(x, y, reduction=reduction), want)


@for_any(rows_of)
def ignored_rows_count_for_nothing(drawn):
    x, y = logits(drawn)
    keep = torch.rand(len(y)) > 0.5
    keep[0] = True
    hidden = y.where(keep, -100)
    a, b, c = x.clone().requires_grad_(), x[keep].clone().requires_grad_(), x.clone().requires_grad_()
    loss, alone = llmfast.cross_entropy(a, hidden), llmfast.cross_entropy(b, y[keep])
    close(loss, alone)
    da, db = torch.autograd.grad(loss, a)[0], torch.autograd.grad(alone, b)[0]
    assert (da[~keep] == 0).all()
    assert torch.equal(da[keep], db)
    again = llmfast.cross_entropy(c, hidden, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(again, c)[0], da)
    assert torch.equal(c.detach(), da)


@for_any(rows_of)
def smoothing_mixes_two_losses(drawn):
    x, y = logits(drawn)
    s = 0.3
    hard, soft = (llmfast.cross_entropy(x, y, label_smoothing=p, reduction="none") for p in (0.0, 1.0))
    close(soft, -x.log_softmax(-1).mean(-1), 1e-4)
    mixed = llmfast.cross_entropy(x, y, label_smoothing=s, reduction="none")
    close(mixed, (1 - s) * hard + s * soft, 1e-4)
    z = llmfast.cross_entropy(x, y, z_loss=0.5, reduction="none")
    close(z, hard + 0.5 * x.logsumexp(-1).square(), 1e-4)


@for_any(st.tuples(rows_of, st.integers(1, 40), st.integers(1, 40)))
def chunks_of_a_linear_cross_entropy_do_not_matter(drawn):
    (rows, V, seed), D, chunk = drawn
    torch.manual_seed(seed)
    inputs = [torch.randn(rows * 3, D), torch.randn(V, D) / D**0.5, torch.randn(V)]
    inputs = [t.requires_grad_() for t in inputs]
    y = torch.randint(0, V, (rows * 3,))
    found = []
    for whole in (False, True):
        h, w, b = inputs
        if whole:
            loss = llmfast.cross_entropy(torch.nn.functional.linear(h, w, b), y)
        else:
            loss = llmfast.linear_cross_entropy(h, w, y, bias=b, chunk=chunk)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize(("prove", "strategy"), PROPERTIES, ids=[p.__name__ for p, _ in PROPERTIES])
def test_property(prove, strategy):
    quick(given(strategy)(lambda drawn: prove(drawn)))()


@pytest.mark.long
@pytest.mark.parametrize(("prove", "strategy"), PROPERTIES, ids=[p.__name__ for p, _ in PROPERTIES])
def test_property_thoroughly(prove, strategy):
    thorough(given(strategy)(lambda drawn: prove(drawn)))()
