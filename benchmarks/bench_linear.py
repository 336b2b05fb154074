"""x weight^T for the 1 to 16 rows of decoding, at the sizes of GPT-2 and Llama.

python -m benchmarks run linear
pytest benchmarks/bench_linear.py -k 4096
"""

import sys
from typing import NamedTuple

import pytest
import torch

import llmfast
from benchmarks.measure import DEVICE, record

SIZES = ((3072, 768), (50257, 768), (4096, 4096), (14336, 4096), (4096, 14336))  # V, D: feed-forward, head, projections


class Shape(NamedTuple):
    dtype: str
    rows: int
    N: int  # D
    V: int
    causal: bool = False
    backward: bool = False

    def __str__(self):
        return f"linear {self.dtype} {self.rows} rows {self.V}x{self.N}"


def providers(device):
    return {"torch": torch.nn.functional.linear, "llmfast": llmfast.linear}


def shapes(device, lengths=(1, 4, 16), dtypes=("float32", "bfloat16"), backward=False):
    """`lengths` are rows."""
    for dtype in dtypes:
        for V, D in SIZES:
            for rows in lengths:
                yield Shape(dtype, rows, D, V)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(*size, generator=g).to(device, getattr(torch, shape.dtype))
    return [rand(shape.rows, shape.N), rand(shape.V, shape.N)]


def call(provider, shape, tensors):
    return lambda: provider(*tensors)


def truth(shape, tensors):
    return torch.nn.functional.linear(*(t.double() for t in tensors))


def work(shape):
    """Bytes: one read of the weight."""
    return shape.V * shape.N * getattr(torch, shape.dtype).itemsize, "B/s"


def skip(name, shape):
    return False


@pytest.mark.parametrize("provider", providers(DEVICE))
@pytest.mark.parametrize("shape", shapes(DEVICE), ids=str)
def test_linear(benchmark, shape, provider):
    record(benchmark, sys.modules[__name__], shape, provider)
