"""Compiles every Triton kernel for GPUs that need not be there: registers, stack, shared memory and instructions.

The launchers of kernels/ run as they are, on CPU tensors, with a Triton driver that compiles for a chosen GPU and
launches nothing: so what is inspected is what a user's call would compile, specialisation and tile table included.
Needs a process of its own without TRITON_INTERPRET: Triton decides between compiling and interpreting once, at import.

>>> python -m llmfast.inspect_kernels --arch sm_90 --kernel dkdv
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch

from . import inspect_cuda
from .machine_code import SHARED, Compiled, instructions, spilled

ARCHS = tuple(SHARED)
ROWS = ("softmax", "cross_entropy")
OPTIONS = ("causal", "tma", "decode", "everything", *ROWS)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def architecture(name: str) -> str:
    """Any GPU that Triton may know, listed or not."""
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no architecture: sm_90 and gfx942 are")
    return name


@contextmanager
def products(name: str):
    """Inside, PyTorch's switch for float32 products is on where `name`, one of DTYPES, is tf32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def problems(dims=(64, 128), dtypes=("bf16",), options=OPTIONS) -> Iterator[tuple]:
    """(name, run): each run calls the launchers of forward and backward for one problem. options: of attention, and
    the operations on rows, which have no head dim.
    """
    from .kernels import attention, attention_backward, attention_tma, cross_entropy, decode, softmax
    from .spec import (
        NO_CROSS_ENTROPY_EXTRAS,
        NO_EXTRAS,
        NO_SOFTMAX_EXTRAS,
        AttentionSpec,
        CrossEntropyExtras,
        CrossEntropySpec,
        Extras,
        SoftmaxExtras,
        SoftmaxSpec,
    )

    def attend(D, dtype, option):
        q, k, o = (torch.empty(1, h, 256, D, dtype=dtype) for h in (4, 2, 4))
        lse = torch.empty(1, 4, 256)
        spec, extras = AttentionSpec(scale=0.1, right=0), NO_EXTRAS
        if option == "everything":
            spec = spec._replace(softcap=5.0, dropout_p=0.1)
            bias = torch.empty(1, 4, 256, 256, dtype=dtype)
            extras = Extras(
                torch.empty(1, 1, 256, 256, dtype=torch.bool), bias, torch.empty(4), torch.empty(4), torch.tensor(0)
            )
        if option == "wide-bias":
            mask = torch.empty(1, 1, 256, 256, dtype=torch.bool)
            extras = Extras(mask, torch.empty(1, 4, 256, 256, dtype=torch.float32))
            few, lengths = Extras(*(t[:, :, :32] for t in extras[:2])), torch.empty(1, dtype=torch.int32)
            few = few._replace(seqlens_k=lengths)
            decode.forward(q[:, :, :32], k, k, o[:, :, :32], None, spec, few)
        if option == "packed":
            cu_seqlens = torch.empty(3, dtype=torch.int32)
            extras = Extras(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        if option == "decode":
            lengths = torch.empty(1, dtype=torch.int32)
            for pages, queries in ((None, 1), (lengths[:, None], 1), (None, 32)):  # by pages nothing is fetched ahead
                extras = Extras(seqlens_k=lengths, page_table=pages)
                decode.forward(q[:, :, :queries], k, k, o[:, :, :queries], None, spec, extras)
            return
        if option in ("tma", "everything"):  # what there is of everything
            few = spec._replace(dropout_p=0.0), Extras(alibi_slopes=extras.alibi_slopes, sinks=extras.sinks)
            if attention_tma.refuses(q, k, k, *few) is None:
                attention_tma.forward(q, k, k, o, lse, *few)
        if option == "tma":
            return
        attention.forward(q, k, k, o, lse, spec, extras)
        attention_backward.rowdot(o, o, lse)
        attention_backward.backward(o, q, k, k, lse, lse, q, k, k, extras.bias, extras.sinks, spec, extras)

    def soften(N, dtype, extras=NO_SOFTMAX_EXTRAS):
        x = torch.empty(1, 1, 64, N, dtype=dtype)
        y = softmax.forward(x, None, SoftmaxSpec(), extras)
        softmax.backward(y, y, SoftmaxSpec(), extras)

    def classify(T, V, dtype, spec=None, extras=NO_CROSS_ENTROPY_EXTRAS):
        spec = spec or CrossEntropySpec()
        x, target, loss = torch.empty(T, V, dtype=dtype), torch.empty(T, dtype=torch.int64), torch.empty(T)
        cross_entropy.forward(x, target, loss, loss, spec, extras)
        cross_entropy.backward(loss, x, target, loss, x, spec, extras)

    masked = SoftmaxExtras(torch.empty(1, 1, 1, 128, dtype=torch.bool), torch.empty(1, 1, 1, 128))
    everything, weighted = CrossEntropySpec(-100, 0.1, 0.01, 30.0), CrossEntropyExtras(torch.ones(32000))
    for name, dtype in ((n, DTYPES[n]) for n in dtypes):
        for option in (o for o in options if o not in ROWS):
            for D in dims:
                yield f"{name} D={D} {option}", lambda D=D, t=dtype, o=option: attend(D, t, o)
        if "softmax" in options:
            yield f"{name} N=128 everything", lambda t=dtype: soften(128, t, masked)
            for N in (128, 4096, 32768, 100000):
                yield f"{name} N={N}", lambda N=N, t=dtype: soften(N, t)
        if "cross_entropy" in options:
            for T, V in ((4096, 1000), (4096, 151936), (4, 151936)):
                yield f"{name} T={T} V={V}", lambda T=T, V=V, t=dtype: classify(T, V, t)
            yield f"{name} V=32000 everything", lambda t=dtype: classify(4, 32000, t, everything, weighted)


def inspect(archs=ARCHS, kernel: str = "", **choice) -> Iterator[Compiled]:
    """Every kernel that the launchers of `problems(**choice)` would start on these GPUs."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("inspect needs a process without TRITON_INTERPRET: the interpreter compiles nothing")
    for arch in archs:
        driver = driver_for(arch)
        for name, run in problems(**choice):
            driver.forget()
            with products(name.split()[0]):
                run()
            for found in driver.launched:
                if kernel in found[0]:
                    yield read(*found, name, arch)


def driver_for(arch: str) -> "CompileOnly":
    """Makes Triton compile for this GPU from now on, and launch nothing."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd, lanes = arch.startswith("gfx"), 64 if arch.startswith("gfx9") else 32
    driver = CompileOnly(GPUTarget("hip", arch, lanes) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32))
    triton.runtime.driver.set_active(driver)
    return driver


def read(name, binary, metadata, problem, arch) -> Compiled:
    """What there is to know of a kernel that a CompileOnly driver collected."""
    return (_read_amd if arch.startswith("gfx") else _read)(name, binary, metadata, problem, arch)


class CompileOnly:
    """A Triton driver for a GPU that isn't there: collects name, machine code and metadata of what it would launch."""

    devices = count()  # of all drivers in the process: Triton keeps what it compiled by device, not by architecture

    def __init__(self, target):
        self.target, self.device, self.launched = target, next(self.devices), []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**30, "multiprocessor_count": 132},
            load_binary=self._load,
            unload_module=lambda *_: None,
        )

    def forget(self):
        """Starts a new list and a new device."""
        self.device, self.launched = next(self.devices), []

    def launcher_cls(self, source, metadata):
        self.metadata = metadata
        return lambda *_, **__: None

    def _load(self, name, binary, shared, device):
        self.launched.append((name, binary, self.metadata))
        return 0, 0, 0, 0, 1024

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def _read(name, binary, metadata, problem, arch):
    """Registers, spills and instructions from the machine code."""
    import triton

    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = lambda flag: (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
        )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage")).groups())
        code = dump("-sass")
    figures = registers, stack, spilled(code), metadata.shared, metadata.num_warps
    return Compiled(name, problem, arch, *figures, instructions(code))


def _read_amd(name, binary, metadata, problem, arch):
    """The same from the assembly that Triton keeps beside the machine code; the stack is scratch, of each lane."""
    from triton.runtime.cache import get_cache_manager

    text = Path(get_cache_manager(metadata.hash).get_file(f"{name}.amdgcn")).read_text()
    fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"
    registers, stack, spills = (int(re.search(rf"\.{field}:\s+(\d+)", text)[1]) for field in fields)
    names = re.findall(r"^\s+([a-z]+_[a-z]+)", text, re.MULTILINE)
    count = Counter(n.upper() for n in names)
    return Compiled(name, problem, arch, registers, stack, 4 * spills, metadata.shared, metadata.num_warps, count)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmfast inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=architecture, help=f"sm_* or gfx* (default: {' '.join(ARCHS)})")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels, by nvcc, all of them, not Triton's")
    parser.add_argument("--dim", nargs="+", type=int, default=(64, 128), help="head dims")
    parser.add_argument("--dtype", nargs="+", default=("bf16",), choices=list(DTYPES))
    choices = ("causal", "tma", "everything", "wide-bias", "packed", "decode", *ROWS)
    parser.add_argument("--option", nargs="+", default=OPTIONS, choices=choices, help="what to compile")
    parser.add_argument("--json", action="store_true", help="a JSON list a line")
    chosen = parser.parse_args(arguments)
    faults, seen, width, heading = 0, 0, shutil.get_terminal_size().columns, None
    if chosen.cuda:
        if reason := inspect_cuda.cannot(chosen.arch or ()):
            parser.error(reason)
        kernels = inspect_cuda.inspect(chosen.arch or inspect_cuda.ARCHS, chosen.kernel)
    else:
        choice = dict(dims=chosen.dim, dtypes=chosen.dtype, options=chosen.option)
        kernels = inspect(chosen.arch or ARCHS, chosen.kernel, **choice)
    for compiled in kernels:
        if chosen.json:
            print(json.dumps(compiled), flush=True)
        else:
            if heading != (heading := f"{compiled.arch} {compiled.problem}"):
                print(heading)
            print(compiled.lines(width), flush=True)
        faults, seen = faults + len(compiled.faults()), seen + 1
    if not seen:
        parser.error(f"no kernel was compiled whose name holds {chosen.kernel!r}")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
