"""What the public functions accept, refuse and say."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

import llmfast
from llmfast import backends

Q, K, V = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 16)
CU = torch.tensor([0, 3, 8], dtype=torch.int32)
PACKED = torch.randn(8, 4, 16)
LENGTHS = torch.tensor([10, 4], dtype=torch.int32)


def attention(q=Q, k=K, v=V, **options):
    return llmfast.attention(q, k, v, **options)


def varlen(q=PACKED, k=PACKED, v=PACKED, cu_q=CU, cu_k=CU, **options):
    return llmfast.attention_varlen(q, k, v, cu_q, cu_k, **options)


def decode(q=Q, k=K, v=V, lengths=LENGTHS, **options):
    return llmfast.attention_decode(q, k, v, lengths, **options)


BAD = [  # what is called, what is raised, what the message names
    (lambda: attention(q=[1.0]), TypeError, "q: expected a torch.Tensor, got list"),
    (lambda: attention(k=None), TypeError, "k: expected a torch.Tensor, got NoneType"),
    (lambda: attention(q=Q[0]), ValueError, "q: expected 4 dimensions"),
    (lambda: attention(v=V[None]), ValueError, "v: expected 4 dimensions"),
    (lambda: attention(q=Q[..., :8]), ValueError, "k: expected head dim 8"),
    (lambda: attention(q=Q[:1]), ValueError, "k: expected batch 1"),
    (lambda: attention(v=V[:, :, :9]), ValueError, "v: expected shape"),
    (lambda: attention(q=Q[:, :3]), ValueError, "k: its heads must divide q's, got 2 and 3"),
    (lambda: attention(k=K.double()), ValueError, "expected one dtype"),
    (lambda: attention(v=V.half()), ValueError, "expected one dtype"),
    (lambda: attention(Q.int(), K.int(), V.int()), TypeError, "q: expected a dtype of"),
    (lambda: attention(Q.to("meta")), ValueError, "expected one device, got meta"),
    (lambda: attention(causal="bottom"), ValueError, "causal: expected True, False"),
    (lambda: attention(causal=1), ValueError, "causal: expected True, False"),
    (lambda: attention(window=0), ValueError, "window: expected at least 1"),
    (lambda: attention(window=2.5), TypeError, "window: expected an int"),
    (lambda: attention(window=(1, 2, 3)), ValueError, "window: expected .left, right."),
    (lambda: attention(scale="big"), TypeError, "scale: expected a number"),
    (lambda: attention(scale=torch.ones(2)), TypeError, "scale: expected a number, got Tensor"),
    (lambda: attention(softcap=-1.0), ValueError, "softcap: expected a finite number >= 0"),
    (lambda: attention(softcap=float("inf")), ValueError, "softcap"),
    (lambda: attention(softcap=None), TypeError, "softcap: expected a number"),
    (lambda: attention(dropout_p=1.5), ValueError, "dropout_p: expected a probability"),
    (lambda: attention(dropout_p=0.5, seed=1.0), TypeError, "seed"),
    (lambda: attention(dropout_p=0.5, seed=2**64), ValueError, "seed: expected 64 bits"),
    (lambda: attention(dropout_p=0.5, seed=torch.zeros(2)), ValueError, "seed: expected one int64"),
    (lambda: attention(mask=torch.zeros(8, 10)), TypeError, "mask: expected bool"),
    (lambda: attention(mask=torch.ones(9, 10) > 0), ValueError, "mask: shape .9, 10. does not broadcast"),
    (lambda: attention(mask=torch.ones(1, 2, 4, 8, 10) > 0), ValueError, "mask: shape"),
    (lambda: attention(bias=torch.ones(8, 10) > 0), TypeError, "bias: expected a floating dtype"),
    (lambda: attention(bias=torch.zeros(3, 1, 8, 10)), ValueError, "bias: shape .3, 1, 8, 10. does not broadcast"),
    (lambda: attention(bias=torch.zeros(8, 10, device="meta")), ValueError, "bias: is on meta"),
    (lambda: attention(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes: expected .4,. or .2, 4."),
    (lambda: attention(alibi_slopes=torch.ones(4).half()), TypeError, "alibi_slopes: expected float32"),
    (lambda: attention(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError, "alibi_slopes: has no gradient"),
    (lambda: attention(sinks=torch.ones(2)), ValueError, "sinks: expected .4,."),
    (lambda: attention(sinks=torch.ones(4).int()), TypeError, "sinks: expected a floating dtype"),
    (lambda: attention(backend="gpu"), ValueError, "backend: expected one of cuda, triton, cpu, reference"),
    (lambda: attention(backend="cuda"), NotImplementedError, "attention on cuda: .*Supported by"),
    (lambda: llmfast.use_backend("fast").__enter__(), ValueError, "backend: expected one of"),
    (lambda: varlen(q=Q), ValueError, "q: expected .T, heads, D."),
    (lambda: varlen(cu_q=CU.long()), TypeError, "cu_seqlens_q: expected int32"),
    (lambda: varlen(cu_k=CU[:2]), ValueError, "cu_seqlens_k: expected shape .3,."),
    (lambda: varlen(cu_q=[0, 8]), TypeError, "cu_seqlens_q: expected a torch.Tensor"),
    (lambda: varlen(causal="top_left"), ValueError, 'causal: "top_left" has no meaning'),
    (lambda: decode(causal="top_left"), ValueError, 'causal: "top_left" has no meaning'),
    (lambda: decode(lengths=LENGTHS[:1]), ValueError, "seqlens_k: expected shape .2,."),
    (lambda: decode(lengths=None), TypeError, "seqlens_k: expected a torch.Tensor"),
    (lambda: decode(q=Q.clone().requires_grad_()), ValueError, "attention_decode has no gradient"),
    (
        lambda: decode(page_table=torch.zeros(3, 2, dtype=torch.int32)),
        ValueError,
        "page_table: expected .2, pages. int32",
    ),
    (lambda: llmfast.attention_weights(Q, K, rows=[8]), ValueError, "rows: expected query indices below 8"),
    (lambda: llmfast.merge_attention(Q, Q[..., 0], Q, Q), ValueError, "o_b: expected shape"),
    (lambda: llmfast.scaled_dot_product_attention(Q, K, V), ValueError, "enable_gqa"),
    (
        lambda: llmfast.scaled_dot_product_attention(Q, Q, Q, torch.ones(8, 8) > 0, is_causal=True),
        ValueError,
        "not both",
    ),
    (lambda: llmfast.scaled_dot_product_attention(Q, Q, Q[:, :, :5]), ValueError, "v: expected shape"),
    (
        lambda: llmfast.scaled_dot_product_attention(Q[0, 0, 0], Q, Q),
        ValueError,
        "query: expected at least 2 dimensions",
    ),
    (lambda: llmfast.softmax([1.0]), TypeError, "x: expected a torch.Tensor"),
    (lambda: llmfast.softmax(torch.ones(3).int()), TypeError, "x: expected a floating dtype"),
    (lambda: llmfast.softmax(Q, 4), IndexError, "dim: expected one of the 4"),
    (lambda: llmfast.softmax(Q, out=Q[0]), ValueError, "out: expected"),
    (lambda: llmfast.softmax(Q.clone().requires_grad_(), out=Q.clone()), ValueError, "out: can't be given"),
    (lambda: llmfast.softmax(Q, mask=torch.ones(16)), TypeError, "mask: expected bool"),
    (lambda: llmfast.softmax(Q, bias=torch.ones(7)), ValueError, "bias: shape .7,. does not broadcast"),
    (lambda: llmfast.softmax(Q[0, 0, 0], causal=True), ValueError, "causal: x needs"),
    (lambda: llmfast.softmax(Q, scale="1"), TypeError, "scale: expected a number"),
    (lambda: llmfast.explain(len, [1]), ValueError, "called no llmfast operation"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


SHAPES = [
    ((16, 8),) * 3,
    ((3, 16, 8),) * 3,
    ((2, 3, 16, 8),) * 3,
    ((2, 5, 3, 16, 8),) * 3,
    ((4, 7, 8), (4, 9, 8), (4, 9, 5)),
]
SHAPES += [
    ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    ((2, 3, 7, 8), (1, 3, 9, 8), (1, 3, 9, 8)),
    ((1, 3, 0, 8), (1, 3, 4, 8), (1, 3, 4, 8)),
    ((2, 1, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    ((2, 4, 7, 8), (2, 4, 9, 8), (2, 1, 9, 5)),
    ((2, 4, 7, 8), (2, 1, 9, 8), (1, 4, 9, 5)),
    ((5, 2, 1, 7, 8), (2, 4, 9, 8), (5, 1, 4, 9, 8)),
]
for lead in ((), (3,), (2, 5, 3), (0,), (2, 0, 3)):  # nothing in one dimension or another
    SHAPES += [
        tuple((*lead, *t) for t in shapes)
        for shapes in (((0, 8), (7, 8), (7, 8)), ((7, 8), (0, 8), (0, 8)), ((5, 8), (7, 8), (7, 0)))
    ]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_sdpa_means_what_pytorchs_does(shapes, options):
    q, k, v = (torch.randn(s) for s in shapes)
    torch.testing.assert_close(
        llmfast.scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((4, 5, 8), (1, 7, 8), (2, 7, 6)),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8)),
        ((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8)),
    ],
    ids=str,
)
def test_sdpa_shares_heads_as_pytorch_does(shapes):
    q, k, v = (torch.randn(s, requires_grad=True) for s in shapes)
    mask = torch.rand(5, 7) > 0.3
    for options in ({}, dict(is_causal=True), dict(attn_mask=mask)):
        got, want = (
            f(q, k, v, enable_gqa=True, **options)
            for f in (llmfast.scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (3, 7, 9), (2, 1, 7, 9), (2, 3, 7, 9)], ids=str)
@pytest.mark.parametrize("kind", [bool, float])
def test_sdpa_masks(shape, kind):
    q, k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.rand(shape) > 0.3 if kind is bool else torch.randn(shape)
    torch.testing.assert_close(
        llmfast.scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    )
    if len(shape) < 4:
        q3, k3, v3 = q[0], k[0], v[0]
        torch.testing.assert_close(
            llmfast.scaled_dot_product_attention(q3, k3, v3, mask), F.scaled_dot_product_attention(q3, k3, v3, mask)
        )


def test_sdpa_where_pytorch_is_wrong():
    """A zero or negative scale with causal gives NaN in PyTorch 2.13's CPU kernel."""
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    for scale in (0.0, -0.3):
        want = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), torch.ones(20, 20).tril().bool(), scale=scale
        )
        got = llmfast.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        torch.testing.assert_close(got, want.float())


def test_windows():
    i, j = torch.arange(8)[:, None], torch.arange(10)
    d = j - i - 2
    bands = {
        (False, 3): d.abs() < 3,
        (True, 3): (d <= 0) & (d > -3),
        (False, (2, 1)): (d >= -2) & (d <= 1),
        (True, (2, 5)): (d >= -2) & (d <= 0),
        (False, (-1, 1)): d <= 1,
        ("top_left", 3): (j - i <= 0) & (j - i > -3),
        ("top_left", None): j <= i,
    }
    for (causal, window), band in bands.items():
        torch.testing.assert_close(
            attention(causal=causal, window=window), attention(mask=band), msg=f"{causal} {window}"
        )


def test_explain():
    found = llmfast.explain(llmfast.attention, Q, K, V, causal=True)
    assert found.chosen in ("cpu", "reference")
    assert "needs a CUDA tensor" in str(found) or "no kernels" in str(found) or found.reasons["cuda"]
    assert llmfast.explain(llmfast.softmax, Q).operation == "softmax"
    with llmfast.use_backend("reference"):
        assert llmfast.explain(llmfast.attention, Q, K, V).chosen == "reference"


def test_use_backend_nests_and_is_per_thread():
    seen = []
    with llmfast.use_backend("reference"), pytest.raises(NotImplementedError), llmfast.use_backend("cuda"):
        attention()
    with llmfast.use_backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(attention()))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_threads_agree():
    want, got = attention(causal=True), [None] * 8

    def work(i):
        for _ in range(20):
            got[i] = attention(causal=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(want, x) for x in got)


def test_dropout_is_seeded():
    options = dict(dropout_p=0.4)
    assert torch.equal(attention(seed=5, **options), attention(seed=5, **options))
    assert not torch.equal(attention(seed=5, **options), attention(seed=6, **options))
    torch.manual_seed(1)
    first = attention(**options)
    torch.manual_seed(1)
    assert torch.equal(first, attention(**options))
    assert (attention(dropout_p=1.0) == 0).all()


def test_warns_once_when_only_the_reference_is_left(monkeypatch):
    monkeypatch.setitem(backends._ops, ("attention", "cpu"), backends.Op(lambda *_: "is out today", None, None))
    backends._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            attention(return_lse=True)
    assert ["cpu: is out today" in str(w.message) for w in caught] == [True]


def test_never_changes_denormals():
    """A library linked with -ffast-math would flush denormals to zero in the whole process."""
    attention()
    assert (torch.tensor(1e-40) * 1).item() > 0


def test_imports_nothing_heavy():
    heavy = ("triton", "transformers", "matplotlib", "rich", "numpy")
    code = f"import llmfast, sys; print([m for m in {heavy} if m in sys.modules and m not in before])"
    code = "import sys, torch; before = set(sys.modules); " + code
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_info():
    found = llmfast.info()
    assert set(found["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert found["backends"]["reference"] is None
    out = subprocess.run(
        [sys.executable, "-m", "llmfast", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert '"torch"' in out.stdout


def test_a_negated_view_counts_as_its_numbers():
    """torch._neg_view, as imag of a conjugate gives, keeps the numbers' negatives in memory."""
    x = torch.randn(1, 2, 20, 8)
    n = torch.complex(x, x).conj().imag
    assert n.is_neg()
    torch.testing.assert_close(llmfast.attention(n, x, x), llmfast.attention(-x, x, x))
    torch.testing.assert_close(llmfast.softmax(n), llmfast.softmax(-x))
    torch.testing.assert_close(llmfast.attention(x, x, n, window=3), llmfast.attention(x, x, -x, window=3))
    torch.testing.assert_close(llmfast.linear(n, x[0, 0]), llmfast.linear(-x, x[0, 0]))
