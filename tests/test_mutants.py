"""The tests themselves: faults planted in the kernels are noticed. `make mutants` plants every one."""

import random

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.path}: {m.why}")
def test_still_applies(mutant):
    assert mutants.faulty(mutant) != ""


@pytest.mark.long
def test_nine_in_ten_are_noticed():
    """Of a seeded sample, which takes half an hour."""
    cpu = pytest.importorskip("llmfast._cpu", reason="llmfast._cpu is not built")
    planted = random.Random(0).sample(mutants.MUTANTS, 60)
    left = mutants.survivors(planted, cpu.supported().split()[0])
    assert len(left) <= len(planted) // 10, left
