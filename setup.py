"""Builds llmfast._cpu always and llmfast._cuda where nvcc is found, through one ninja file each: no torch, no torch
headers.

LLMFAST_CUDA=0 leaves CUDA out, =1 demands it; LLMFAST_CUDA_ARCHS="80;90a" chooses the architectures.
LLMFAST_ISAS="avx2" builds only these instruction sets; LLMFAST_SANITIZE="address,undefined" builds with g++'s
sanitizers.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
X86 = platform.machine() in ("x86_64", "AMD64")
# Never -ffast-math: a library linked with it sets flush-to-zero for the whole process.
KERNEL = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast", "-fopenmp"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
# csrc/cpu/NAME.cpp and its own flags. NEON: g++ 12 that orders instructions before it gives them registers spills from
# the tiles of 24 accumulators, 13 of 84 instructions of the loop that makes scores.
ISAS = {"neon": ["-fno-schedule-insns"]} if platform.machine() in ("aarch64", "arm64") else {"baseline": []}
if X86:
    ISAS |= {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
WANTED = os.environ.get("LLMFAST_ISAS", " ".join(ISAS)).split()
SANITIZE = []
if checks := os.environ.get("LLMFAST_SANITIZE"):
    SANITIZE = ["-O0", "-g1", f"-fsanitize={checks}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ARCHS = os.environ.get("LLMFAST_CUDA_ARCHS", "80;90a").split(";")


def find_nvcc():
    """nvcc from CUDA_HOME, CUDA_PATH, PATH, the usual folder or pip's nvidia packages; None where there is none."""
    wanted = os.environ.get("LLMFAST_CUDA", "auto")
    if wanted == "0":
        return None
    found = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if shutil.which("nvcc"):
        found.append(Path(shutil.which("nvcc")))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in [*sys.path, sysconfig.get_path("purelib")]:  # purelib: an isolated build hides it from sys.path
        found += sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    nvcc = next((path for path in found if path.is_file()), None)
    if nvcc is None and wanted == "1":
        raise SystemExit("LLMFAST_CUDA=1 but no nvcc was found: set CUDA_HOME, or pip install nvidia-cuda-nvcc")
    return nvcc


class Build(build_ext):
    def run(self):
        if not find_nvcc():  # here and not in build_extension: --inplace copies every extension still listed
            self.extensions = [e for e in self.extensions if e.name != "llmfast._cuda"]
        super().run()

    def build_extension(self, ext):
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, ext.name).resolve()
        for path in (out.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        nvcc = find_nvcc()
        include = [f"-I{p}" for p in (HERE / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])]
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", *include]
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        if ARCHS[0].isdigit():  # for GPUs later than all of them, whose driver compiles it
            gencode += [f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}"]
        rules = {
            "cxx": [cxx, "-c", *common, "$flags", "-MMD", "-MF", "$out.d", "$in", "-o", "$out"],
            # line tables are two thirds of a cubin, and compress to a fifth
            "cu": [nvcc, "-c", "-O3", "-std=c++17", *gencode, "-lineinfo", "-Xfatbin=-compress-all",
                   "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{HERE / 'csrc'}", "-MD", "-MF", "$out.d", "$in", "-o",
                   "$out"],
            "link": [cxx, "-shared", *SANITIZE, "$in", "-o", "$out", "-fopenmp"],
            "link_cu": [nvcc, "-shared", "--cudart=static", "$in", "-o", "$out"],
        }  # fmt: skip
        text = ["ninja_required_version = 1.3"]
        for name, command in rules.items():
            text += [f"rule {name}", "  command = " + " ".join(map(str, command)), "  description = $in"]
            text += [] if name.startswith("link") else ["  depfile = $out.d", "  deps = gcc"]
        objects = []
        for source in map(Path, ext.sources):
            objects.append(str(folder / f"{source.stem}{source.suffix}.o"))
            flags = [*KERNEL, *ISAS[source.stem]] if source.stem in ISAS else ["-O2", "-fopenmp"]
            text += [f"build {objects[-1]}: {'cu' if source.suffix == '.cu' else 'cxx'} {HERE / source}"]
            text += [f"  flags = {' '.join([*flags, *SANITIZE])}"]
        text += [f"build {out}: {'link_cu' if ext.name.endswith('_cuda') else 'link'} {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(text))
        subprocess.run([_ninja(), "-C", str(folder), "--quiet"], check=True)


def _ninja():
    if found := shutil.which("ninja"):
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def sources(*patterns):
    return sorted(str(p.relative_to(HERE)) for pattern in patterns for p in HERE.glob(pattern))


if not WANTED or not ISAS.keys() >= set(WANTED):
    raise SystemExit(f"LLMFAST_ISAS: expected some of {' '.join(ISAS)}, got {' '.join(WANTED) or 'none'}")
cpu = [f"csrc/cpu/{name}.cpp" for name in WANTED]
if "-fsanitize=thread" in SANITIZE:
    cpu.append("tests/sanitize/gomp.cpp")  # in place of libgomp, which ThreadSanitizer can't follow
extensions = [Extension("llmfast._cpu", ["csrc/bindings_cpu.cpp", "csrc/cpu/dispatch.cpp", *cpu])]
if cuda := sources("csrc/cuda/*.cu"):
    extensions.append(Extension("llmfast._cuda", ["csrc/bindings_cuda.cpp", *cuda]))
setup(
    packages=["llmfast", "llmfast.backends", "llmfast.kernels", "llmfast.models", "llmfast.text"],
    package_dir={"llmfast.kernels": "kernels"},
    package_data={"llmfast": ["py.typed"]},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
