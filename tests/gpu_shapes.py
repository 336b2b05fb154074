"""Small problems through the kernels of the cuda backend, forward and backward, for compute-sanitizer.

--profile: one of a real size. Prints a line a shape; results are not looked at here: tests and `llmfast check` do that.
"""

import sys

import torch

import llmfast


def attend(B, H, Hk, Nq, Nk, D, dtype, **options):
    q, k, v = (
        torch.randn(B, h, n, D, device="cuda", dtype=dtype, requires_grad=True)
        for h, n in ((H, Nq), (Hk, Nk), (Hk, Nk))
    )
    llmfast.attention(q, k, v, backend="cuda", **options).sum().backward()


def decode(H, Hk, Nq, M, D, dtype, **options):
    """Pages of 16 in reverse, lengths of which one is more than there is room for."""
    q, k, v = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((2, H, Nq, D), *[(M // 8, Hk, 16, D)] * 2))
    table = torch.arange(M // 8, device="cuda", dtype=torch.int32).flip(0).view(2, -1)
    lengths = torch.tensor([M - 5, M + 5], device="cuda", dtype=torch.int32)
    llmfast.attention_decode(q, k, v, lengths, page_table=table, backend="cuda", **options)


def soften(rows, N, dtype):
    x = torch.randn(rows, N, device="cuda", dtype=dtype, requires_grad=True)
    llmfast.softmax(x, backend="cuda").square().sum().backward()


def main():
    if "--profile" in sys.argv:
        attend(4, 16, 16, 2048, 2048, 128, torch.bfloat16, causal=True)
        return
    shapes = [(1, 17), (70, 70), (65, 128), (128, 33)]
    options = [{}, dict(causal=True), dict(window=9), dict(softcap=5.0)]
    for i, (D, (Nq, Nk), option) in enumerate(
        (d, s, o) for d in (32, 64, 96, 128, 256) for s in shapes for o in options[: 3 + (d < 128)]
    ):
        print(i, D, Nq, Nk, option, flush=True)
        attend(1, 2, 1 + i % 2, Nq, Nk, D, (torch.bfloat16, torch.float16)[i % 2], **option)
    for i, (D, (H, Hk, Nq, M)) in enumerate(
        (d, s) for d in (32, 64, 96, 128, 192, 256) for s in ((2, 2, 1, 16), (8, 1, 1, 800), (6, 2, 7, 1200))
    ):
        print("decode", D, H, Hk, Nq, M, flush=True)
        decode(H, Hk, Nq, M, D, (torch.bfloat16, torch.float16)[i % 2], **options[i % 4])
    for i, N in enumerate((7, 256, 1000, 4096, 9001, 40000)):
        print("softmax", N, flush=True)
        soften(3, N, (torch.float32, torch.bfloat16, torch.float16)[i % 3])
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
