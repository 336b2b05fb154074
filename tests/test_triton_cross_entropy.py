"""Triton's cross entropy: targets that are no class, rows that change no bit of each other, many shapes."""

import random

import pytest
import torch
from test_attention import DTYPES, device_of, triton_or_skip

import llmfast
from llmfast import backends, cases
from llmfast.spec import CrossEntropyExtras, CrossEntropySpec


def op_or_skip():
    triton_or_skip()
    return backends.op("cross_entropy", "triton")


def test_targets_out_of_range_are_nan_in_their_row_only():
    """Without the API, which refuses them on a CPU and can't read them on a GPU."""
    op = op_or_skip()
    x = torch.randn(5, 70, device=device_of("triton"))
    y = torch.tensor([3, 70, -1, -100, 69], device=x.device)
    spec, weight = CrossEntropySpec(label_smoothing=0.1), CrossEntropyExtras(torch.rand(70, device=x.device))
    loss, lse = op.forward(x, y, spec, weight)
    dx = op.backward(torch.ones_like(loss), x, y, lse, spec, weight)
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert dx.isnan().all(-1).tolist() == [False, True, True, False, False]
    assert dx.isnan().any(-1).tolist() == [False, True, True, False, False]
    assert loss[3] == 0
    assert (dx[3] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_few_rows_have_the_bits_of_many(smoothing, monkeypatch):
    """One program for a row, or one for each of its blocks and a merge."""
    op = op_or_skip()
    from llmfast.kernels import cross_entropy as kernels

    x = torch.randn(2, 20000, device=device_of("triton")) * 3
    x[1, :9000] = float("-inf")  # a first block with nothing in it
    y, spec = torch.tensor([5, 19999], device=x.device), CrossEntropySpec(label_smoothing=smoothing)
    split = op.forward(x, y, spec, CrossEntropyExtras())
    monkeypatch.setattr(kernels, "PROGRAMS", 0)
    whole = op.forward(x, y, spec, CrossEntropyExtras())
    assert split[1].isfinite().all()
    for a, b in zip(split, whole, strict=True):
        assert torch.equal(a, b)


def test_strides_and_a_gradient_of_stride_0():
    op_or_skip()
    device = device_of("triton")
    x, y = torch.randn(40, 30, device=device), torch.randint(0, 40, (60,), device=device)[::2]
    leaf, copy = x.detach().clone().requires_grad_(), x.t().contiguous().requires_grad_()
    llmfast.cross_entropy(leaf.t(), y, reduction="sum", backend="triton").backward()
    llmfast.cross_entropy(copy, y.clone(), reduction="sum", backend="triton").backward()
    assert torch.equal(leaf.grad.t(), copy.grad)


def shapes(n):
    draw = random.Random(1)
    for i in range(n):
        T, V = (
            draw.randint(1, 40),
            draw.choice((draw.randint(2, 64), draw.randint(65, 3000), draw.randint(8000, 20000))),
        )
        yield pytest.param(i, min(T, max(1, 20000 // V)), V, ("fp32", "bf16", "fp16")[i % 3], id=f"{i}")


@pytest.mark.long
@pytest.mark.parametrize(("seed", "T", "V", "dtype"), list(shapes(210)))
def test_many_shapes(seed, T, V, dtype):
    op = op_or_skip()
    g, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    x = (torch.randn(T, V, generator=g) * 3).to(DTYPES[dtype]).to(device_of("triton"))
    y = torch.randint(0, V, (T,), generator=g).to(x.device)
    y[:: draw.choice((3, T + 1))] = -100
    spec = CrossEntropySpec(-100, draw.choice((0.0, 0.1)), draw.choice((0.0, 0.01)), draw.choice((0.0, 0.0, 5.0, 30.0)))
    weight = torch.rand(V, generator=g).to(x.device) if draw.random() < 0.3 else None
    dloss = torch.rand(T, generator=g).to(x.device)

    def run(op, x, wide):
        extras = CrossEntropyExtras(None if weight is None else weight.to(wide))
        loss, lse = op.forward(x, y, spec, extras)
        return loss, lse, op.backward(dloss.to(wide), x, y, lse, spec, extras)

    reference = backends.op("cross_entropy", "reference")
    truth, yard = run(reference, x.double(), torch.float64), run(reference, x, torch.float32)
    for name, got, want, near in zip(("loss", "lse", "dx"), run(op, x, torch.float32), truth, yard, strict=True):
        c = cases.C_GRADIENT if name == "dx" else cases.C_FORWARD
        assert cases.breaks(name, got, want, [near], c, got.dtype, by_head=False) == []
