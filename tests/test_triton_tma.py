"""The forward for Hopper and later, the interpreter taken for such a GPU: right, and no tile depends on another."""

import pytest
import torch
from test_attention import DTYPES, device_of, triton_or_skip

import llmfast
from llmfast import cases
from llmfast.spec import NO_EXTRAS, AttentionSpec, Extras

ELSEWHERE = {"mask", "bias", "dropout_p", "packed"}
TAKEN = [
    name
    for name, c in cases.CASES.items()
    if not c.options.keys() & ELSEWHERE
    and c.options.get("layout") not in ("strided", "turned")
    and c.options.get("scale", 1) > 0
    and not (c.D % 8 or c.Dv % 8)
    and c.B * c.Nq * c.Nk > 0
]


@pytest.fixture
def kernels(monkeypatch):
    """kernels/attention_tma.py where it can run."""
    triton_or_skip()
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    from llmfast.kernels import attention_tma

    monkeypatch.setitem(attention_tma.TILES, "interpreter", {256: (64, 64, 4, 1, 1)})
    return attention_tma


def attend(kernels, q, k, v, spec, extras=NO_EXTRAS):
    """o and lse, in tensors that hold NaN before."""
    o, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"), device=q.device)
    kernels.forward(q, k, v, o, lse, spec, extras)
    return o, lse


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TAKEN)
def test_agrees_with_float64(name, dtype, kernels, monkeypatch):
    from llmfast.kernels import attention

    monkeypatch.setattr(attention, "forward", None)  # the other forward must not run
    p = cases.problem(cases.CASES[name], DTYPES[dtype], device=device_of("triton"))._replace(do=None, dlse=None)
    q = p.q.detach().requires_grad_()  # few queries without gradient go to the decode kernel
    o, lse = llmfast.attention(q, p.k, p.v, **p.options, return_lse=True, backend="triton")
    assert cases.disagreements(p, cases.Result(o.detach(), lse.detach(), {})) == []


def test_bits_depend_on_no_neighbour_and_no_number_of_programs(kernels, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 32, generator=g).to(device_of("triton"), torch.bfloat16)
        for h, n in ((2, 150), (1, 170), (1, 170))
    )
    spec = AttentionSpec(0.2, left=90, right=0)
    whole = attend(kernels, q, k, v, spec)
    assert all(t.isfinite().all() for t in whole)
    for programs, l2 in ((1, 1), (5, 2**40), (11, 30000), (12, 1), (1000, 1)):
        monkeypatch.setattr(kernels, "sms", lambda device, n=programs: n)
        monkeypatch.setattr(kernels, "L2", l2)
        for a, b in zip(whole, attend(kernels, q, k, v, spec), strict=True):
            assert torch.equal(a, b), (programs, l2)
    one = attend(kernels, q[1:, 1:].clone(), k[1:].clone(), v[1:].clone(), spec)
    for a, b in zip(whole, one, strict=True):
        assert torch.equal(a[1:, 1:], b)


def test_nothing_is_written_beside_o(kernels):
    """Rows beyond Nq, columns beyond Dv and heads between those of a view."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 70, 40, generator=g).to(device_of("triton"), torch.float16) for _ in range(2))
    store = torch.full((1, 4, 80, 48), 7.0, dtype=q.dtype, device=q.device)
    o = store[:, 1:3, :70, :40]
    kernels.forward(q, k, k, o, None, AttentionSpec(0.1), NO_EXTRAS)
    assert torch.equal(o, attend(kernels, q, k, k, AttentionSpec(0.1))[0])
    o.fill_(7.0)
    assert (store == 7.0).all()


def test_says_why_it_does_not_run(kernels):
    x = torch.zeros(2, 2, 16, 64, dtype=torch.bfloat16, device=device_of("triton"))
    wide, odd = x.new_zeros(2, 2, 16, 68), x.new_zeros(2 * 2 * 16 * 64 + 1)[1:].view_as(x)
    mask = torch.ones(16, 16, dtype=torch.bool, device=x.device)
    spec = AttentionSpec(0.1)
    for problem, said in (
        ((x, x, x, spec, NO_EXTRAS), None),
        ((x[:1], x[:1, :1].as_strided((1, 1, 16, 64), (3, 5, 64, 1)), x[:1, :1], spec, NO_EXTRAS), None),
        ((x.float(), x.float(), x.float(), spec, NO_EXTRAS), "float32"),
        ((x.new_zeros(1, 1, 4, 264), x.new_zeros(1, 1, 4, 264), x[:1, :1, :4], spec, NO_EXTRAS), "head dim 264"),
        ((x, x, x, spec, Extras(mask=mask)), "mask"),
        ((x, x, x, spec, Extras(bias=mask.to(x.dtype))), "bias"),
        ((x, x, x, spec._replace(dropout_p=0.1), NO_EXTRAS), "dropout"),
        ((x, x, x, spec._replace(scale=-0.1), NO_EXTRAS), "scale -0.1"),
        ((x, x, x, spec._replace(scale=0.0), NO_EXTRAS), "scale 0.0"),
        ((x, x, x, spec._replace(scale=float("nan")), NO_EXTRAS), "scale nan"),
        ((x, x, x, spec, Extras(cu_seqlens_q=mask[0].int(), cu_seqlens_k=mask[0].int())), "packed"),
        ((x, x[:, :, :0], x[:, :, :0], spec, NO_EXTRAS), "empty"),
        ((x, x, x[..., :60], spec, NO_EXTRAS), "60 elements"),
        ((x, wide[..., :64], x, spec, NO_EXTRAS), "k's strides are not multiples"),
        ((x, x, x[:1].expand_as(x), spec, NO_EXTRAS), "v's strides"),
        ((odd, x, x, spec, NO_EXTRAS), "q does not start"),
        ((x, x, x.transpose(2, 3).contiguous().transpose(2, 3), spec, NO_EXTRAS), "v's head dim is strided"),
    ):
        found = kernels.refuses(*problem)
        assert found is None if said is None else said in found, (said, found)


def test_is_chosen_by_the_gpu(kernels, monkeypatch):
    x = torch.zeros(1, 1, 32, 64, dtype=torch.bfloat16, device=device_of("triton"))
    explained = lambda: llmfast.explain(llmfast.attention, x, x, x, backend="triton")
    for arch, said in (
        ("sm_80", "attention_fwd (attention_fwd_tma: sm_80 has no TMA)"),
        ("sm_90", "attention_fwd_tma"),
        ("sm_103", "attention_fwd_tma"),
        ("sm_120", "attention_fwd_tma"),
        ("gfx942", "attention_fwd (attention_fwd_tma: gfx942 has no TMA)"),
    ):
        monkeypatch.setattr(kernels, "target", lambda arch=arch: arch)
        assert explained().kernels["triton"] == said
        assert f"triton: supported, by {said}" in str(explained())
    wide = x.new_zeros(1, 1, 32, 136)
    for arch, widest in (("sm_100", 256), ("sm_103", 128), ("sm_120", 128)):
        monkeypatch.setattr(kernels, "target", lambda arch=arch: arch)
        said = None if widest >= 136 else f"head dim 136 is over {widest}"
        assert kernels.refuses(wide, wide, wide, AttentionSpec(0.1), NO_EXTRAS) == said
    few = llmfast.explain(llmfast.attention, x[:, :, :1], x, x, backend="triton")
    assert few.kernels["triton"] == "attention_decode"
