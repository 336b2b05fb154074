"""Ring attention on 2 and 4 processes is attention on one; data-parallel training is training on one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmfast.distributed import ring_attention, shard, unshard

ROOT = Path(__file__).parent.parent


def spawn(processes, call):
    """Runs `call`, an expression over this module, in so many processes with gloo; their output, or a failure."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = f"import torch; torch.set_num_threads(1); from tests.test_distributed import *; start(); {call}; stop()"
    common = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "OMP_NUM_THREADS": "1"}  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=common | {"RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=240)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    for p, text in zip(started, said, strict=True):
        assert p.returncode == 0, text[-3000:]
    return said


def start():
    dist.init_process_group("gloo")


def stop():
    dist.destroy_process_group()


def problem(dtype, Hk=2, N=32):
    g = torch.Generator().manual_seed(0)
    rand = lambda H, D: (1.5 * torch.randn(2, H, N, D, generator=g, dtype=torch.float64)).to(dtype)
    return rand(4, 16), rand(Hk, 16), rand(Hk, 24), rand(4, 24)


def ring_equals_whole(causal, dtype):
    """o and all gradients by the rule for right: against float64, beside PyTorch's MATH attention on one process."""
    q, k, v, do = problem(dtype)
    leaves = lambda *ts: [t.clone().requires_grad_() for t in ts]
    here = leaves(*(shard(t, causal=causal) for t in (q, k, v)))
    o = ring_attention(*here, causal=causal, scale=0.3)
    o.backward(shard(do, causal=causal))
    got = [unshard(t, causal=causal) for t in (o, *(t.grad for t in here))]
    want, one = [], []
    for found, wide in ((want, torch.float64), (one, dtype)):
        whole = leaves(*(t.to(wide) for t in (q, k, v)))
        with sdpa_kernel(SDPBackend.MATH):
            y = scaled_dot_product_attention(*whole, is_causal=causal, scale=0.3, enable_gqa=True)
        y.backward(do.to(wide))
        found += [y.detach(), *(t.grad for t in whole)]
    for name, g, a, w in zip(("o", "dq", "dk", "dv"), got, one, want, strict=True):
        worst, c = (a.double() - w).abs().max(), 2 if name == "o" else 3
        bound = c * worst + torch.finfo(dtype).eps * w.abs().max() if dtype != torch.float64 else 1e-12
        assert (g.double() - w).abs().max() <= bound, (name, dtype, causal, worst, (g.double() - w).abs().max())
        assert g.dtype == dtype


def ring_refuses():
    q = torch.randn(1, 2, 7, 16)
    with pytest.raises(ValueError, match="even length"):
        ring_attention(q, q, q, causal=True)
    with pytest.raises(ValueError, match="equal pieces"):
        shard(torch.randn(1, 1, 6, 8), causal=True)


def all_refuse(message, *tensors):
    with pytest.raises(ValueError, match=message):
        ring_attention(*tensors)


def ring_refuses_everywhere():
    """What one process alone or only all together can see; each of these aborted or never ended."""
    rank, rand = dist.get_rank(), torch.randn
    q = rand(1, 2, 8, 16)
    for bad in (rand(1, 3, 8, 16), rand(1, 2, 8, 8), rand(2, 2, 8, 16), q.double(), q[0], None):
        all_refuse("q, k, v", q, bad, bad if bad is None or bad.shape[-1] == 16 else q)
    all_refuse("process 0", *[q if rank else rand(1, 3, 8, 16)] * 2, q)
    all_refuse("same on every process", *[rand(1, 2, 6 if rank else 8, 16)] * 3)
    all_refuse("same on every process", *[q.bfloat16() if rank else q] * 3)


def test_ring_attention_on_one_process():
    spawn(1, "ring_equals_whole(True, torch.float64); ring_equals_whole(False, torch.float32)")


def test_ring_attention_refuses_on_every_process():
    spawn(2, "ring_refuses_everywhere()")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ring_attention(processes):
    every = [(c, t) for c in (False, True) for t in ("torch.float32", "torch.float64", "torch.bfloat16")]
    spawn(processes, "; ".join(f"ring_equals_whole({c}, {t})" for c, t in every) + "; ring_refuses()")


def little_losses(folder, die=-1, shard=False, matrix_lr=0.0):
    """6 steps, saved every 3, resumed where something is there; interrupted in step die."""
    from llmfast.models import Config, Transformer
    from llmfast.text import tasks, training

    torch.manual_seed(0)
    model = Transformer(Config(50, dim=32, layers=1, heads=2, max_length=16))
    pieces = [
        torch.randint(0, 50, (5 + i % 5,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(40)
    ]
    s = training.Settings(6, 64, warmup=3, save_every=3, check_every=2, matrix_lr=matrix_lr)

    def report(step, loss):
        if step == die:
            signal.raise_signal(signal.SIGINT)

    task = tasks.LanguageModel()
    return training.train(model, task, pieces[:30], s, folder, None, True, report, pieces[30:], shard)


def losses_equal(folder, want, bound, **options):
    little_losses(folder, die=3, **options)
    got = little_losses(folder, **options)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < bound, (got, want)


@pytest.mark.long
@pytest.mark.parametrize("shard", [False, True], ids=["copied", "divided"])
def test_training_on_two_is_training_on_one(tmp_path, shard):
    """AdamW alone to 1e-5; Muon rounds to bfloat16 inside, which makes last bits larger."""
    pytest.importorskip("safetensors")
    from llmfast.models import from_pretrained

    for matrix_lr, bound in ((0.0, 1e-5), (0.02, 1e-3)):
        one, two = tmp_path / f"one {matrix_lr}", tmp_path / f"two {matrix_lr}"
        want = little_losses(one, matrix_lr=matrix_lr)
        assert want[-1] < want[0]
        spawn(2, f"losses_equal({str(two)!r}, {want!r}, {bound}, shard={shard}, matrix_lr={matrix_lr})")
        ours, theirs = from_pretrained(one).state_dict(), from_pretrained(two).state_dict()
        assert all((ours[n] - theirs[n]).abs().max() < 20 * bound for n in ours)
