"""The CPU tests once more, in a child process for each instruction set that isn't the one this machine would choose."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jobs
import pytest

try:
    from llmfast import _cpu

    OTHERS = _cpu.supported().split()[1:]
except ImportError:
    OTHERS = []

ROOT = Path(__file__).parent.parent
FILES = [f"tests/test_{n}.py" for n in ("attention", "softmax", "cross_entropy", "cpu_forward", "cpu_backward")]


@cache
def run(isa, *options):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *options]
    command += ["-k", "not triton and not reference and not cuda and not instruction_set", *FILES]
    env = os.environ | {"LLMFAST_ISA": isa}
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tiers():
    for isa in OTHERS:
        for options, marks in ((("--sample", "150"), []), (("--all",), [pytest.mark.long])):
            yield pytest.param(isa, options, marks=[*marks, jobs.job(run, isa, *options)], id=f"{isa}{options[0]}")


@pytest.mark.skipif(not OTHERS, reason="llmfast._cpu is not built, or this machine has one instruction set")
@pytest.mark.parametrize(("isa", "options"), list(tiers()))
def test_agrees_on(isa, options):
    child = jobs.result(run, isa, *options)
    assert child.returncode == 0, child.stdout[-6000:]
