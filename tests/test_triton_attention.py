"""Second derivatives of Triton's attention."""

import pytest
import torch
from test_attention import device_of, run_or_skip

import llmfast
from llmfast import cases


@pytest.mark.parametrize("name", ["causal fewer keys", "grouped heads"])
def test_double_backward(name):
    """Through recomputation in PyTorch's operations, from the o and lse of the kernels."""
    p = cases.problem(cases.CASES[name], torch.float32, device=device_of("triton"))
    run_or_skip(p, "triton")

    def second(p, backend):
        inputs = {n: t.detach().requires_grad_() for n, t in cases._named(p).items() if t is not None}
        do = p.do.detach().requires_grad_()
        o = llmfast.attention(**{**p.options, **inputs}, backend=backend)
        grads = torch.autograd.grad(o, list(inputs.values()), do, create_graph=True)
        g = torch.Generator().manual_seed(1)
        flow = [torch.randn(t.shape, generator=g).to(t) for t in grads]
        found = torch.autograd.grad(grads, [*inputs.values(), do], flow)
        return dict(zip((*(f"dd{n}" for n in inputs), "ddo"), found, strict=True))

    truth, near = second(p.to(torch.float64), "reference"), second(p, "reference")
    for n, got in second(p, "triton").items():
        assert cases.breaks(n, got, truth[n], [near[n]], cases.C_GRADIENT, got.dtype, by_head=False) == []
