"""The tiles of the two products stay in registers: no innermost loop of multiply-adds touches the stack."""

import re
import shutil
import subprocess

import pytest

from llmfast.backends import cpu

FUSED = re.compile(r"v(fn?madd|dpbf16)")
VECTOR_ON_STACK = re.compile(r"\((%rsp|%rbp)[,)].*%[xyz]mm|%[xyz]mm.*\((%rsp|%rbp)[,)]")


def innermost_loops(assembly):
    """(function, its lines) of each loop that holds no other."""
    function, lines, loops = None, [], []
    for line in assembly.splitlines():
        if header := re.match(r"[0-9a-f]+ <(\S+)>:", line):
            function, lines, last = header[1], [], -1
        elif code := re.match(r" +([0-9a-f]+):\t(.*)", line):
            address = int(code[1], 16)
            lines.append((address, code[2]))
            jump = re.match(r"j\w+ +([0-9a-f]+) ", code[2])
            if jump and lines[0][0] <= int(jump[1], 16) <= address and int(jump[1], 16) > last:
                last = address
                loops.append((function, [text for at, text in lines if at >= int(jump[1], 16)]))
    return loops


@pytest.fixture(scope="module")
def assembly():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump was not found (binutils): what the compiler spills")
    run = [objdump, "-d", "--no-show-raw-insn", cpu._cpu.__file__]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.long
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16"])
def test_no_tile_is_spilled(assembly, isa):
    prefix = f"3cpu{len(isa)}{isa}"
    if prefix not in assembly:
        pytest.skip(f"{isa} was not built")
    tiles = [
        lines
        for function, lines in innermost_loops(assembly)
        if prefix + "13attention_fwd6attend" in function and sum(bool(FUSED.match(text)) for text in lines) >= 24
    ]  # 12 accumulators twice
    assert len(tiles) >= 8  # scores and p v of four dtypes
    assert [text for lines in tiles for text in lines if VECTOR_ON_STACK.search(text)] == []
