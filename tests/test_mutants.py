"""The tests themselves: faults planted in the kernels are noticed."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.path}: {m.why}")
def test_still_applies(mutant):
    assert mutants.faulty(mutant) != ""


@pytest.mark.long
def test_nine_in_ten_are_noticed():
    cpu = pytest.importorskip("llmfast._cpu", reason="llmfast._cpu is not built")
    left = mutants.survivors(mutants.MUTANTS, cpu.supported().split()[0])
    assert len(left) <= len(mutants.MUTANTS) // 10, left
