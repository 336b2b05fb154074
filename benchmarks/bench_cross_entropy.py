"""Cross entropy of logits, and of hidden states against a vocabulary without the logits ever being whole.

Time of each provider, and beside it the peak of memory that a training step of linear cross entropy holds beyond its
inputs.

    python -m benchmarks run cross_entropy
    pytest benchmarks/bench_cross_entropy.py -k 50257
"""

import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import llmfast
from benchmarks.measure import DEVICE, record


class Shape(NamedTuple):
    dtype: str
    rows: int
    V: int
    D: int  # 0: logits are given; otherwise hidden states (rows, D) and a weight (V, D)
    backward: bool

    def __str__(self):
        what = f"linear D{self.D} " if self.D else ""
        return f"cross entropy {what}{self.dtype} {self.rows}x{self.V}{' backward' if self.backward else ''}"


def torch_loss(tensors, backend=None):
    *x, y = tensors
    return F.cross_entropy(F.linear(*x) if len(x) == 2 else x[0], y)


def ours(backend=None):
    def loss(tensors):
        *x, y = tensors
        if len(x) == 2:
            return llmfast.linear_cross_entropy(*x, y, backend=backend)
        return llmfast.cross_entropy(x[0], y, backend=backend)

    return loss


def providers(device):
    if device == "cuda":
        return {"torch": torch_loss, "llmfast triton": ours("triton"), "llmfast cuda": ours("cuda")}
    return {"torch": torch_loss, "llmfast": ours()}


def shapes(device, lengths=(), dtypes=("float32", "bfloat16"), backward=True):
    """Vocabularies of GPT-2, Llama and Qwen; hidden states as a small model has them."""
    rows = 4096 if device == "cuda" else 128
    for dtype in dtypes:
        for back in (False, True)[: 1 + backward]:
            for V in (32000, 50257, 151936):
                yield Shape(dtype, rows, V, 0, back)
            yield Shape(dtype, 8 * rows if device == "cuda" else 512, 32000, 512, back)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    make = lambda *size: torch.randn(*size, generator=g).to(device, getattr(torch, shape.dtype))
    x = [make(shape.rows, shape.D), make(shape.V, shape.D) / shape.D**0.5] if shape.D else [make(shape.rows, shape.V)]
    return [t.requires_grad_(shape.backward) for t in x] + [
        torch.randint(shape.V, (shape.rows,), generator=g).to(device)
    ]


def call(provider, shape, tensors):
    if not shape.backward:
        return lambda: provider(tensors)
    return lambda: torch.autograd.grad(provider(tensors), tensors[:-1])


def truth(shape, tensors):
    wide = [t.detach().double().requires_grad_(shape.backward) for t in tensors[:-1]]
    return call(torch_loss, shape, [*wide, tensors[-1]])()


def work(shape):
    """Bytes: the logits are read once, and with the gradient read again and written once; of the linear one, FLOP."""
    if shape.D:
        return (6 if shape.backward else 2) * shape.rows * shape.V * shape.D, "FLOP/s"
    return (3 if shape.backward else 1) * shape.rows * shape.V * getattr(torch, shape.dtype).itemsize, "B/s"


def skip(name, shape):
    return False


class Peak(TorchDispatchMode):
    """The most bytes that are alive at once of what is made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def memory(dtypes=("float32", "bfloat16"), rows=2048, V=32000, D=256):
    """(dtype, provider, MB beyond the inputs at the peak of forward and backward)."""
    for dtype in dtypes:
        shape = Shape(dtype, rows, V, D, True)
        tensors = inputs(shape, "cpu")
        for name, provider in {"torch": torch_loss, "llmfast": ours()}.items():
            with Peak() as found:
                grads = call(provider, shape, tensors)()
            del grads
            yield dtype, name, found.peak / 1e6


@pytest.mark.parametrize("provider", providers(DEVICE))
@pytest.mark.parametrize("shape", shapes(DEVICE), ids=str)
def test_cross_entropy(benchmark, shape, provider):
    record(benchmark, sys.modules[__name__], shape, provider)
