"""The CPU kernels cross-compiled for aarch64, by the ninja file that setup.py writes there, and run under qemu.

`Library` stands in for llmfast._cpu: a test puts it in place of the cpu backend's `_cpu`, and every call goes to one
child process (driver.cpp).
"""

import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from cuda_model import ninja

from llmfast import ops

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "neon"
CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int32, torch.int64]
SETUP = """
import platform, runpy, subprocess
platform.machine = lambda: "aarch64"
subprocess.run = lambda *_, **__: None  # the ninja file is written, not run
runpy.run_path("setup.py", run_name="__main__")
"""


def lacking():
    """What this machine has not got, in a sentence; None where it has all."""
    for program, package in ((CXX, "g++-aarch64-linux-gnu"), (QEMU, "qemu-user")):
        if shutil.which(program) is None:
            return f"{program} was not found (package {package}): the NEON kernels run nowhere here"
    return None


@cache
def folder(level):
    """Where setup.py puts llmfast._cpu's ninja file on an aarch64 machine; -O as `level` says, warnings are errors."""
    build = BUILD / level
    env = {n: v for n, v in os.environ.items() if n not in ("LLMFAST_ISAS", "LLMFAST_SANITIZE")}
    env |= {"CXX": f"{CXX} -Werror", "LLMFAST_CUDA": "0"}
    command = [sys.executable, "-c", SETUP, "-q", "build_ext", "--build-temp", build, "--build-lib", build]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    file = build / "llmfast._cpu" / "build.ninja"
    file.write_text(file.read_text().replace(" -O3 ", f" -{level} "))
    return file.parent


@cache
def compiled(level, *targets):
    """Objects of the extension, or with no target the whole of it; fails with the compiler's words."""
    done = subprocess.run([ninja(), "-C", folder(level), "--quiet", *targets], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [folder(level) / target for target in targets]


@cache
def driver(level):
    """driver.cpp and the kernels in one static program."""
    objects = compiled(level, *(str(folder(level) / f"{name}.cpp.o") for name in ("neon", "dispatch")))
    program = BUILD / level / "driver"
    command = [CXX, "-static", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", HERE / "driver.cpp"]
    subprocess.run([*command, *objects, "-fopenmp", "-o", program], check=True)
    return program


def _bytes(t):
    """The memory of a tensor from its first element to its last."""
    if t.numel() == 0:
        return t.new_empty(0)
    return t.as_strided((1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)),), (1,))


class Library:
    """llmfast._cpu's functions; a call that dies, or steps beyond a tensor's end, raises."""

    def __init__(self, level):
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self.child = subprocess.Popen([QEMU, driver(level)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.names = self.child.stdout.readline().decode().strip()

    def call(self, name, tensors, numbers=()):
        to, header = self.child.stdin, (len(name), len(numbers), len(tensors), torch.get_num_threads())
        parts = [struct.pack("4i", *header), name.encode(), struct.pack(f"{len(numbers)}d", *numbers)]
        spans = [None if t is None else _bytes(t.detach()) for t in tensors]
        for t, span in zip(tensors, spans, strict=True):
            if t is None:
                parts.append(bytes(16 + 9 * 8))
                continue
            size, stride = list(t.shape), [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
            four = lambda x: x + [0] * (4 - len(x))
            count = span.numel() * span.element_size()
            parts += [struct.pack("4i9q", 1, DTYPES.index(t.dtype), t.dim(), 0, *four(size), *four(stride), count)]
            parts += [span.contiguous().view(torch.uint8).numpy().tobytes()]
        try:
            to.write(b"".join(parts)), to.flush()
            for span in spans:
                if span is not None and span.numel():
                    got = self.child.stdout.read(span.numel() * span.element_size())
                    span.copy_(torch.frombuffer(bytearray(got), dtype=span.dtype))
        except (BrokenPipeError, ValueError, RuntimeError):
            raise RuntimeError(f"{name} ended its process: {self.child.wait()}") from None

    def supported(self):
        return self.names

    isa = supported

    def huge_pages(self, t):
        pass

    def _attention(self, name, q, k, v, spec, extras, need_lse):
        q, k, v = map(_rows, (q, k, v))
        o, lse = ops.like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=ops.lse_dtype(q)) if need_lse else None
        self.call(name, [q, k, v, o, lse, *extras], spec)
        return o, lse

    def attention_forward(self, *given):
        return self._attention("attention_forward", *given)

    def attention_decode(self, *given):
        return self._attention("attention_decode", *given)

    def attention_backward(self, do, q, k, v, o, lse, delta, dbias, dsinks, spec, extras):
        do, q, k, v, o = map(_rows, (do, q, k, v, o))
        if delta is None:
            self.rowdot(o, do, delta := torch.empty_like(lse))
        grads = [torch.empty_like(t) for t in (q, k, v)]
        self.call("attention_backward", [do, q, k, v, o, lse, delta, *grads, dbias, dsinks, *extras], spec)
        return grads

    def rowdot(self, *tensors):
        self.call("rowdot", tensors)

    def softmax_forward(self, x, y, mask, bias, *numbers):
        self.call("softmax_forward", [x, y, mask, bias], numbers)

    def softmax_backward(self, dy, y, dx, dbias, *numbers):
        self.call("softmax_backward", [dy, y, dx, dbias], numbers)

    def cross_entropy_forward(self, x, target, loss, lse, weight, *numbers):
        self.call("cross_entropy_forward", [x, target, weight, loss, lse], numbers)

    def cross_entropy_backward(self, dloss, x, target, lse, dx, weight, *numbers):
        self.call("cross_entropy_backward", [dloss, x, target, weight, lse, dx], numbers)

    def linear(self, *tensors):
        self.call("linear", tensors)


def _rows(t):
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 or t.numel() == 0 else t.contiguous()
