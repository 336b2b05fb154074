"""The CPU tests on builds of csrc with g++'s sanitizers, each in a child process that the first report ends.

Address and undefined behaviour in one build, threads in another: there a small libgomp of our own stands in for the
real one, whose futexes ThreadSanitizer can't follow (tests/sanitize/gomp.cpp), and code without instrumentation (torch)
is ignored.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import jobs
import mutants
import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "g++")
# Every test file that runs kernels of the CPU backend. The others start processes, build, or never reach csrc.
ELSEWHERE = [
    "benchmarks",
    "cuda_model",
    "hf",
    "install",
    "instruction_sets",
    "large",
    "mutants",
    "process",
    "reference",
    "sanitizers",
]
# ASan looks for __cxa_throw when it starts, so libstdc++ must be there by then.
LIBRARIES = {"address,undefined": ["libasan.so", "libstdc++.so.6"], "thread": ["libtsan.so"]}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much alive until the end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
    "OMP_NUM_THREADS": "4",
}


def lacking(checks):
    """Why this machine can't build with these sanitizers, in the compiler's words."""
    if shutil.which(CXX) is None:
        return f"{CXX} was not found"
    command = [CXX, f"-fsanitize={checks}", "-x", "c++", "-", "-o", os.devnull]
    found = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return found.stderr.strip() or None if found.returncode else None


def build(checks, isas, root=ROOT):
    """The package with an extension built with sanitizers, in a folder of its own; the path to put first."""
    if reason := lacking(checks):
        pytest.skip(reason)
    folder = root / "build" / f"{checks.partition(',')[0]}-{len(isas)}"
    env = os.environ | {"LLMFAST_CUDA": "0", "LLMFAST_SANITIZE": checks, "LLMFAST_ISAS": " ".join(isas)}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", f"{folder}-temp", "--build-lib", folder]
    subprocess.run(command, cwd=root, env=env, check=True, stderr=subprocess.DEVNULL)
    return folder


@cache
def run(checks, isas, isa, *arguments, root=ROOT):
    """pytest in a child on such a build."""
    package = build(checks, isas, root)
    where = lambda name: subprocess.run(
        [CXX, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    env = os.environ | OPTIONS | {"LLMFAST_ISA": isa, "LD_PRELOAD": " ".join(map(where, LIBRARIES[checks]))}
    chosen = [str(p) for p in sorted(ROOT.glob("tests/test_*.py")) if p.stem[5:] not in ELSEWHERE]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-qs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={package}",
    ]
    command += [
        "-k",
        "not triton and not reference and not cuda and not imports_nothing and not info and not support_table",
        *chosen,
        *arguments,
    ]
    return subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


try:
    from llmfast import _cpu

    ISAS = tuple(_cpu.supported().split())
except ImportError:
    ISAS = ()
needs_cpu = pytest.mark.skipif(not ISAS, reason="llmfast._cpu is not built")


def check(child):
    """Ran to its end without a report; whether the results are right is for the same tests without sanitizers."""
    assert " passed" in child.stdout, child.stdout[-6000:]
    assert "Sanitizer" not in child.stdout, child.stdout[-6000:]
    assert "runtime error" not in child.stdout, child.stdout[-6000:]


def samples():
    for checks, sample in (("address,undefined", "40"), ("thread", "10")):
        arguments = checks, ISAS[:1], *ISAS[:1], "--sample", sample
        yield pytest.param(arguments, id=checks, marks=jobs.job(run, *arguments))


@needs_cpu
@pytest.mark.parametrize("arguments", list(samples()))
def test_sample(arguments):
    check(jobs.result(run, *arguments))


def suites():
    for checks, isas in (("address,undefined", ISAS), ("thread", ISAS[:1])):  # threads are one text on every one
        for isa in isas:
            part = ("--sample", "400") if isa in ISAS[1:-1] else ()  # between the widest vectors and the narrowest
            arguments = checks, isas, isa, "--all", *part
            yield pytest.param(arguments, id=f"{checks}-{isa}", marks=jobs.job(run, *arguments))


@needs_cpu
@pytest.mark.long
@pytest.mark.parametrize("arguments", list(suites()))
def test_whole_suite(arguments):
    check(jobs.result(run, *arguments))


@needs_cpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("checks", "planted", "report"),
    [
        ("address,undefined", mutants.SCRATCH_TOO_SMALL, "heap-buffer-overflow"),
        ("thread", mutants.SCRATCH_SHARED, "data race"),
    ],
)
def test_planted_fault_is_reported(checks, planted, report, tmp_path):
    mutants.plant(planted, tmp_path)
    child = run(checks, ISAS[:1], *ISAS[:1], "--sample", "40", root=tmp_path)
    assert " passed" not in child.stdout
    assert report in child.stdout, child.stdout[-3000:]
