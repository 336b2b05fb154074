"""Builds the CUDA kernels with g++ against the host model (device.h) and gives them as backend operations.

Nothing here is installed, and dispatch never chooses it: a test puts `attention` and `softmax` in place of the cuda backend's.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

from llmfast.backends import cuda

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_model"
KERNELS = [ROOT / "csrc/cuda" / f"{name}.cu" for name in ("softmax", "attention_bf16", "attention_fp16")]
MODEL = HERE / "device.cpp"
SANITIZERS = {
    "": [],
    # null: g++ 12 misreports thread-local variables as null pointers
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread", "-fno-builtin"],
}


def build(name, sources, sanitizer="", flags=(), shared=False):
    """Compiles what changed, two files at once, and links BUILD/name; returns its path. The model itself is unseen by tsan."""
    folder = BUILD / f"{name}.objects"
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{p}" for p in (ROOT / "csrc", HERE)]
    common = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    common += ["-fvisibility=hidden", *include, *flags]
    text = ["rule compile", "  command = g++ $flags -MMD -MF $out.d -c -x c++ $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    text += ["rule link", f"  command = g++ {' '.join(SANITIZERS[sanitizer])} {'-shared' if shared else ''} $in -o $out"]
    objects = []
    for source in [*sources, MODEL]:
        unseen = source == MODEL and sanitizer == "tsan"
        own = ["-DMODEL_TSAN", "-O2"] if unseen else ["-O2"] if source == MODEL else []
        objects.append(folder / f"{source.name}.o")
        text += [f"build {objects[-1]}: compile {source}"]
        text += [f"  flags = {' '.join([*common, *own, *([] if unseen else SANITIZERS[sanitizer])])}"]
    target = BUILD / name
    text += [f"build {target}: link {' '.join(map(str, objects))}", ""]
    (folder / "build.ninja").write_text("\n".join(text))
    done = subprocess.run([ninja(), "-C", str(folder), "-j2", "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return target


def ninja():
    if found := shutil.which("ninja"):
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


@cache
def library():
    """The Python module of csrc/bindings_cuda.cpp over the host model."""
    import pybind11

    include = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    path = build("_cuda.so", [ROOT / "csrc/bindings_cuda.cpp", *KERNELS], flags=include, shared=True)
    spec = importlib.util.spec_from_file_location("cuda_model._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuses(t):
    return None if t.is_cpu else f"the host model needs a CPU tensor, got {t.device}"


def _launch(name, t, *args):
    getattr(library(), name)(*args, 0)


attention = cuda.attention_op(_refuses, _launch)
softmax = cuda.softmax_op(_refuses, _launch)
