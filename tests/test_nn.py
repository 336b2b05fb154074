"""llmfast.nn against torch.nn: the same state_dict, outputs, weights and gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

import llmfast

N, S, B, E, H = 7, 9, 2, 32, 4
KINDS = {
    "plain": {}, "no bias": dict(bias=False), "bias_kv": dict(add_bias_kv=True), "zero": dict(add_zero_attn=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True), "kdim": dict(kdim=20, vdim=12),
}  # fmt: skip


def pair(batch_first=True, **options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = llmfast.nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    return ours, theirs


def inputs(shape="batch", kdim=E, vdim=E):
    g = torch.Generator().manual_seed(1)
    make = lambda n, e: torch.randn(*{"batch": (B, n), "sequence": (n, B), "single": (n,)}[shape], e, generator=g)
    return make(N, E), make(S, kdim), make(S, vdim)


def agree(ours, theirs, args, **options):
    """Outputs, weights and every gradient."""
    results = []
    for m in (ours, theirs):
        leaves = [a.clone().requires_grad_() for a in args]
        o, w = m(*leaves, **options)
        loss = (o.square() + o).sum() + (0 if w is None else (w * torch.arange(w.shape[-1])).sum())
        results.append((o, w, torch.autograd.grad(loss, (*leaves, *m.parameters()))))
    (o, w, grads), (o2, w2, grads2) = results
    torch.testing.assert_close(o, o2, atol=2e-5, rtol=1e-4)
    assert (w is None) == (w2 is None)
    if w is not None:
        torch.testing.assert_close(w, w2, atol=1e-5, rtol=1e-4)
    for a, b in zip(grads, grads2, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp_min(1)


MASKS = {
    "none": lambda: {},
    "bool": lambda: dict(attn_mask=torch.rand(N, S) > 0.7),
    "float": lambda: dict(attn_mask=torch.randn(N, S)),
    "heads": lambda: dict(attn_mask=torch.randn(B * H, N, S)),
    "padding": lambda: dict(key_padding_mask=torch.arange(S) >= torch.tensor([[S], [4]])),
    "float padding": lambda: dict(key_padding_mask=torch.randn(B, S)),
    "both": lambda: dict(
        attn_mask=torch.rand(B * H, N, S) > 0.8, key_padding_mask=torch.arange(S) >= torch.tensor([[S], [4]])
    ),
    "both float": lambda: dict(attn_mask=torch.randn(N, S), key_padding_mask=torch.randn(B, S)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need", [False, True, "each"])
def test_mha(kind, mask, need):
    torch.manual_seed(2)
    options = KINDS[kind]
    args = inputs(kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    given = MASKS[mask]()
    if given.get("attn_mask") is not None and given["attn_mask"].dtype == torch.bool:
        given["attn_mask"][..., 0] = False  # no row without a key: PyTorch gives NaN
    agree(*pair(**options), args, **given, need_weights=bool(need), average_attn_weights=need != "each")


@pytest.mark.parametrize("shape", ["batch", "sequence", "single"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("need", [False, True])
def test_mha_shapes(shape, alone, need):
    q, k, v = inputs(shape)
    ours, theirs = pair(batch_first=shape != "sequence")
    agree(ours, theirs, (q, k, v), need_weights=need)
    with torch.no_grad():
        want, got = (m(*((q, q, q) if alone else (q, k, k)), need_weights=need) for m in (theirs, ours))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_mha_single_masks():
    q, k, v = inputs("single")
    agree(*pair(), (q, k, v), key_padding_mask=torch.arange(S) > 5, attn_mask=torch.rand(H, N, S) > 2)


@pytest.mark.parametrize("kind", ["plain", "bias_kv"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need", [False, True])
def test_mha_causal(kind, padded, need):
    if kind == "bias_kv" and not need and not padded:
        pytest.skip("PyTorch hides the added key there")
    x = inputs()[1]
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)
    padding = torch.arange(S) >= torch.tensor([[S], [4]]) if padded else None
    agree(*pair(**KINDS[kind]), (x, x, x), attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=need)


def test_mha_causal_without_a_mask():
    x, (ours, theirs) = inputs()[1], pair()
    want = theirs(x, x, x, attn_mask=torch.ones(S, S, dtype=torch.bool).triu(1))
    for need in (False, True):
        torch.testing.assert_close(ours(x, x, x, is_causal=True, need_weights=need)[0], want[0], atol=2e-5, rtol=1e-4)


def test_mha_fully_masked_rows():
    q, k, v = inputs()
    ours, _ = pair()
    for need in (False, True):
        o, _ = ours(q, k, v, key_padding_mask=torch.ones(B, S, dtype=torch.bool), need_weights=need)
        torch.testing.assert_close(o, ours.out_proj.bias.expand_as(o))


@pytest.mark.parametrize("need", [False, True])
def test_mha_dropout(need):
    q, k, v = inputs()
    ours, _ = pair(dropout=0.4)
    torch.manual_seed(3)
    first, _ = ours(q, k, v, need_weights=need)
    torch.manual_seed(3)
    assert torch.equal(first, ours(q, k, v, need_weights=need)[0])
    assert not torch.equal(first, ours(q, k, v, need_weights=need)[0])
    first.sum().backward()
    ours.eval()
    assert torch.equal(ours(q, k, v, need_weights=need)[0], ours(q, k, v, need_weights=need)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_mha_in_an_encoder_layer(padded, monkeypatch):
    """In eval and no_grad too: the layer's C++ fast path never runs in our place."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True).eval()
    x, padding = inputs()[0], torch.arange(N) >= torch.tensor([[N], [4]]) if padded else None
    with torch.no_grad():
        want = layer(x, src_key_padding_mask=padding)
    ours = llmfast.nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    calls, forward = [], ours.forward
    monkeypatch.setattr(ours, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    with torch.no_grad():
        got = layer(x, src_key_padding_mask=padding)
    assert calls
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_mha_copies(kind):
    ours, _ = pair(**KINDS[kind])
    args = inputs(kdim=KINDS[kind].get("kdim", E), vdim=KINDS[kind].get("vdim", E))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(ours(*args)[0], other(*args)[0])
    ours._reset_parameters()
    assert ours(*args)[0].isfinite().all()


@pytest.mark.parametrize("need", [False, True])
def test_mha_compile(need):
    q, k, v = inputs()
    ours, _ = pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, want = compiled(q, k, v, need_weights=need), ours(q, k, v, need_weights=need)
    torch.testing.assert_close(got, want)
    got[0].sum().backward()


def test_mha_autocast():
    q, k, v = inputs()
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(q, k, v, need_weights=False)[0], theirs(q, k, v, need_weights=False)[0]
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)


BAD = [
    (lambda m, q, k, v: m(q, k[0], v), "key: expected"),
    (lambda m, q, k, v: m(q[..., :8], k, v), "query: expected"),
    (lambda m, q, k, v: m(q[0, 0], k, v), "query: expected"),
    (lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.ones(B, N) > 0), "key_padding_mask: expected .2, 9."),
    (lambda m, q, k, v: m(q, k, v, attn_mask=torch.ones(S, N) > 0), "attn_mask: expected .7, 9. or .8, 7, 9."),
    (lambda m, q, k, v: m(torch.nested.nested_tensor([q[0]]), k, v), "query: nested"),
    (
        lambda m, q, k, v: pair(add_zero_attn=True)[0](q, k, v, is_causal=True),
        "is_causal: with bias_k or add_zero_attn",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_mha_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(pair()[0], *inputs())


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax(name, dim):
    x = torch.randn(3, 4, 5, requires_grad=True)
    got, want = (getattr(m, name)(dim=dim)(x) for m in (llmfast.nn, nn))
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (got, want)))
    assert pickle.loads(pickle.dumps(getattr(llmfast.nn, name)(dim, scale=2.0))).scale == 2.0


def test_softmax_options():
    x = torch.randn(2, 6, 6)
    causal = llmfast.nn.Softmax(-1, scale=0.5, causal=True)(x)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(causal, (x * 0.5).masked_fill(hidden, float("-inf")).softmax(-1))
    torch.testing.assert_close(llmfast.nn.Softmax(-1, scale=0.5)(input=x, mask=~hidden), causal)
    torch.testing.assert_close(llmfast.nn.LogSoftmax(-1)(x, bias=x), (2 * x).log_softmax(-1))
    assert (llmfast.nn.Softmax(-1)(torch.full((2, 3), float("-inf"))) == 0).all()


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_is_pytorchs_module(name):
    ours, theirs = (getattr(m, name) for m in (llmfast.nn, nn))
    for rank in range(1, 5):
        x = torch.randn((3, 4, 5, 2)[:rank])
        for module in (ours(), ours(None)):
            torch.testing.assert_close(module(x), theirs()(x))
    torch.testing.assert_close(ours(dim=1)(input=x), theirs(dim=1)(input=x))
    assert isinstance(ours(1), theirs)
    assert isinstance(ours(1), nn.Softmax) == (name == "Softmax")
    assert repr(ours(1)) == repr(theirs(1))
    assert repr(ours(1, scale=0.5, causal=True)) == f"{name}(dim=1, scale=0.5, causal=True)"
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        ours()(x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, dict(ignore_index=2, label_smoothing=0.1), dict(weight=torch.arange(1.0, 10.0))], ids=str
)
def test_cross_entropy_loss(options, reduction):
    x, y = torch.randn(6, 9, 3, requires_grad=True), torch.randint(0, 9, (6, 3))
    got, want = (m.CrossEntropyLoss(reduction=reduction, **options)(x, y) for m in (llmfast.nn, nn))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, want)))
    with pytest.raises(TypeError, match="target: expected int64"):
        llmfast.nn.CrossEntropyLoss()(x, torch.rand(6, 9, 3))


@pytest.mark.parametrize(
    "module",
    [
        llmfast.nn.MultiheadAttention(E, H),
        llmfast.nn.Softmax(0, scale=0.5, causal=True),
        llmfast.nn.LogSoftmax(1),
        llmfast.nn.CrossEntropyLoss(torch.ones(9), z_loss=0.1, softcap=3.0),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_module_copies_and_pickles(module):
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert str(twin) == str(module)
        own = lambda m: {k: v for k, v in vars(m).items() if not k.startswith("_")}
        assert own(twin) == own(module)
        assert all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True)
        )
