"""Peak memory of one causal forward and backward of attention beyond inputs, outputs and gradients, in a process of its
own: Linux's VmHWM, or torch.cuda.max_memory_allocated on a GPU.

`python -m benchmarks.memory 32768 cpu` prints bytes.
"""

import subprocess
import sys
from pathlib import Path

import torch

import llmfast

H, D = 1, 64


def _status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak(N: int, device: str = "cpu") -> int:
    """Bytes beyond q, k, v (1, H, N, D) bfloat16, o, lse and the gradients, in this process."""

    def problem(n):
        q, k, v = (torch.randn(1, H, n, D, device=device).bfloat16().requires_grad_() for _ in range(3))
        return (q, k, v), torch.randn(1, H, n, D, device=device).bfloat16()

    def run(inputs, do):
        o = llmfast.scaled_dot_product_attention(*inputs, is_causal=True)
        return o, torch.autograd.grad(o, inputs, do)

    run(*problem(256))  # what a first call loads isn't the kernel's
    inputs, do = problem(N)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = _status("VmRSS")
    o, grads = run(inputs, do)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    return after - before - sum(t.nbytes for t in (o, *grads)) - H * N * 4


def measured(N: int, device: str = "cpu") -> int:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", str(N), device]
    return int(
        subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    print(peak(int(sys.argv[1]), sys.argv[2]))
