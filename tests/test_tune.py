"""`llmfast tune` without a GPU: the interpreter in its place and a clock that is told what to say."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jobs
import pytest
import torch
from test_attention import device_of, triton_or_skip

from llmfast import tune
from llmfast.backends import triton as backend
from llmfast.tune import KERNELS, Measured, best, main, measure, read_table, write_table

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parent.parent
ROW = ("sm_90", "fwd", 128, "bfloat16"), (128, 64, 8, 3)


def test_a_table_comes_back(tmp_path):
    table = dict(
        [ROW, (("gfx942", "decode", 64, "float32"), (32, 4, 2)), (("sm_90", "dq", 64, "tf32"), (64, 64, 8, 2))]
    )
    write_table(tmp_path / "new" / "tiles.json", table, gpu="a GPU")
    assert read_table(tmp_path / "new" / "tiles.json") == table
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiles.json"]
    write_table(tmp_path / "empty", {})
    assert read_table(tmp_path / "empty") == {}


def row(*fields):
    return json.dumps({"tiles": [list(fields)]})


HOSTILE = {
    "empty": "",
    "cut": row(*ROW[0], ROW[1])[:-3],
    "binary": b"\xff\xfe\x00\x80",
    "deep": "[" * 100_000,
    "large": row(*ROW[0], ROW[1]) + " " * 2**20,
    "no tiles": "{}",
    "a list": "[]",
    "a number for a row": '{"tiles": [3]}',
    "a number for a tile": row(*ROW[0], 3),
    "another kernel": row("sm_90", "rm -rf", 128, "bfloat16", [128, 64, 8, 3]),
    "a list for a kernel": row("sm_90", [], 128, "bfloat16", [128, 64, 8, 3]),
    "another size": row("sm_90", "fwd", 100, "bfloat16", [128, 64, 8, 3]),
    "another dtype": row("sm_90", "fwd_tma", 128, "float32", [128, 64, 8, 3, 1]),
    "tf32 of a softmax": row("sm_90", "softmax_fwd", 4096, "tf32", [1, 4096, 8]),
    "no architecture": row(90, "fwd", 128, "bfloat16", [128, 64, 8, 3]),
    "a tile never tried": row(*ROW[0], [100_000_000, 64, 8, 3]),
    "a negative tile": row(*ROW[0], [128, -64, 8, 3]),
    "a tile of another kernel": row(*ROW[0], [128, 64, 8, 3, 1]),
    "floats": row(*ROW[0], [128.0, 64, 8, 3]),
    "words": row(*ROW[0], ["128", 64, 8, 3]),
    "bools": row("sm_90", "softmax_fwd", 4096, "bfloat16", [True, 4096, 8]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_table_is_one_warning(name, tmp_path, monkeypatch):
    from llmfast.kernels import attention

    monkeypatch.setattr(attention, "TUNED", {})
    text = HOSTILE[name]
    (tmp_path / "tiles.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("LLMFAST_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"1 MiB|no JSON|not a tile"):
        read_table(tmp_path / "tiles.json")
    with pytest.warns(UserWarning, match="the built-in tiles serve") as said:
        assert backend._read_tiles() is None
    assert len(said) == 1
    assert attention.TUNED == {}


def test_the_backend_reads_the_table(tmp_path, monkeypatch):
    from llmfast.kernels import attention, attention_tma

    monkeypatch.delenv("LLMFAST_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attention, "TUNED", {})
    assert backend._read_tiles() is None  # no table is no fault
    tma = ("sm_90", "fwd_tma", 64, "bfloat16"), (64, 128, 4, 3, 2)
    write_table(tmp_path / "llmfast" / "tiles.json", dict([ROW, tma]))
    assert backend._read_tiles() == str(tmp_path / "llmfast" / "tiles.json")
    for kernels in (attention, attention_tma):
        monkeypatch.setattr(kernels, "target", lambda: "sm_90")
    assert attention.tile("fwd", 128, torch.bfloat16) == attention.tile("fwd", 96, torch.bfloat16) == ROW[1]
    assert attention_tma.tile(64, torch.bfloat16) == tma[1]
    for other in (("dq", 128, torch.bfloat16), ("fwd", 64, torch.bfloat16), ("fwd", 128, torch.float16)):
        found = attention.tile(*other)
        monkeypatch.setattr(attention, "TUNED", {})
        assert found == attention.tile(*other)
        assert backend._read_tiles()
    (tmp_path / "llmfast" / "tiles.json").unlink()
    (tmp_path / "llmfast" / "tiles.json").mkdir()
    assert backend._read_tiles() is None


TRIED = {
    "fwd": (64, (128, 32, 8, 2)),
    "fwd_tma": (64, (128, 32, 8, 2, 1)),
    "dkdv": (64, (32, 64, 4, 1)),
    "dq": (64, (128, 32, 8, 2)),
    "decode": (64, (128, 4, 2)),
    "softmax_fwd": (64, (32, 64, 2)),
    "softmax_bwd": (64, (32, 64, 2)),
    "cross_entropy": (64, (32, 64, 1)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_measured(name, monkeypatch):
    """With the tile that is tried: right, and in turns."""
    from llmfast.kernels import attention, attention_tma

    monkeypatch.setattr(attention, "TUNED", {})
    monkeypatch.setitem(attention_tma.TILES, "interpreter", {256: (64, 64, 4, 1, 1)})
    size, tile = TRIED[name]
    dtype = "bf16" if name == "fwd_tma" else "fp32"
    assert tile in KERNELS[name].candidates(size)
    turns, tiles = [], []
    module = import_module(f"llmfast.kernels.{OWNER.get(name, 'attention')}")
    found_tile = module.tile
    monkeypatch.setattr(module, "tile", lambda *a: tiles.append(found_tile(*a)) or tiles[-1])

    def clock(run):
        turns.append(list(attention.TUNED.values()))
        return 2.0 if attention.TUNED else 3.0

    triton_or_skip()
    args = name, size, dtype, [None, tile], clock
    found = measure(*args, device=device_of("triton"), rounds=3, small=True)
    assert turns == [[], [tile]] * 3
    assert attention.TUNED == {}
    assert [(m.tile, m.median, m.spread, m.wrong) for m in found] == [(None, 3.0, 0.0, []), (tile, 2.0, 0.0, [])]
    assert all(0 < m.error < 0.01 for m in found)
    assert len({t[: len(tile)] for t in tiles}) > 1  # the launcher was given another one
    assert best(found) == tile


OWNER = {"fwd_tma": "attention_tma", "dkdv": "attention_backward", "dq": "attention_backward", "decode": "decode",
         "softmax_fwd": "softmax", "softmax_bwd": "softmax", "cross_entropy": "cross_entropy"}  # fmt: skip


def test_the_best_is_right_and_faster_than_chance():
    built_in, fast = Measured(None, 2.0, 0.02, 1e-3, []), Measured((1,), 1.5, 0.02, 1e-3, [])
    assert best([built_in, fast, fast._replace(tile=(2,), median=1.0, wrong=["o is wrong"])]) == (1,)
    assert best([built_in, fast._replace(median=1.97)]) is None
    assert best([built_in, fast._replace(spread=0.3)]) is None
    assert best([built_in._replace(wrong=["o is wrong"]), fast._replace(median=5.0)]) == (1,)


def test_a_wrong_result_is_told(monkeypatch):
    sound = tune.problem

    def spoiled(*args):
        found = sound(*args)
        return found._replace(results=lambda: {n: t + 0.1 for n, t in found.results().items()})

    monkeypatch.setattr(tune, "problem", spoiled)
    triton_or_skip()
    found = measure("softmax_fwd", 64, "fp32", [None], lambda run: 1.0, device_of("triton"), 2, small=True)
    assert "y max error" in found[0].wrong[0]


def test_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--dry-run"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llmfast tune: there is no GPU")
    assert len(err.splitlines()) == 1


def test_a_bad_table_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "_cannot", lambda dry_run: None)
    (tmp_path / "tiles.json").write_text(HOSTILE["cut"])
    assert main(["--out", str(tmp_path / "tiles.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is not a table of llmfast tune: no JSON" in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "tiles.json").read_text() == HOSTILE["cut"]


@cache
def listed(*arguments):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "llmfast", "tune", "--dry-run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WIDE = ("--arch", "sm_120", "--kernel", "fwd_tma", "--size", "128", "--json")
SHORT = ("--arch", "sm_90", "--kernel", "softmax_fwd", "--size", "65536")


@pytest.mark.parametrize("arguments", [pytest.param(SHORT, marks=jobs.job(listed, *SHORT))])
def test_lists_candidates_without_a_gpu(arguments):
    heading, *lines = jobs.result(listed, *arguments).splitlines()
    assert heading == "softmax_fwd 65536 bf16 sm_90"
    tiles = [None, *KERNELS["softmax_fwd"].candidates(65536)]
    names = ["built in" if t is None else "x".join(map(str, t)) for t in tiles]
    assert [line[2:19].strip() for line in lines] == names
    assert all(len(line) <= 80 and " registers " in line for line in lines)
    assert lines[0].endswith("shared")  # what is built in is no candidate to be refused


OPTIONS_DO_NOT_FIT = """
from llmfast import tune
kernel = tune.KERNELS["fwd"]
tune.KERNELS["fwd"] = kernel._replace(candidates=lambda D: [(128, 64, 8, 3)])
print(*(f.why_not for f in tune.figures("sm_89", "fwd", 128, "bf16")), sep="\\n")
"""


@cache
def told(code):
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("code", [pytest.param(OPTIONS_DO_NOT_FIT, marks=jobs.job(told, OPTIONS_DO_NOT_FIT), id="fwd")])
def test_a_tile_must_fit_with_every_option(code):
    """96 KiB without a mask and a bias, of 99; on a GPU that has no list of its own."""
    done = jobs.result(told, code)
    assert done.stdout.splitlines() == ["None", "over 101376 B with a mask or bias: 163840"], done.stderr[-3000:]


def test_any_architecture_is_taken_and_the_built_in_tile_stays(tmp_path, monkeypatch):
    from llmfast.kernels import attention

    monkeypatch.setattr(tune, "_cannot", lambda dry_run: None)
    for arch in ("sm_86", "sm_89", "sm_103", "gfx90a"):
        seen = []
        monkeypatch.setattr(attention, "target", lambda arch=arch: arch)
        monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda: "a GPU")
        over = tune.Figures("fwd", 64, "bf16", None, 255, 0, 10**6, "over 101376 B")
        monkeypatch.setattr(tune, "compiled_elsewhere", lambda *a, f=over: [f, f._replace(tile=[64, 32, 4, 2])])
        monkeypatch.setattr(tune, "measure", lambda *a, s=seen: s.append(a[3]) or [Measured(None, 1.0, 0.0, 0.0, [])])
        assert main(["--kernel", "fwd", "--size", "64", "--out", str(tmp_path / arch)]) == 0
        assert seen == [[None]]
        assert tune.architecture(arch) == arch
    with pytest.raises(SystemExit):
        main(["--dry-run", "--arch", "h100"])


@pytest.mark.long
@pytest.mark.parametrize("arguments", [pytest.param(WIDE, marks=jobs.job(listed, *WIDE))])
def test_what_does_not_fit_is_never_timed(arguments):
    rows = [tune.Figures(*json.loads(line)) for line in jobs.result(listed, *arguments).splitlines()]
    assert len(rows) == 1 + len(KERNELS["fwd_tma"].candidates(128))
    assert rows[0].tile is None
    assert rows[0].why_not is None
    assert any(r.why_not == "over 101376 B" for r in rows)
    assert all((r.why_not is not None) == (r.shared > 101376 or r.stack > rows[0].stack) for r in rows)
