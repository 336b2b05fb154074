"""Compiles the CUDA kernels for GPUs that need not be there, as `llmfast inspect --cuda` lists them; needs nvcc.

Registers and spills are ptxas' own, instructions those of the machine code; shared memory is what the launcher asks
for, which each kernel leaves in its PTX (note_shared).
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from .machine_code import SHARED, Compiled, instructions

FOLDER = Path(__file__).parent.parent / "csrc"
ARCHS = {"sm_80": "80", "sm_90": "90a", "sm_100": "100a", "sm_120": "120"}  # as nvcc calls them
TYPES = {"6__half": "half", "13__nv_bfloat16": "bf16", "f": "float"}


def nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)


def cuobjdump() -> str | None:
    """From the toolkit, or the copy in the triton wheel; None where neither is."""
    found = find_spec("triton")
    copies = [] if found is None else Path(found.origin).parent.glob("backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump") or next(map(str, copies), None)


def cannot(archs=()) -> str | None:
    """Why the kernels can't be compiled here, for these GPUs, in a sentence, or None."""
    if other := [a for a in archs if a not in ARCHS]:
        return f"{other[0]} is no GPU of nvcc's: the CUDA kernels run on {', '.join(ARCHS)}"
    if not (FOLDER / "cuda").is_dir():
        return "the CUDA sources are not here: inspect them in a clone of the repository"
    return None if nvcc() else "nvcc was not found: the CUDA kernels are not compiled here"


def files(kernel: str = "") -> list[str]:
    """The sources, without .cu, of kernels whose name holds `kernel`."""

    def text(path):
        found = path.read_text()
        return found + "".join(text(path.parent / name) for name in re.findall(r'#include "(\w+\.cuh)"', found))

    def names(path):
        return re.findall(r"__global__[^{]*?(\w+)\(const __grid_constant__", text(path))

    return sorted(p.stem for p in (FOLDER / "cuda").glob("*.cu") if any(kernel in name for name in names(p)))


def inspect(archs=tuple(ARCHS), kernel: str = "") -> Iterator[Compiled]:
    """Every kernel whose name holds `kernel`, on these GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        for arch, file in product(archs, files(kernel)):
            yield from (c for _, c in kernels(file, arch, Path(folder)) if kernel in c.kernel)


def compile_file(file: str, arch: str, folder: Path) -> tuple[Path, str, str]:
    """A source for one GPU: machine code, PTX and what ptxas says, kept in the folder until a source changes."""
    sources = sorted([*FOLDER.glob("*.h"), *(FOLDER / "cuda").glob("*")])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{file}-{arch}-{digest}.cubin"
    ptx, log = cubin.with_suffix(".ptx"), cubin.with_suffix(".log")
    if not log.exists():
        name, flags = ARCHS[arch], ["-O3", "-std=c++17", f"-I{FOLDER}"]
        _run([nvcc(), *flags, "-ptx", f"-arch=compute_{name}", FOLDER / "cuda" / f"{file}.cu", "-o", ptx])
        gpu = f"-gencode=arch=compute_{name},code=sm_{name}"
        said = _run([nvcc(), *flags, "-cubin", gpu, "-Xptxas=-v", ptx, "-o", cubin])
        for old in folder.glob(f"{file}-{arch}-*"):
            if digest not in old.name:
                old.unlink()
        log.write_text(said)
    return cubin, ptx.read_text(), log.read_text()


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed: {done.stderr[-3000:]}")
    return done.stderr


def machine_code(cubin: Path) -> dict[str, str]:
    """The disassembly of each kernel by its mangled name; nothing without cuobjdump."""
    if cuobjdump() is None:
        return {}
    text = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {part.split()[0]: part for part in text.split("Function : ")[1:]}


def demangled(name: str) -> tuple[str, str]:
    """A kernel's name and its template's arguments."""
    length, rest = re.search(r"cuda(\d+)(\w+)", name).groups()
    kernel, rest = rest[: int(length)], rest[int(length) :]
    found = re.match(r"I((?:6__half|13__nv_bfloat16|f|L[ib]\d+E|LNS\d?_\w+?E\d+E)+)E", rest)
    if found is None:
        return kernel, ""
    pieces = re.findall(r"6__half|13__nv_bfloat16|^f|Li(\d+)E|Lb([01])E|LNS\d?_\w+?E(\d+)E", found[1])
    first = next(name for mangled, name in TYPES.items() if found[1].startswith(mangled))
    values = [number or {"0": "false", "1": "true"}.get(truth) or part for number, truth, part in pieces[1:]]
    return kernel, f"<{', '.join([first, *values])}>"


def kernels(file: str, arch: str, folder: Path) -> Iterator[tuple[str, Compiled]]:
    """Every kernel of a source: its mangled name and its figures."""
    cubin, ptx, log = compile_file(file, arch, folder)
    code = machine_code(cubin)
    entries = {re.match(r"\s*(\w+)", part)[1]: part for part in ptx.split(".entry")[1:]}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        patterns = r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill stores"
        registers, stack, spills = (int(re.search(p, part)[1]) for p in patterns)
        threads = re.search(r"\.maxntid (\d+)", entries[name])
        shared = re.search(r"shared memory: (\d+) bytes", entries[name])
        kernel, arguments = demangled(name)
        if "cluster" in kernel and (arch == "sm_80" or int(shared[1]) > SHARED[arch]):
            continue  # no launcher starts it there
        mix = instructions(code[name]) if name in code else Counter()
        figures = registers, stack, spills, int(shared[1]), int(threads[1]) // 32
        yield name, Compiled(kernel, kernel + arguments, arch, *figures, mix)
