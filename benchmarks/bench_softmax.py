"""Softmax across row lengths, into a fresh output and into a given one.

python -m benchmarks run softmax
pytest benchmarks/bench_softmax.py -k 50257
"""

import sys
from typing import NamedTuple

import pytest
import torch

import llmfast
from benchmarks.measure import DEVICE, record


class Shape(NamedTuple):
    dtype: str
    rows: int
    N: int
    causal: bool
    backward: bool = False

    def __str__(self):
        return f"softmax {self.dtype} {self.rows}x{self.N}{' causal' if self.causal else ''}"


def torch_softmax(x, out, causal):
    if causal:
        hidden = torch.ones(x.shape, dtype=torch.bool, device=x.device).triu(1)
        return torch.softmax(x.masked_fill(hidden, float("-inf")), -1, out=out)
    return torch.softmax(x, -1, out=out)


def ours(backend=None):
    return lambda x, out, causal: llmfast.softmax(x, causal=causal, out=out, backend=backend)


def providers(device):
    if device == "cuda":
        return {"torch": torch_softmax, "llmfast triton": ours("triton"), "llmfast cuda": ours("cuda")}
    return {"torch": torch_softmax, "llmfast": ours()}


def shapes(device, lengths=(128, 256, 512, 1024, 2048, 4096), dtypes=("float32", "bfloat16"), backward=False):
    """Square up to 4096 columns; vocabulary-sized rows beyond."""
    for dtype in dtypes:
        for N in lengths:
            yield Shape(dtype, 32768 if device == "cuda" else 2048, N, False)
        for rows, N in ((1024, 1024), (2048, 2048)):
            yield Shape(dtype, rows, N, True)
        yield Shape(dtype, 4096 if device == "cuda" else 256, 50257, False)
        if device == "cuda":
            yield Shape(dtype, 1024, 262144, False)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.N, generator=g).mul(2).to(device, getattr(torch, shape.dtype))
    return [x, torch.empty_like(x)]


def call(provider, shape, tensors):
    x, out = tensors
    out = torch.empty_like(out)
    return lambda: provider(x, out, shape.causal)


def truth(shape, tensors):
    return torch_softmax(tensors[0].double(), None, shape.causal)


def work(shape):
    """Bytes: one read and one write of the matrix."""
    return 2 * shape.rows * shape.N * getattr(torch, shape.dtype).itemsize, "B/s"


def skip(name, shape):
    return False


@pytest.mark.parametrize("provider", providers(DEVICE))
@pytest.mark.parametrize("shape", shapes(DEVICE), ids=str)
def test_softmax(benchmark, shape, provider):
    record(benchmark, sys.modules[__name__], shape, provider)
