"""What the case table can't show of the CPU backward: chunks of key blocks shared by threads, shared bias gradients,
exact zeros.
"""

import pytest
import torch

import llmfast
from llmfast.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))


def gradients(q, k, v, do, threads=None, **options):
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    bias = options.get("bias")
    if bias is not None:
        options["bias"] = bias.clone().requires_grad_()
        inputs.append(options["bias"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        o = llmfast.attention(*inputs[:3], **options, backend="cpu")
        return torch.autograd.grad(o, inputs, do)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 100}, {"bias": (1, 1, 1, 1600)}, {"bias": (1100, 1)}]
)
def test_bits_do_not_depend_on_threads_or_batch(options, dtype):
    """1600 keys make 3 chunks; one head on several threads shares them, many heads do not."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(2, 4, n, 24).to(dtype) for n in (1100, 1600, 1600, 1100))
    if "bias" in options:
        options = {"bias": torch.randn(options["bias"]).to(dtype)}
    one = [t[:1, :1] for t in (q, k, v)]
    alone, shared = (gradients(*one, do[:1, :1], threads, **options) for threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    whole = gradients(q, k, v, do, 2, **options)
    assert all(torch.equal(a, b[:1, :1]) for a, b in zip(alone[:3], whole[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score(dtype):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 40, 40).to(dtype) for _ in range(4))
    dq, _, _ = gradients(q, k, v, do, causal=True)
    assert (dq[:, :, 0] == 0).all()
    assert (dq[:, :, 1:].abs().amax(-1) > 0).all()
