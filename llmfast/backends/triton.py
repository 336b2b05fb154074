"""Binds kernels/: Triton, on any GPU it knows; on CPU tensors only in its interpreter (TRITON_INTERPRET=1) and when named."""


def available() -> str | None:
    """None, or why this backend can't run on this machine."""
    return "has no kernels yet"
