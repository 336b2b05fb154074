"""The reference against PyTorch in float64, by gradcheck, and Philox against its published answer."""

import pytest
import torch
import torch.nn.functional as F

import llmfast
from llmfast import cases
from llmfast.backends import reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (5, 16), (16, 5), (1, 9)])
def test_is_pytorchs(sizes, causal):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (sizes[0], sizes[1], sizes[1]))
    got = llmfast.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def test_bottom_right_is_a_mask():
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.testing.assert_close(
        llmfast.attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


SHORT = [
    "one key",
    "nothing visible",
    "everything",
    "causal fewer keys",
    "top-left more keys",
    "window past keys",
    "grouped heads",
    "scale",
    "mask by row",
    "bias by key",
    "softcap",
    "alibi by batch",
    "dropout",
    "gradient of lse",
]


def gradcheck_cases():
    for name, case in cases.CASES.items():
        if 0 not in case[:6] and not case.options.keys() & {"packed", "magnitude"}:
            yield pytest.param(name, marks=[] if name in SHORT else pytest.mark.long)


@pytest.mark.parametrize("name", list(gradcheck_cases()))
def test_gradients(name):
    case = cases.CASES[name]
    small = case._replace(B=min(case.B, 2), Nq=max(1, case.Nq // 16), Nk=max(1, case.Nk // 16), D=4, Dv=3)
    p = cases.problem(small, torch.float64)
    inputs = {n: t.clone().requires_grad_() for n, t in cases._named(p).items() if t is not None}
    fn = lambda *ts: llmfast.attention(
        **{**p.options, **dict(zip(inputs, ts, strict=True))}, return_lse=True, backend="reference"
    )
    finite = lambda *ts: tuple(t.masked_fill(t == float("-inf"), 0.0) for t in fn(*ts))
    assert torch.autograd.gradcheck(finite, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(lambda *ts: finite(*ts)[0], tuple(inputs.values()), atol=1e-4, fast_mode=True)


def test_philox_known_answers():
    """The known-answer vectors published with Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert reference.philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = reference.philox([torch.tensor(c) for c in pi], (0xA4093822, 0x299F31D0))
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_dropout_keeps_the_right_share():
    kept = reference.keep(torch.tensor(7), 0.3, 2, 3, 64, 1001, "cpu")
    assert abs(kept.double().mean().item() - 0.7) < 0.005
    assert not torch.equal(kept[0], kept[1])


def test_decode_is_attention_on_what_counts():
    B, H, Hk, M, D = 3, 4, 2, 40, 16
    q, k, v = torch.randn(B, H, 2, D), torch.randn(B, Hk, M, D), torch.randn(B, Hk, M, D)
    lengths = torch.tensor([40, 7, 2], dtype=torch.int32)
    o = llmfast.attention_decode(q, k, v, lengths, backend="reference")
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
        want = llmfast.attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True, backend="reference"
        )
        torch.testing.assert_close(o[b : b + 1], want)
    assert torch.equal(llmfast.attention_decode(q, k, v, lengths, backend="reference"), o)
    pages = torch.randperm(30).reshape(3, 10).to(torch.int32)
    paged = lambda t: torch.zeros(30, Hk, 4, D).index_put(
        (pages.long().flatten(),), t.unflatten(2, (10, 4)).transpose(1, 2).flatten(0, 1)
    )
    again = llmfast.attention_decode(q, paged(k), paged(v), lengths, page_table=pages, backend="reference")
    torch.testing.assert_close(again, o)


def test_weights_are_attentions():
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 30, 16)
    options = dict(
        causal=True, softcap=3.0, alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]), bias=torch.randn(4, 20, 30)
    )
    p = llmfast.attention_weights(q, k, **options)
    eye = torch.eye(30).expand(2, 2, 30, 30)
    torch.testing.assert_close(p, llmfast.attention(q, k, eye, **options, backend="reference"))
    torch.testing.assert_close(llmfast.attention_weights(q, k, rows=[3, -1], **options), p[:, :, [3, -1]])
    values, indices = llmfast.attention_weights(q, k, top_k=3, **options)
    assert torch.equal(values, p.topk(3).values)
    assert torch.equal(p.gather(-1, indices), values)
