"""A wheel carries the kernels and runs away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRIAL = """
import inspect, torch, llmfast
assert {root!r} not in llmfast.__file__, llmfast.__file__
q = torch.randn(1, 2, 40, 16, requires_grad=True)
llmfast.attention(q, q, q, causal=True, backend="cpu").sum()
from llmfast.kernels import softmax
assert "tl.load" in inspect.getsource(softmax)
print("ran")
"""


@pytest.mark.long
def test_wheel(tmp_path):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        str(ROOT),
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, env={**os.environ, "LLMFAST_CUDA": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    assert "llmfast/kernels/softmax.py" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/", "kernels/"))]
    trial = [sys.executable, "-P", "-c", TRIAL.format(root=str(ROOT))]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(trial, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.stdout == "ran\n", out.stderr


def test_kernels_is_no_package():
    """Hugging Face has a package `kernels`; an __init__.py here would hide it from transformers in a checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_fast_math():
    """A shared library linked with -ffast-math flushes denormals to zero in the whole process."""
    flags = [line.split("#")[0] for line in (ROOT / "setup.py").read_text().splitlines()]
    assert not [f for f in flags if "fast-math" in f or "-Ofast" in f]
