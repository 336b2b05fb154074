"""python tests/cuda_model/conformance.py: every PTX wrapper on this machine's GPU against the host model, bit for bit.

Needs nvcc, g++ and a GPU; no network, no torch. Prints one line a probe; exit status 1 where the model and the
GPU disagree.
"""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_model"


def model():
    """The probes on the host model: {name: (comparison, words)}."""
    target = _newer("conformance_model", [HERE / "conformance.cu", HERE / "device.cpp"])
    if target[1]:
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            f"-I{ROOT / 'csrc'}",
            f"-I{HERE}",
        ]
        command += ["-Wno-unknown-pragmas", "-x", "c++", HERE / "conformance.cu", HERE / "device.cpp", "-o", target[0]]
        subprocess.run(command, check=True)
    return read(subprocess.run([target[0]], capture_output=True, text=True, check=True).stdout)


def compile_for_gpu(nvcc):
    """Machine code for the GPUs the extension is built for, and PTX for the others."""
    target = _newer("conformance", [HERE / "conformance.cu"])
    if target[1]:
        kinds = ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_80,code=compute_80"]
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            *(f"-gencode=arch={k}" for k in kinds),
            "--cudart=static",
            f"-I{ROOT / 'csrc'}",
        ]
        subprocess.run([*command, HERE / "conformance.cu", "-o", target[0]], check=True)
    return target[0]


def _newer(name, sources):
    """The program's path, and whether it must be built."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*sources, HERE / "device.h", ROOT / "csrc/cuda/ptx.cuh"]
    target = BUILD / name
    return target, not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in sources)


def read(text):
    lines = (line.split() for line in text.splitlines())
    return {name: (how, [int(w, 16) for w in words]) for name, how, *words in lines}


def differences(want, got):
    """Where two runs differ: one sentence for each probe that does."""
    for name, (how, words) in want.items():
        if got.get(name) == ("absent", []):  # before sm_90 there are no clusters
            continue
        if name not in got or len(got[name][1]) != len(words):
            yield f"{name}: missing"
            continue
        pairs = list(zip(words, got[name][1], strict=True))
        wrong = [i for i, (a, b) in enumerate(pairs) if a != b and not (how == "close" and _close(a, b))]
        if wrong:
            i = wrong[0]
            count = f"{len(wrong)} of {len(words)} words differ"
            yield f"{name}: {count}, first word {i}: model {words[i]:08x}, GPU {pairs[i][1]:08x}"


def _close(a, b):
    """float32 within 4 units in the last place of 1 or of the larger number."""
    x, y = (struct.unpack("f", struct.pack("I", w))[0] for w in (a, b))
    return abs(x - y) <= 4 * 2.0**-23 * max(abs(x), abs(y), 1.0 if max(abs(x), abs(y)) > 0.01 else 0.0)


def main():
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        sys.exit("nvcc was not found: nothing to compare with")
    want = model()
    done = subprocess.run([compile_for_gpu(nvcc)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    got = read(done.stdout)
    found = list(differences(want, got))
    for name, (how, words) in want.items():
        wrong = any(line.startswith(f"{name}:") for line in found)
        said = "DIFFERS" if wrong else "absent" if got[name][0] == "absent" else "agrees"
        print(f"{name:20s} {how:5s} {len(words):6d} words  {said}")
    print("\n".join(found) if found else f"all {len(want)} probes agree")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
