"""Sizes past 32 bits, very many heads, very many keys, and nothing at all; memory stays small because most of it is
never touched.
"""

import itertools

import pytest
import torch
from test_attention import device_of, triton_or_skip

import llmfast
from llmfast import cases

pytest.importorskip("llmfast._cpu", reason="llmfast._cpu is not built")
long = pytest.mark.long


def far_apart(t, stride, base):
    """The values of t with one of its dimensions' rows at multiples of a huge stride in an untouched allocation."""
    view = base.as_strided(t.shape, stride)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=long)], ids=str)
@pytest.mark.parametrize("far", ["row", pytest.param("head", marks=long), pytest.param("batch", marks=long)])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_offsets_past_32_bits(dtype, far, backend):
    """Row, head or batch strides that reach past 2^31 elements give the bits of contiguous tensors, gradients
    included.
    """
    if backend == "triton":
        triton_or_skip()
    device = device_of(backend)
    shape = (2, 2, 70, 16)
    stride = {
        "row": (64, 32, 2**31 // 64 + 1000, 1),  # a tile of 64 rows further is past 32 bits too
        "head": (2**14, 2**31 + 2**15, 16, 1),
        "batch": (2**31 + 2**15, 2**14, 16, 1),
    }[far]
    *inputs, do = (torch.randn(shape).to(device, dtype) for _ in range(4))
    elements = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    assert elements > 2**31
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 4.2 * elements * dtype.itemsize:
        pytest.skip("this GPU has no room for four tensors past 2^31 elements; a CPU gives untouched memory none")
    bases = [torch.empty(elements, dtype=dtype, device=device) for _ in range(4)]
    views = [far_apart(t, stride, base) for t, base in zip([*inputs, do], bases, strict=True)]
    results = []
    for q, k, v, d in ((*inputs, do), views):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        o, lse = llmfast.attention(q, k, v, causal=True, return_lse=True, backend=backend)
        results.append([o, lse, *torch.autograd.grad(o, (q, k, v), d)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if backend == "cpu":
        assert torch.equal(llmfast.attention(*views[:3], causal=True), results[0][0])


@pytest.mark.parametrize("keys", [3, pytest.param(1100, marks=long)])
def test_a_gradient_larger_than_what_chunks_may_take(keys):
    """dq of 346 MB inside, rows of 32 floats: a chunk, or two of them, all the same."""
    torch.manual_seed(0)
    q = torch.randn(1, 9, 300_000, 1, requires_grad=True)
    k, v = (torch.randn(1, 1, keys, 1, requires_grad=True) for _ in range(2))
    o = llmfast.attention(q, k, v, window=(2, 0), backend="cpu")
    got = torch.autograd.grad(o.sum(), (q, k, v))
    last = q[:, :, -keys:].detach().requires_grad_()  # the other rows see nothing
    want = torch.autograd.grad(llmfast.attention(last, k, v, window=(2, 0), backend="reference").sum(), (last, k, v))
    assert not got[0][:, :, :-keys].any()
    torch.testing.assert_close(got[0][:, :, -keys:], want[0], atol=1e-5, rtol=1e-4)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_masks_past_32_bits(kind):
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    t = torch.rand(70, 70) > 0.5 if kind == "mask" else torch.randn(70, 70).bfloat16()
    far = far_apart(t, (2**31 // 69 + 1000, 1), torch.empty(2**31 + 2**20, dtype=t.dtype))
    want = llmfast.attention(q, k, v, **{kind: t}, backend="cpu")
    assert torch.equal(llmfast.attention(q, k, v, **{kind: far}, backend="cpu"), want)
    assert torch.equal(
        llmfast.attention(q[:, :, :4], k, v, **{kind: far[:4]}, backend="cpu"),
        llmfast.attention(q[:, :, :4], k, v, **{kind: t[:4]}, backend="cpu"),
    )


def test_softmax_past_32_bits():
    x = torch.randn(5, 300)
    far = far_apart(x, (2**29 + 12345, 1), torch.empty(2**31 + 2**20))
    assert torch.equal(llmfast.softmax(far, backend="cpu"), llmfast.softmax(x, backend="cpu"))


def test_decode_cache_past_32_bits():
    q, k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 600, 16), torch.randn(2, 2, 600, 16)
    lengths = torch.tensor([600, 77], dtype=torch.int32)
    stride = (2**31 + 2**15, 2**14, 16, 1)
    far = [far_apart(t, stride, torch.empty(2**31 + 2**17)) for t in (k, v)]
    want = llmfast.attention_decode(q, k, v, lengths, backend="cpu")
    assert torch.equal(llmfast.attention_decode(q, *far, lengths, backend="cpu"), want)


@pytest.mark.parametrize(
    "heads", [(70_000, 1), pytest.param((1, 70_000), marks=long), pytest.param((350, 200), marks=long)], ids=str
)
def test_70000_heads(heads):
    q, k, v = (torch.randn(*heads, 3, 8, requires_grad=True) for _ in range(3))
    o = llmfast.attention(q, k, v, causal=True, backend="cpu")
    want = llmfast.attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(o, want)
    for got, g in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (o, want)), strict=True):
        torch.testing.assert_close(got, g, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [100_003, pytest.param(1_000_003, marks=long)])
def test_million_keys(keys):
    """A query over very many keys: as right as over few."""
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 1, keys, 64), torch.randn(1, 1, keys, 64)
    p = cases.Problem(q, k, v, {}, None, None)
    o, lse = llmfast.attention(q, k, v, return_lse=True, backend="cpu")
    assert cases.disagreements(p, cases.Result(o, lse, {})) == []
    packed = llmfast.attention_decode(q, k, v, torch.tensor([keys], dtype=torch.int32), backend="cpu")
    torch.testing.assert_close(packed, o, atol=1e-5, rtol=1e-5)


EMPTY = [(*shape, shape[-1]) for shape in itertools.product((0, 2), (0, 2), (0, 5), (0, 7), (0, 8)) if 0 in shape]
EMPTY += [(2, 2, 5, 7, 8, 0), (2, 2, 5, 7, 0, 8), (2, 2, 20, 70, 300, 0)]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_everything(shape, backend):
    """Any size may be zero: results of the right shape, zero where no key is seen, zero gradients."""
    if backend == "triton":
        triton_or_skip()
    B, H, Nq, Nk, D, Dv = shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*s, generator=g).to(device_of(backend)) for s in ((B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv))
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scale = None if D else 1.0
    o, lse = llmfast.attention(q, k, v, scale=scale, return_lse=True, backend=backend)
    assert o.shape == (B, H, Nq, Dv)
    assert lse.shape == (B, H, Nq)
    if Nk == 0:
        assert (o == 0).all()
        assert (lse == float("-inf")).all()
    want, lse_want = llmfast.attention(q, k, v, scale=scale, return_lse=True, backend="reference")
    torch.testing.assert_close(lse, lse_want)
    grads, wanted = (
        torch.autograd.grad(x.sum() + (l[l.isfinite()]).sum(), (q, k, v)) for x, l in ((o, lse), (want, lse_want))
    )
    for g, w, t in zip(grads, wanted, (q, k, v), strict=True):
        assert g.shape == t.shape
        torch.testing.assert_close(g, w)
