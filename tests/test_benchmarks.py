"""The benchmark's own machinery: a run from end to end on tiny shapes, compare, plot, and the rows that fail."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
from benchmarks import bench_attention, bench_cross_entropy, bench_softmax, measure

ROOT = Path(__file__).parent.parent


def benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_run_compare_plot(tmp_path):
    options = ("--lengths", "16,32", "--budget", "0.01", "--no-check", "--out", tmp_path)
    out = benchmarks("run", "attention", "softmax", *options)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "in geometric mean" in out.stdout
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(path.read_text())
    assert {"commit", "machine", "torch", "peaks", "load", "memory"} <= found["environment"].keys()
    ours = [r for r in found["rows"] if r["provider"] == "llmfast"]
    assert len(ours) == 16 + 10
    assert all(r["seconds"] > 0 and r["error"] < 0.02 and r["ratio"] > 0 for r in ours)
    assert benchmarks("compare", path, path).returncode == 0
    slower = json.loads(path.read_text())
    next(r for r in slower["rows"] if r["provider"] == "llmfast")["ratio"] /= 2
    (tmp_path / "slower").mkdir()
    (tmp_path / "slower/x.json").write_text(json.dumps(slower))
    out = benchmarks("compare", path, tmp_path / "slower/x.json")
    assert out.returncode == 1
    assert "1 rows slower" in out.stdout
    assert benchmarks("plot", path, "--out", tmp_path / "again.png").returncode == 0
    (tmp_path / "none.json").write_text(json.dumps(found | {"rows": []}))
    out = benchmarks("plot", tmp_path / "none.json")
    assert out.returncode == 0
    assert out.stdout.startswith("no plot: ")


def test_work_is_counted_once():
    shape = bench_attention.Shape("float32", 2, 4, 4, 128, 64, False, False)
    assert bench_attention.work(shape) == (4 * 2 * 4 * 128 * 128 * 64, "FLOP/s")
    assert bench_attention.work(shape._replace(causal=True, backward=True))[0] == 5 * 2 * 4 * 128 * 128 * 64
    assert bench_softmax.work(bench_softmax.Shape("bfloat16", 8, 16, False)) == (2 * 8 * 16 * 2, "B/s")


def test_cross_entropy_family():
    shapes = list(bench_cross_entropy.shapes("cpu", dtypes=("float32",)))
    assert len(shapes) == 8
    for shape in (s._replace(rows=6, V=40, D=min(s.D, 8)) for s in shapes):
        tensors = bench_cross_entropy.inputs(shape, "cpu")
        want = bench_cross_entropy.truth(shape, tensors)
        for provider in bench_cross_entropy.providers("cpu").values():
            assert measure.error(bench_cross_entropy.call(provider, shape, tensors)(), want) < 1e-5
    peaks = {name: mb for _, name, mb in bench_cross_entropy.memory(("float32",), rows=1024, V=20000, D=16)}
    logits = 1024 * 20000 * 4e-6
    assert 2 * logits < peaks["torch"] < 4 * logits
    assert 0.4 * logits < peaks["llmfast"] < 2 * logits  # chunks of 419 rows


def test_error_of_something_not_finite():
    x = torch.ones(3)
    assert measure.error(x, x) == 0
    assert measure.error(x / 0, x) == float("inf")


def test_interleave_counts_every_contender():
    calls = [0, 0]

    def count(i):
        calls[i] += 1
        torch.ones(1000).sum()

    timings = measure.interleave([lambda: count(0), lambda: count(1)], budget=0.01, threads=1)
    assert len(timings) == 2
    assert calls[0] == calls[1] >= 6


def test_a_slow_round_counts_and_two_follow(monkeypatch):
    clock = itertools.count(0.0, 100.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock), thread_time=lambda: 0.0))
    calls = []
    (timing,) = measure.interleave([lambda: calls.append(0)], budget=0.2)
    assert (len(calls), timing.wall) == (3, 100.0)


def test_models_do_the_same_work(monkeypatch):
    """Each provider of each step on a tiny GPT-2: the thin transformer's logits, loss, gradients are transformers'."""
    tr = pytest.importorskip("transformers", minversion="5")
    from functools import cache

    from benchmarks import bench_models

    @cache
    def tiny(model, dtype, device):
        bench_models.llmfast.enable_hf()
        torch.manual_seed(0)
        off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config = tr.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=30000, n_positions=64, **off)
        return tr.GPT2LMHeadModel(config).to(dtype).eval()

    monkeypatch.setattr(bench_models, "theirs", tiny)
    bench_models.thin.cache_clear()
    for step in ("prefill", "decode", "generate", "train"):
        shape = bench_models.Shape("gpt2", "float32", step, 16)
        tensors = bench_models.inputs(shape, "cpu")
        want = bench_models.truth(shape, tensors)
        for name, provider in bench_models.providers("cpu").items():
            if not bench_models.skip(name, shape):
                call = bench_models.call(provider, shape, tensors)
                assert measure.error(call(), want) < 1e-5, (step, name)
                assert measure.error(call(), want) < 1e-5, (step, name, "again")
    bench_models.thin.cache_clear()
