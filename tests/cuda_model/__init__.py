"""Builds the CUDA kernels with g++ against the host model (device.h) and gives them as backend operations.

Nothing here is installed, and dispatch never chooses it: a test puts `attention`, `softmax` and `cross_entropy` in
place of the cuda backend's.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from threading import Lock

from llmfast.backends import cuda

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_model"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
MODEL = HERE / "device.cpp"
SANITIZERS = {
    "": [],
    # null: g++ 12 misreports thread-local variables as null pointers
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread", "-fno-builtin"],
    "fma": ["-ffp-contract=fast", "-mfma"],  # products and sums in one rounding, as ptxas makes them
}
_one_ninja = {
    sanitizer: Lock() for sanitizer in SANITIZERS
}  # at a time in a folder: programs share the kernels' objects


def build(name, main, sanitizer=""):
    """Compiles what changed, two files at once, and links BUILD/name from main and the kernels; returns its path."""
    import pybind11

    folder = BUILD / (sanitizer or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    include = [ROOT / "csrc", HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    common = ["-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    common += ["-Wno-unknown-pragmas", *(f"-I{path}" for path in include)]
    checks = " ".join(SANITIZERS[sanitizer])
    text = [
        "rule compile",
        "  command = g++ $flags -MMD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    text += ["rule link", f"  command = g++ {checks} {'-shared' if name.endswith('.so') else ''} $in -o $out"]
    objects = []
    for source in [main, *KERNELS, MODEL]:
        unseen = source == MODEL and sanitizer == "tsan"  # what passes between the lanes of a warp orders no memory
        objects.append(f"{source.name}.o")
        text += [f"build {objects[-1]}: compile {source}"]
        level = (
            "-O2" if source == MODEL else {"asan": "-O0", "fma": "-O2"}.get(sanitizer, "-O1")
        )  # UBSan: 5 x -O0's time
        text += [f"  flags = {' '.join(common)} {level} {'-DMODEL_TSAN' if unseen else checks}"]
    target = BUILD / name
    text += [f"build {target}: link {' '.join(objects)}", ""]
    (folder / f"{name}.ninja").write_text("\n".join(text))
    command = [ninja(), "-C", folder, "-f", f"{name}.ninja", "-j2", "--quiet"]
    with _one_ninja[sanitizer]:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return target


@cache
def fuzz(sanitizer):
    """The program fuzz.cpp; run(what, first, count, seed, fault, small) returns its exit status and output."""
    path = build(f"fuzz_{sanitizer or 'plain'}", HERE / "fuzz.cpp", sanitizer)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}

    def run(what, first, count, seed=0, fault=0, small=0):
        command = [str(x) for x in (path, what, first, count, seed, fault, small)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run


def ninja():
    if found := shutil.which("ninja"):
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


@cache
def library(variant=""):
    """The Python module of csrc/bindings_cuda.cpp over the host model; variant: "" or "fma"."""
    path = build(f"{variant}_cuda.so", ROOT / "csrc/bindings_cuda.cpp", variant)
    spec = importlib.util.spec_from_file_location(f"cuda_model{variant}._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schedule(seed, fault=0):
    """The order in which the model runs warps and lanes from now on, and the fault that is active; see device.cpp."""
    ctypes.CDLL(library().__file__).llmfast_model(seed, fault)


def _refuses(t):
    return None if t.is_cpu else f"the host model needs a CPU tensor, got {t.device}"


def _launch(name, t, *args):
    getattr(library(), name)(*args, 0)


def contracted():
    """Attention as `fma` rounds it."""
    return cuda.attention_op(_refuses, lambda name, t, *args: getattr(library("fma"), name)(*args, 0))


attention = cuda.attention_op(_refuses, _launch)
softmax = cuda.softmax_op(_refuses, _launch)
cross_entropy = cuda.cross_entropy_op(_refuses, _launch)
