"""Small faults of the kind a person writes, to be planted one at a time in the kernels: the tests must notice each."""

import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A text of one file that occurs once, what stands there instead, and why that is wrong."""

    path: str
    text: str
    wrong: str
    why: str


SCRATCH_TOO_SMALL = Mutant("csrc/cpu/simd.h", "size = n)", "(size = n) / 2)", "scratch of half the size")
SCRATCH_SHARED = Mutant(
    "csrc/cpu/attention_forward.inl", "static thread_local Scratch", "static Scratch", "threads share one scratch"
)


def plant(mutant, folder):
    """A copy of the tree with the fault in it."""
    for name in ("csrc", "kernels", "llmfast", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    path = folder / mutant.path
    text = path.read_text()
    if text.count(mutant.text) != 1:
        raise ValueError(f"{mutant.path} has {text.count(mutant.text)} times, not once: {mutant.text}")
    path.write_text(text.replace(mutant.text, mutant.wrong))
