"""Every Triton kernel compiled for each GPU, without one: fits shared memory, uses tensor cores, hardly spills."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jobs
import pytest

from llmfast import inspect_kernels
from llmfast.inspect_kernels import ROWS
from llmfast.machine_code import SHARED, SHOWN, TENSOR_CORE, Compiled

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parent.parent
TMA = {"sm_90": 256, "sm_100": 256, "sm_120": 128}  # the copy engine loads and stores to a head dim of
SHORT = [
    ("sm_80", 128, "bf16", "causal"),
    ("sm_90", 64, "bf16", "everything"),
    ("sm_90", 128, "bf16", "tma"),
    ("sm_90", 128, "bf16", "decode"),
    ("sm_90", 64, "tf32", "causal"),
    ("sm_80", 0, "bf16", "cross_entropy"),
    ("sm_90", 0, "bf16", "softmax"),
    ("gfx942", 128, "bf16", "everything"),
    ("sm_120", 128, "bf16", "wide-bias"),
]
LONG = [
    (a, d, t, o)
    for a in SHARED
    for t in ("bf16", "fp32")
    for o in ("causal", "decode", "packed", "everything", *ROWS)
    for d in ((0,) if o in ROWS else (64, 128, 256))
]
LONG += [(a, d, "bf16", "wide-bias") for a in SHARED for d in (64, 128, 256)]
LONG += [(a, d, "bf16", "tma") for a, widest in TMA.items() for d in (64, 128, 256) if d <= widest]
LONG += [(a, 128, "fp16", "causal") for a in SHARED] + [("sm_90", 128, "fp16", "tma")]  # the tiles are those of bf16
for arch in SHARED:
    LONG += [(arch, d, "tf32", "causal") for d in (64, 128, 256)]
    LONG += [(arch, 128, "tf32", "decode"), (arch, 64, "tf32", "everything")]
    LONG += [(arch, 512, t, o) for t in ("bf16", "fp32") for o in ("causal", "decode")]
    LONG += [(arch, 512, "bf16", "everything")]
# GPUs that have no rows of their own
LONG += [(a, 128, "bf16", "wide-bias") for a in ("sm_86", "sm_89", "sm_103", "gfx90a", "gfx1201")]
LONG += [("gfx90a", 64, "tf32", "causal")]
OLDER = [
    ("sm_80", 128, "bf16", "packed"),
    ("sm_90", 64, "bf16", "causal"),
    ("sm_90", 128, "bf16", "everything"),
    ("sm_90", 128, "bf16", "decode"),
    ("sm_90", 256, "bf16", "causal"),
    *((a, 128, "bf16", "tma") for a in TMA),
    ("sm_80", 128, "tf32", "causal"),
    ("sm_90", 512, "bf16", "causal"),
    ("sm_100", 128, "bf16", "causal"),
    ("sm_120", 64, "bf16", "causal"),
    ("sm_90", 0, "bf16", "softmax"),
    ("sm_90", 0, "bf16", "cross_entropy"),
]
# bytes a thread; dk and dv of 128 columns and the scores of two products are live at once
SPILLS = {"attention_bwd_dkdv": 192, "attention_bwd_dq": 64}
WITH_OPTIONS = 1024  # all options at once, or float32 at a head dim of 256: right, but not what tiles are chosen for


@cache
def compiled(arch, D, dtype, option, folder=None):
    """In a process of its own: Triton compiles or interprets, decided at import. folder: of another Triton."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    if folder:
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "llmfast.inspect_kernels", "--json"]
    done = subprocess.run(
        [*command, "--arch", arch, "--dim", str(D), "--dtype", dtype, "--option", option],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    assert "Error" not in done.stderr, done.stderr[-3000:]
    return [Compiled(*fields[:-1], Counter(fields[-1])) for fields in map(json.loads, done.stdout.splitlines())]


def check(found, arch, D, dtype, option):
    assert any(c.kernel.startswith((option,) if option in ROWS else TENSOR_CORE) for c in found)
    if option == "tma" or (option == "everything" and dtype == "bf16" and TMA.get(arch, 0) >= D):
        assert any(c.kernel == "attention_fwd_tma" for c in found)
    for c in found:
        assert c.faults() == [], str(c)
        hard = option in ("everything", "wide-bias") or (dtype == "fp32" and D == 256)
        bound = WITH_OPTIONS if hard else SPILLS.get(c.kernel, 16)
        # by 256 columns at a time, or in gfx942's tiles with half its registers: slow, and it fits
        assert max(c.stack, c.spills) <= bound or D > 256 or arch == "gfx1201", str(c)
        if c.kernel == "attention_fwd_tma":
            assert c.instructions["UTMALDG"] >= 5, str(c)  # the copy engine: q, and k and v of two loops
            assert c.instructions["UTMASTG"], str(c)
            assert c.instructions["LDGSTS"] == 0 or option == "everything", str(c)  # sm_100 takes the slope ahead so
        if dtype == "fp32" and not arch.startswith("gfx"):  # ieee: NVIDIA's round it to tf32, AMD's take it whole
            assert not any("MMA" in name for name in c.instructions), str(c)


def rows():
    for row in dict.fromkeys([*SHORT, *LONG]):
        job = jobs.job(compiled, *row)
        yield pytest.param(*row, marks=[job] if row in SHORT else [job, pytest.mark.long])


@pytest.mark.parametrize(("arch", "D", "dtype", "option"), list(rows()))
def test_compiles_well(arch, D, dtype, option):
    check(jobs.result(compiled, arch, D, dtype, option), arch, D, dtype, option)


@cache
def triton_36():
    """A folder that holds Triton 3.6.0, and a numpy of its time."""
    folder = ROOT / "build" / "triton_36"
    if not list(folder.glob("triton-3.6.0.dist-info")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, "triton==3.6.0", "numpy==2.3.5"], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"triton 3.6.0 was not found: {done.stderr.strip().splitlines()[-1]}")
    asked = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(asked, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert found.stdout == "3.6.0\n", found.stderr[-3000:]
    return folder


@cache
def compiled_by_36(arch, D, dtype, option):
    return compiled(arch, D, dtype, option, triton_36())


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "D", "dtype", "option"),
    [pytest.param(*row, marks=jobs.job(compiled_by_36, *row)) for row in OLDER],
)
def test_compiles_well_with_triton_36(arch, D, dtype, option):
    check(jobs.result(compiled_by_36, arch, D, dtype, option), arch, D, dtype, option)


def test_several_architectures_in_one_process():
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from llmfast import inspect_kernels
from llmfast.kernels import softmax
from llmfast.spec import NO_SOFTMAX_EXTRAS, SoftmaxSpec

for arch in (80, 90):
    driver = inspect_kernels.CompileOnly(GPUTarget("cuda", arch, 32))
    triton.runtime.driver.set_active(driver)
    driver.forget()
    softmax.forward(torch.empty(1, 1, 4, 64), None, SoftmaxSpec(), NO_SOFTMAX_EXTRAS)
    print(*(name for name, *_ in driver.launched))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split() == ["softmax_fwd", "softmax_fwd"], done.stdout + done.stderr[-3000:]


def test_faults_are_told():
    good = Compiled("attention_fwd", "bf16 D=64 causal", "sm_90", 168, 0, 0, 65536, 4, Counter(HGMMA=16))
    assert good.faults() == []
    assert good._replace(shared=240000).faults() == ["240000 bytes of shared memory, sm_90 has 232448"]
    assert good._replace(instructions=Counter(FFMA=9)).faults() == ["no HGMMA"]
    older = good._replace(instructions=Counter(HMMA=16))  # a fifth of the speed
    assert older.faults() == ["no HGMMA"]
    assert older._replace(kernel="attention_bwd_dbias").faults() == ["no HGMMA"]
    assert older._replace(kernel="attention_decode").faults() == []
    assert older._replace(kernel="attention_bwd_dkdv", problem="bf16 D=256 causal").faults() == []
    assert older._replace(kernel="attention_bwd_dkdv").faults() == ["no HGMMA"]
    assert older._replace(arch="sm_89").faults() == []
    assert good._replace(problem="fp32 D=64 causal", instructions=Counter(FFMA=9)).faults() == []


def test_figures_at_any_width():
    """Nothing is cut or runs into the next line; where the terminal is wide enough each kernel has one line."""
    mix = Counter({name: 1000 + i for i, name in enumerate(SHOWN)})
    c = Compiled("attention_decode_merge", "fp16 D=256 everything", "sm_100", 255, 12345, 23, 232449, 32, mix)
    narrow = c.lines(80)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert c.lines(10**6).split() == narrow.split()
    for figure in ("attention_decode_merge 32 warps 255 registers 12345 B stack 232449 B shared", *c.faults()):
        assert figure in " ".join(narrow.split())
    for name, n in mix.items():
        assert f"{name}:{n}" in narrow.split()
    plain = c._replace(shared=0, instructions=Counter(HGMMA=16, UTMALDG=9))
    assert len(plain.lines(120).splitlines()) == 1
    assert len(plain.lines(80).splitlines()) == 2


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="compiles nothing"):
        next(inspect_kernels.inspect())


def test_new_lengths_and_windows_compile_nothing():
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from llmfast import inspect_kernels
from llmfast.kernels import attention, attention_backward, attention_tma, decode
from llmfast.spec import NO_EXTRAS, AttentionSpec, Extras

driver = inspect_kernels.CompileOnly(GPUTarget("cuda", 90, 32))
triton.runtime.driver.set_active(driver)
rand = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16)

def both(q, lse, spec, extras):
    attention.forward(q, q, q, q, lse, spec, extras)
    attention_backward.backward(q, q, q, q, lse, lse, q, q, q, None, None, spec, extras)

def told():
    print(*(name for name, *_ in driver.launched))
    driver.launched = []

windows = ((64, 2**30, 0), (1, 1, 16), (65, 16, -1), (4096, 0, 1))
for N, left, right in windows:
    q, lse = rand(2, 2, N, 64), torch.empty(2, 2, N)
    attention_tma.forward(q, q, q, q, lse, AttentionSpec(0.1, left, right), NO_EXTRAS)
    both(q, lse, AttentionSpec(0.1, left, right), NO_EXTRAS)
told()
for (N, left, right), sequences in zip(windows, (2, 1, 17, 4)):
    cu = torch.empty(sequences + 1, dtype=torch.int32)
    packed = Extras(cu_seqlens_q=cu, cu_seqlens_k=cu)
    both(rand(1, 2, N, 64), torch.empty(1, 2, N), AttentionSpec(0.1, left, right), packed)
told()
for N in (16, 32, 1040):  # rows of whole vectors; others compile once more
    q, mask = rand(2, 2, N, 64), torch.empty(1, 1, N, N, dtype=torch.bool)
    both(q, torch.empty(2, 2, N), AttentionSpec(0.1), Extras(mask, rand(1, 2, N, N)))
told()
lengths, q = torch.empty(2, dtype=torch.int32), rand(2, 2, 1, 64)
for M, left, right in windows:
    k, spec = rand(2, 2, M, 64), AttentionSpec(0.1, left, right)
    decode.forward(q, k, k, q, None, spec, Extras(seqlens_k=lengths))
told()
for page, pages in ((64, 1), (16, 16), (1, 33), (7, 8)):
    k, table = rand(9, 2, page, 64), torch.empty(2, pages, dtype=torch.int32)
    decode.forward(q, k, k, q, None, AttentionSpec(0.1), Extras(seqlens_k=lengths, page_table=table))
told()
"""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    each = "attention_fwd attention_bwd_dkdv attention_bwd_dq"
    assert done.stdout.splitlines() == [
        f"attention_fwd_tma {each}", each, each, "attention_decode attention_decode_merge", "attention_decode",
    ], done.stdout + done.stderr[-3000:]  # fmt: skip


def test_a_name_that_no_kernel_bears_is_an_error(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(inspect_kernels, "inspect", lambda *_, **choice: chosen.append(choice) or iter(()))
    with pytest.raises(SystemExit) as left:
        inspect_kernels.main(["--kernel", "decoed"])
    assert left.value.code == 2
    assert "no kernel was compiled whose name holds 'decoed'" in capsys.readouterr().err
    assert {"decode", "everything"} <= set(chosen[0]["options"])
