"""What an eager call costs beyond its kernel: one head, one query, one key, so the kernel has nothing much to do; and
what a whole call costs at 4 heads of 16 queries.

The demand is under 10 us a call on the CPU, at 4 heads of 16 no more than PyTorch's own operation on the same tensors,
which is the baseline.

    python -m benchmarks run overhead
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import llmfast


class Shape(NamedTuple):
    dtype: str
    call: str
    H: int = 1
    N: int = 1
    backward: bool = False

    def __str__(self):
        return f"{self.call} {self.dtype} H{self.H} N{self.N}"


def _gradient(forward):
    """Forward and backward together: forward(q, k, v) with a gradient of ones."""

    def run(q, k, v):
        o = forward(*(t.detach().requires_grad_() for t in (q, k, v)))
        o.sum().backward()
        return o.detach()

    return run


def _recorded(forward):
    """Only the forward, on tensors that ask for a gradient."""

    def run(q, k, v):
        return forward(*(t if t.requires_grad else t.requires_grad_() for t in (q, k, v))).detach()

    return run


def _decode(q, k, v, seqlens_k):
    return llmfast.attention_decode(q, k, v, seqlens_k, causal=False)


def _target(q):
    return torch.zeros(q.shape[2], dtype=torch.int64, device=q.device)


def _loss(cross_entropy):
    return lambda q, k, v: cross_entropy(q[0, 0], _target(q))


def _loss_gradient(cross_entropy):
    def run(q, k, v):
        x = q[0, 0].detach().requires_grad_()
        loss = cross_entropy(x, _target(q))
        loss.backward()
        return loss.detach()

    return run


CALLS = {  # PyTorch's, llmfast's
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, llmfast.scaled_dot_product_attention),
    "attention": (F.scaled_dot_product_attention, llmfast.attention),
    "attention_decode": (lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v), _decode),
    "attention with a window": (F.scaled_dot_product_attention, lambda q, k, v: llmfast.attention(q, k, v, window=99)),
    "softmax": (lambda q, k, v: torch.softmax(q, -1), lambda q, k, v: llmfast.softmax(q)),
    "softmax over heads": (lambda q, k, v: torch.softmax(q, 1), lambda q, k, v: llmfast.softmax(q, 1)),
    "cross_entropy": (_loss(F.cross_entropy), _loss(llmfast.cross_entropy)),
    "attention, recorded": (_recorded(F.scaled_dot_product_attention), _recorded(llmfast.scaled_dot_product_attention)),
    "attention and its gradient": (_gradient(F.scaled_dot_product_attention), _gradient(llmfast.attention)),
    "cross_entropy and its gradient": (_loss_gradient(F.cross_entropy), _loss_gradient(llmfast.cross_entropy)),
}


def providers(device):
    return {"torch": 0, "llmfast": 1}


def shapes(device, lengths=(), dtypes=("float32", "bfloat16"), backward=False):
    for dtype in dtypes:
        for H, N in ((1, 1), (4, 16)):
            for name in CALLS:
                yield Shape(dtype, name, H, N)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, shape.H, shape.N, 64, generator=g).to(device, getattr(torch, shape.dtype)) for _ in range(3)
    ]
    if shape.call == "attention_decode":
        tensors.append(torch.tensor([shape.N], dtype=torch.int32, device=device))  # seqlens_k
    return tensors


def call(provider, shape, tensors):
    run = CALLS[shape.call][provider]
    return lambda: run(*tensors)


def truth(shape, tensors):
    return call(0, shape, [t.double() for t in tensors])()


def work(shape):
    return 1, "calls/s"


def skip(name, shape):
    return False
