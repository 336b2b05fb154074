"""Binds csrc/cuda: tensor-core kernels for NVIDIA GPUs from Ampere on."""


def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return "has no kernels yet"
