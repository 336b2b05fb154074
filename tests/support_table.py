"""Prints the README's support table: what passed on this machine, Triton in its interpreter and CUDA on the host model
where there is no GPU.

    python -m tests.support_table
"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from llmfast import backends, check


def main():
    device_of = check.device_of
    if not torch.cuda.is_available():
        sys.path.insert(0, str(Path(__file__).parent))
        import conftest
        import cuda_model

        conftest.right_arithmetic()
        for operation in ("attention", "softmax", "cross_entropy"):
            backends._ops[operation, "cuda"] = getattr(cuda_model, operation)
        device_of = lambda backend: "cpu"
    check.device_of = device_of
    print(check.markdown(check.support_table()))


if __name__ == "__main__":
    main()
