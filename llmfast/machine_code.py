"""What a compiled kernel shows without a GPU: registers, spills, shared memory, instructions; limits of the GPUs."""

import re
import textwrap
from collections import Counter
from typing import NamedTuple

# bytes of shared memory that a block may have, the tensor-core instruction
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "V_MFMA"}
ALIKE = {"sm_86": "sm_120", "sm_87": "sm_80", "sm_89": "sm_120", "sm_103": "sm_100"}  # in both respects
SHOWN = (*dict.fromkeys(MMA.values()), "LDGSTS", "UTMALDG", "UTMASTG", "LDSM", "MUFU", "FFMA", "LDL", "STL")
TENSOR_CORE = tuple(f"attention_{name}" for name in ("decode", "fwd", "fwd_tma", "bwd_dkdv", "bwd_dq", "bwd_dbias"))


def listed(arch: str) -> str:
    """The GPU of the lists above whose limits hold for this one; of an unknown one, the narrowest of its maker's."""
    return arch if arch in SHARED else ALIKE.get(arch, "gfx942" if arch.startswith("gfx") else "sm_120")


class Compiled(NamedTuple):
    """One kernel for one GPU. stack: bytes of local memory a thread has; spills: those of them that hold registers."""

    kernel: str
    problem: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    instructions: Counter

    def faults(self) -> list[str]:
        """Why a launch would fail or waste the tensor cores."""
        found = []
        if self.shared > (limit := SHARED[listed(self.arch)]):
            found.append(f"{self.shared} bytes of shared memory, {self.arch} has {limit}")
        if (
            self.kernel in TENSOR_CORE
            and "fp32" not in self.problem
            and not any(self.instructions[i] for i in self._tensor_core())
        ):
            found.append(f"no {MMA[listed(self.arch)]}")
        return found

    def _tensor_core(self):
        """Instructions that would do: HMMA too where a product has less than the 64 rows of Hopper's and later, and in
        the CUDA kernels, which multiply by mma.sync on every GPU.
        """
        D = int((re.search(r"D=(\d+)", self.problem) or [0, 0])[1])
        few = self.kernel == "attention_decode" or (self.kernel == "attention_bwd_dkdv" and D > 128)  # 32 keys
        few |= self.problem.startswith(self.kernel)  # a CUDA kernel's own name and template arguments
        return MMA[listed(self.arch)], *(["HMMA"] if few else []), *(["V_WMMA"] if self.arch.startswith("gfx1") else [])

    def __str__(self) -> str:
        return f"{self.arch} {self.problem}\n{self.lines(10**6)}"

    def lines(self, width: int) -> str:
        """The figures, and what instructions there are behind them or, where the width ends, below; faults last."""
        figures = (
            f"  {self.kernel:22s} {self.warps:2d} warps {self.registers:3d} registers "
            f"{self.stack:5d} B stack {self.shared:6d} B shared"
        )
        mix = [f"{name}:{self.instructions[name]}" for name in SHOWN if self.instructions[name]]
        mix = " ".join([*mix, *([f"spilled:{self.spills}B"] if self.spills else [])])
        whole = dict(break_long_words=False, break_on_hyphens=False)
        below = textwrap.TextWrapper(width, initial_indent=" " * 4, subsequent_indent=" " * 4, **whole).wrap
        rows = [f"{figures}  {mix}"] if len(figures) + 2 + len(mix) <= width else [figures, *below(mix)]
        return "\n".join([*(row.rstrip() for row in rows), *below("; ".join(self.faults()))])


def spilled(text: str) -> int:
    """Bytes of the stack that a disassembly stores registers to: R1 points at it."""
    stores = re.findall(r"\bSTL(\.U?\d+)?\S* \[R1(?:\+(0x[0-9a-f]+))?\]", text)
    sizes = {".64": 8, ".128": 16}
    return len({int(at or "0", 16) + i for wide, at in stores for i in range(sizes.get(wide, 4))})


def instructions(text: str) -> Counter:
    """How often each instruction stands in a disassembly."""
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text))
