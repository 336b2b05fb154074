"""Attention, forward and backward, across sequence lengths.

python -m benchmarks run attention              the table, interleaved
pytest benchmarks/bench_attention.py -k 'N512 and causal'     the same providers through pytest-benchmark
"""

import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from benchmarks.measure import DEVICE, record


class Shape(NamedTuple):
    """One row: B x H heads (Hk of them in k and v), N queries and keys."""

    dtype: str
    B: int
    H: int
    Hk: int
    N: int
    D: int
    causal: bool
    backward: bool

    def __str__(self):
        heads = f"{self.H}" if self.Hk == self.H else f"{self.H}/{self.Hk}"
        way = "backward" if self.backward else "forward"
        return f"{way} {self.dtype} B{self.B} H{heads} N{self.N} D{self.D} {'causal' if self.causal else 'full'}"


def naive(q, k, v, causal):
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return s.softmax(-1) @ v


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_with(kind):
    def run(q, k, v, causal):
        with sdpa_kernel(kind):
            return sdpa(q, k, v, causal)

    return run


def ours(backend=None):
    return lambda q, k, v, causal: llmfast.attention(q, k, v, causal=causal, backend=backend)


def providers(device):
    """name -> f(q, k, v, causal); the first is the baseline of the ratios."""
    if device == "cuda":
        kinds = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        torches = {f"torch {k.split('_')[0].lower()}": sdpa_with(getattr(SDPBackend, k)) for k in kinds}
        return {"torch sdpa": sdpa, **torches, "llmfast triton": ours("triton"), "llmfast cuda": ours("cuda")}
    return {"torch sdpa": sdpa, "naive": naive, "llmfast": ours()}


def shapes(device, lengths=(128, 256, 512, 1024, 2048, 4096), dtypes=("float32", "bfloat16"), backward=True):
    """B x H x N is held near 16k tokens on a GPU; 4 heads on a CPU."""
    for way in (False, True) if backward else (False,):
        for dtype in dtypes:
            for causal in (False, True):
                for N in lengths:
                    if device == "cuda":
                        yield Shape(dtype, max(1, 16384 // N), 16, 16, N, 128, causal, way)
                    else:
                        yield Shape(dtype, 1, 4, 4, N, 64, causal, way)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    rand = lambda H: torch.randn(shape.B, H, shape.N, shape.D, generator=g).to(device, dtype)
    tensors = [rand(shape.H), rand(shape.Hk), rand(shape.Hk), rand(shape.H)]
    return [t.requires_grad_(shape.backward) for t in tensors[:3]] + tensors[3:]


def call(provider, shape, tensors):
    """What is timed: the forward, or the backward alone (the graph is kept)."""
    q, k, v, do = tensors
    if not shape.backward:
        return lambda: provider(q, k, v, shape.causal)
    o = provider(q, k, v, shape.causal)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def truth(shape, tensors):
    wide = [t.detach().double().requires_grad_(shape.backward) for t in tensors]
    return call(sdpa, shape, wide)()


def work(shape):
    """FLOPs: 4 B H N^2 D forward, 10 backward, half when causal."""
    flops = (10 if shape.backward else 4) * shape.B * shape.H * shape.N**2 * shape.D
    return flops * (0.5 if shape.causal else 1), "FLOP/s"


def skip(name, shape):
    """Naive attention is forward only here, and not where its N x N scores would take the time of the whole run."""
    long = shape.N > 2048 or (shape.dtype == "bfloat16" and shape.N > 1024)
    return name == "naive" and (shape.backward or long)


@pytest.mark.parametrize("provider", providers(DEVICE))
@pytest.mark.parametrize("shape", shapes(DEVICE), ids=str)
def test_attention(benchmark, shape, provider):
    if skip(provider, shape):
        pytest.skip("left out of the table")
    record(benchmark, sys.modules[__name__], shape, provider)
