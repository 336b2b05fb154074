"""Second derivatives of Triton's attention."""

import pytest
import torch
from test_attention import device_of, run_or_skip, triton_or_skip

import llmfast
from llmfast import cases
from llmfast.inspect_kernels import products


@pytest.mark.parametrize(
    "name", ["causal fewer keys", "grouped heads", "packed dropout", "sinks, no key", "bias by head", "dropout"]
)
def test_double_backward(name):
    """Through recomputation in PyTorch's operations, from the o and lse of the kernels."""
    p = cases.problem(cases.CASES[name], torch.float32, device=device_of("triton"))
    run_or_skip(p, "triton")

    def second(p, backend):
        inputs = {n: t.detach().requires_grad_() for n, t in cases._named(p).items() if t is not None}
        do = p.do.detach().requires_grad_()
        f = llmfast.attention_varlen if "cu_seqlens_q" in p.options else llmfast.attention
        o = f(**{**p.options, **inputs}, backend=backend)
        grads = torch.autograd.grad(o, list(inputs.values()), do, create_graph=True)
        g = torch.Generator().manual_seed(1)
        flow = [torch.randn(t.shape, generator=g).to(t) for t in grads]
        found = torch.autograd.grad(grads, [*inputs.values(), do], flow)
        return dict(zip((*(f"dd{n}" for n in inputs), "ddo"), found, strict=True))

    truth, near = second(p.to(torch.float64), "reference"), second(p, "reference")
    for n, got in second(p, "triton").items():
        assert cases.breaks(n, got, truth[n], [near[n]], cases.C_GRADIENT, got.dtype, by_head=False) == []


def test_a_float64_bias_reaches_no_kernel(monkeypatch):
    """Its tiles of 8 bytes an element would be over shared memory; its gradient is float64 all the same."""
    from llmfast.kernels import attention, attention_backward, decode

    triton_or_skip()
    seen, strides = [], attention.strides
    for kernels in (attention, attention_backward, decode):
        monkeypatch.setattr(kernels, "strides", lambda e, shape: seen.append(e.bias.dtype) or strides(e, shape))
    q, bias = (torch.randn(n, generator=torch.Generator().manual_seed(0)) for n in ((1, 2, 20, 16), (20, 20)))
    q, bias = q.to(device_of("triton")), bias.to(device_of("triton"))
    found = []
    for b in (bias, bias.double()):
        b.requires_grad_()
        o = llmfast.attention(q, q, q, bias=b, backend="triton")
        few = llmfast.attention(q[:, :, :2], q, q, bias=b.detach()[:2], backend="triton")
        found.append((o, few, *torch.autograd.grad(o.square().sum(), b)))
    assert set(seen) == {torch.float32}
    assert len(seen) == 6
    assert found[1][2].dtype == torch.float64
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.float(), atol=0, rtol=1e-6)


SWITCHES = {
    "of old": lambda: torch.set_float32_matmul_precision("high"),
    "of products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_tf32_by_either_switch(switch):
    """PyTorch raises an error where its old switch is read after the new one was set."""
    p = cases.problem(cases.CASES["causal fewer keys"], torch.float32, device=device_of("triton"))
    run_or_skip(p, "triton")
    from llmfast.kernels import attention

    run = lambda p, backend: llmfast.attention(p.q, p.k, p.v, **p.options, backend=backend)
    assert attention.arithmetic(torch.float32) == "float32"
    try:
        SWITCHES[switch]()
        assert [attention.arithmetic(t) for t in (torch.float32, torch.bfloat16)] == ["tf32", "bfloat16"]
        o, near = run(p, "triton"), run(p, "reference")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
    truth = run(p.to(torch.float64), "reference")
    assert cases.breaks("o", o, truth, [near], cases.C_FORWARD, o.dtype) == []


def test_gpus_without_a_row(monkeypatch):
    """AMD's take the rows of gfx942, and no tf32 where there is no such product; what is too old is refused."""
    from llmfast.kernels import attention

    from llmfast.backends.triton import _too_old

    tiles = {}
    for arch in ("gfx942", "gfx90a", "gfx1201", "sm_89"):
        monkeypatch.setattr(attention, "target", lambda arch=arch: arch)
        with products("tf32"):
            tiles[arch] = attention.arithmetic(torch.float32), attention.tile("fwd", 128, torch.bfloat16)
        assert _too_old(arch) is None
    assert [t for t, _ in tiles.values()] == ["tf32", "float32", "float32", "tf32"]
    assert tiles["gfx90a"][1] == tiles["gfx1201"][1] == tiles["gfx942"][1] != tiles["sm_89"][1]
    assert "sm_75 is older than Ampere" in _too_old("sm_75")
