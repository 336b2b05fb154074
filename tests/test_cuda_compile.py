"""The CUDA kernels compiled by nvcc for each GPU: tensor-core instructions, registers, spills, shared memory; no GPU.

The short tier compiles each file but float16 attention for sm_80 or sm_90a, --all everything for four GPUs and the
whole extension. Results are kept in build/cuda_compile until a source changes.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jobs
import pytest
import torch
from cuda_model import conformance

from llmfast import _cpu

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda_compile"
SOURCES = sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc/cuda").glob("*"))
SHARED_LIMIT = {"80": 166912, "90a": 232448, "100a": 232448, "120": 101376}  # bytes a block may have
# Bytes outside loops: 8 in attention at head dim 128 and in dq at 64, 16 in softmax of 32768 float32 (64 registers) and
# in decode at 256 for sm_90a.
# For sm_100a, whose own instruction for products isn't used here, attention at head dim 128 spills 32.
SPILL_LIMIT = {"80": 16, "90a": 16, "100a": 32, "120": 16}
KERNELS = {  # of each file
    "attention_bf16": 12,
    "attention_fp16": 12,
    "attention_decode": 12,
    "attention_backward_bf16": 14,
    "attention_backward_fp16": 14,
    "softmax": 69,
    "cross_entropy": 12,
}


@cache
def nvcc():
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)


@cache
def cuobjdump():
    """From the toolkit, or the copy in the triton wheel; None where neither is."""
    found = find_spec("triton")
    copies = [] if found is None else Path(found.origin).parent.glob("backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump") or next(map(str, copies), None)


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc was not found: the CUDA kernels are not compiled here")


@cache
def compiled(file, arch):
    """{kernel name: (registers, spill bytes)} and the cubin of one source for one GPU."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in SOURCES)).hexdigest()[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    cubin = BUILD / f"{file}-{arch}-{digest}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        command = [nvcc(), "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
        command += [f"-I{ROOT / 'csrc'}", ROOT / "csrc/cuda" / f"{file}.cu", "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for old in BUILD.glob(f"{file}-{arch}-*"):
            if digest not in old.name:
                old.unlink()
        log.write_text(done.stderr)
    found = {}
    for part in log.read_text().split("Compiling entry function '")[1:]:
        registers, spills = (re.search(p, part) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        found[part.split("'")[0]] = int(registers[1]), int(spills[1])
    return found, cubin


SHORT = {("attention_bf16", "90a"), ("attention_backward_bf16", "80"), ("softmax", "90a"), ("cross_entropy", "80")}
SHORT |= {("attention_decode", "90a")}


def targets():
    for file in KERNELS:
        for arch in SHARED_LIMIT:
            job = jobs.job(compiled, file, arch)
            yield pytest.param(file, arch, marks=[job] if (file, arch) in SHORT else [job, pytest.mark.long])


@needs_nvcc
@pytest.mark.parametrize(("file", "arch"), list(targets()))
def test_registers_and_spills(file, arch):
    found, cubin = jobs.result(compiled, file, arch)
    assert len(found) == KERNELS[file]
    assert {name: spills for name, (_, spills) in found.items() if spills > SPILL_LIMIT[arch]} == {}
    if file == "softmax":  # 1024 threads share 65536 registers
        assert max(registers for name, (registers, _) in found.items() if re.search("Li1024E|long|cluster", name)) <= 64
    if cuobjdump() is None:
        pytest.skip("registers and spills are right; instructions not looked at: cuobjdump was not found")
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for text in sass.split("Function : ")[1:]:
        name = text.split()[0]
        if file.startswith("attention"):
            loads = [len(re.findall(rf"\b{op}", text)) for op in ("HMMA.16816", "LDSM", "LDGSTS", "LDSM.16.MT88")]
            assert min(loads) > 0, name
        elif "Lb1E" in name or "bwd_cluster" in name:  # aligned rows: 128-bit accesses only
            assert "LDG.E.128" in text, name
            assert "STG.E.128" in text or "cross_entropy_fwd" in name, name


@needs_nvcc
def test_shared_memory_fits_every_gpu():
    """The tile table's own arithmetic, checked by the compiler."""
    program = '#include "cuda/attention_forward.cuh"\nnamespace llmfast::cuda {\n'
    for head_dim in (32, 64, 96, 128, 192, 256):
        for general in ("true", "false"):
            program += f"static_assert(Tile<{head_dim}, {general}>::kSharedBytes <= {min(SHARED_LIMIT.values())});\n"
    source = BUILD / "shared.cu"
    BUILD.mkdir(parents=True, exist_ok=True)
    source.write_text(program + "}\n")
    command = [
        nvcc(),
        "-cubin",
        "-std=c++17",
        "-arch=sm_80",
        f"-I{ROOT / 'csrc'}",
        source,
        "-o",
        BUILD / "shared.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
@jobs.job(conformance.compile_for_gpu, nvcc())
def test_the_gpu_does_what_the_host_model_says():
    """Each PTX wrapper bit for bit where there is a GPU; elsewhere the program compiles and notices a changed bit."""
    want = conformance.model()
    changed = {**want, "ldmatrix_x4": ("bits", [want["ldmatrix_x4"][1][0] ^ 1, *want["ldmatrix_x4"][1][1:]])}
    assert len(list(conformance.differences(want, changed))) == 1
    done = subprocess.run([jobs.result(conformance.compile_for_gpu, nvcc())], capture_output=True, text=True)
    if not torch.cuda.is_available():
        assert "no device" in done.stderr
        pytest.skip("no GPU to compare the host model with")
    assert done.returncode == 0, done.stderr
    assert list(conformance.differences(want, conformance.read(done.stdout))) == []
