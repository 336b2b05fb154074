import os
import random
import signal
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "2")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C

import jobs
import pytest
import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # decided when triton.language is imported: before any test module


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the long tier: every case in every dtype on every backend")
    parser.addoption("--sample", type=int, help="only so many of the chosen tests, always the same ones")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs only in the long tier (--all)")
    config.addinivalue_line("markers", "job(f, *arguments): waits for what f(*arguments) does meanwhile (jobs.py)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        deselected = [i for i in items if i.get_closest_marker("long")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [i for i in items if not i.get_closest_marker("long")]
    items.sort(key=lambda item: bool(jobs.of(item)))


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_finish(session):
    sample = session.config.getoption("--sample")
    if sample is not None and sample < len(session.items):
        session.items[:] = random.Random(0).sample(session.items, sample)
    if not session.config.option.collectonly:
        jobs.start(session.items)


def pytest_sessionfinish():
    jobs.stop()


def pytest_terminal_summary(terminalreporter):
    """One line for each thing that this machine lacks (nvcc, a compiler, a package): what was not checked without
    it.
    """
    reasons = {r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)}
    for reason in sorted(r.removeprefix("Skipped: ") for r in reasons if "was not found" in r):
        terminalreporter.write_line(f"not checked: {reason}")


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def right_arithmetic():
    """Triton's interpreter keeps bf16 as uint16: it multiplies the bits in tl.dot, and truncates where the GPU rounds
    to nearest. Its fma rounds twice."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def to_float32(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data, np.float32)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *rest):  # BLAS adds in an order of its own: few rows are too few to even that out
        if d.dtype.scalar != tl.float32:
            return dot(self, a, b, d, *rest)
        wide = (to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return TensorHandle((np.matmul(*wide, dtype=np.float64) + d.data).astype(np.float32), tl.float32)

    def create_fma(self, x, y, z):
        return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(x.data.dtype), x.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fma = (
        cast_impl,
        create_dot,
        create_fma,
    )


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    right_arithmetic()
