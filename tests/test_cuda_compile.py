"""The CUDA kernels compiled by nvcc for each GPU: tensor-core instructions, registers, spills, shared memory; no GPU.

The short tier compiles each file but float16 attention for sm_80 or sm_90a, --all everything for four GPUs and the
whole extension. Results are kept in build/cuda_compile until a source changes.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jobs
import pytest
import torch
from cuda_model import conformance

from llmfast import _cpu, inspect_cuda
from llmfast.machine_code import SHARED

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda_compile"
# Bytes outside loops: 8 in attention at head dim 128 and in dq at 64, 16 in softmax of 32768 float32 (64 registers) and
# in decode at 256 for sm_90.
# For sm_100, whose own instruction for products isn't used here, attention at head dim 128 spills 32.
SPILL_LIMIT = {"sm_80": 16, "sm_90": 16, "sm_100": 32, "sm_120": 16}
KERNELS = {  # of each file
    "attention_bf16": 12,
    "attention_fp16": 12,
    "attention_decode": 12,
    "attention_backward_bf16": 14,
    "attention_backward_fp16": 14,
    "attention_rowdot": 4,
    "softmax": 60,
    "cross_entropy": 12,
}
CLUSTERS = {"sm_80": 0, "sm_90": 9, "sm_100": 9, "sm_120": 8}  # of float32 the backward needs 128 KiB


needs_nvcc = pytest.mark.skipif(inspect_cuda.cannot() is not None, reason=str(inspect_cuda.cannot()))


@cache
def compiled(file, arch):
    """{mangled name: figures} of one source for one GPU."""
    return dict(inspect_cuda.kernels(file, arch, BUILD))


SHORT = {("attention_bf16", "sm_90"), ("attention_backward_bf16", "sm_80"), ("softmax", "sm_90")}
SHORT |= {("attention_rowdot", "sm_80"), ("cross_entropy", "sm_80"), ("attention_decode", "sm_90")}


def targets():
    for file in KERNELS:
        for arch in inspect_cuda.ARCHS:
            job = jobs.job(compiled, file, arch)
            yield pytest.param(file, arch, marks=[job] if (file, arch) in SHORT else [job, pytest.mark.long])


@needs_nvcc
@pytest.mark.parametrize(("file", "arch"), list(targets()))
def test_registers_and_spills(file, arch):
    found = jobs.result(compiled, file, arch)
    assert len(found) == KERNELS[file] + (CLUSTERS[arch] if file == "softmax" else 0)
    for name, c in found.items():
        assert c.spills <= SPILL_LIMIT[arch], str(c)
        assert not c.instructions or c.faults() == [], str(c)
        assert c.shared <= (SHARED[arch] if "cluster" in name else 101376), str(c)  # the tables are every GPU's
        if re.search("Li1024E|long|cluster", name):  # 1024 threads share 65536 registers
            assert c.registers <= 64
            assert c.warps == 32
    code = inspect_cuda.machine_code(inspect_cuda.compile_file(file, arch, BUILD)[0])
    if not code:
        pytest.skip("registers and spills are right; instructions not looked at: cuobjdump was not found")
    for name, text in code.items():
        if file.startswith("attention") and "rowdot" not in file:
            loads = [len(re.findall(rf"\b{op}", text)) for op in ("HMMA.16816", "LDSM", "LDGSTS", "LDSM.16.MT88")]
            assert min(loads) > 0, name
        elif "Lb1E" in name or "bwd_cluster" in name:  # aligned rows: 128-bit accesses only
            assert "LDG.E.128" in text, name
            assert "STG.E.128" in text or re.search("cross_entropy_fwd|rowdot", name), name


@needs_nvcc
@jobs.job(compiled, "softmax", "sm_90")
def test_what_inspect_says():
    """Names without mangling; the shared memory that a launch asks for; threads."""
    found = jobs.result(compiled, "softmax", "sm_90").values()
    told = {c.problem: c for c in found}
    assert told["softmax_rows<bf16, 256, 32, true>"][6:8] == (256, 8)
    assert told["softmax_rows<float, 32, 8, false>"][6:8] == (0, 4)
    assert told["softmax_bwd_cluster_rows<half>"][6:8] == (512 + 65536, 32)
    assert told["softmax_long_rows<float, false>"].kernel == "softmax_long_rows"
    assert set(inspect_cuda.files("softmax_bwd")) == {"cross_entropy", "softmax"}
    assert inspect_cuda.files("decode") == ["attention_decode"]
    assert "gfx942 is no GPU of nvcc's" in inspect_cuda.cannot(["sm_80", "gfx942"])


@cache
def extension():
    """llmfast._cuda built by setup.py, for the GPUs that it builds for."""
    folder = BUILD / "extension"
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = {**os.environ, "LLMFAST_CUDA": "1", "LLMFAST_ISAS": _cpu.supported().split()[-1]}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "llmfast").glob("_cuda*.so"))


@needs_nvcc
@pytest.mark.long
@jobs.job(extension)
def test_the_extension_builds_and_imports_without_a_driver():
    built = jobs.result(extension)
    assert built.stat().st_size < 30e6
    ask = f"import sys; sys.path.insert(0, {str(built.parent)!r}); import _cuda; print(_cuda.unavailable())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert re.search(r"no CUDA-capable device|driver", said.stdout)


@needs_nvcc
@jobs.job(conformance.compile_for_gpu, inspect_cuda.nvcc())
def test_the_gpu_does_what_the_host_model_says():
    """Each PTX wrapper bit for bit where there is a GPU; elsewhere the program compiles and notices a changed bit."""
    want = conformance.model()
    changed = {**want, "ldmatrix_x4": ("bits", [want["ldmatrix_x4"][1][0] ^ 1, *want["ldmatrix_x4"][1][1:]])}
    assert len(list(conformance.differences(want, changed))) == 1
    done = subprocess.run(
        [jobs.result(conformance.compile_for_gpu, inspect_cuda.nvcc())], capture_output=True, text=True
    )
    if not torch.cuda.is_available():
        assert "no device" in done.stderr
        pytest.skip("no GPU to compare the host model with")
    assert done.returncode == 0, done.stderr
    assert list(conformance.differences(want, conformance.read(done.stdout))) == []
