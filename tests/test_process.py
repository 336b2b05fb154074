"""What the library does to the process it lives in: memory, threads, the GIL, forks, signals. Each in a process of its
own.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("llmfast._cpu", reason="llmfast._cpu is not built")
ROOT = Path(__file__).parent.parent
START = """
import os, signal, sys, threading, time
import torch
import llmfast
import warnings
warnings.simplefilter("ignore")  # of what still runs on the reference
torch.manual_seed(0)
def problem(B, H, N, D=64):
    return [torch.randn(B, H, N, D) for _ in range(3)]
def tasks():
    return len(os.listdir("/proc/self/task"))
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def start(code, **env):
    command = [sys.executable, "-c", START + textwrap.dedent(code)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True)


def run(code, timeout=100, **env):
    """What a child prints; a child that hangs or fails is a failure."""
    with start(code, **env) as child:
        try:
            said = child.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            child.kill()
            pytest.fail(f"hangs: {child.communicate()[0][-2000:]}")
    assert child.returncode == 0, said[-2000:]
    return said.strip()


@linux
def test_memory_does_not_grow():
    """Less than 24 MiB over 240 forward and backward passes of changing shape."""
    grown = run("""
        def rss():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
        def steps(n):
            for i in range(n):
                q, k, v = (t.requires_grad_() for t in problem(1 + i % 2, 2, 128 + 16 * (i % 5)))
                o, lse = llmfast.attention(q, k, v, causal=i % 3 > 0, return_lse=True)
                (o.square().sum() + lse.sum()).backward()
                llmfast.softmax(torch.randn(70, 300 + i % 7, requires_grad=True)).square().sum().backward()
        steps(40)
        before = rss()
        steps(240)
        print(rss() - before)
    """)
    assert int(grown) < 24 * 2**20


def test_threads_agree():
    """8 Python threads that run kernels at the same time get the bits that one alone gets."""
    said = run("""
        def work():
            q, k, v = (t.clone().requires_grad_() for t in inputs)
            o = llmfast.attention(q, k, v, causal=True)
            return [o, llmfast.softmax(q[0]), *torch.autograd.grad(o.square().sum(), (q, k, v))]
        inputs = problem(2, 2, 200)
        alone, found = work(), []
        def many():
            found.extend(work() for _ in range(5))
        threads = [threading.Thread(target=many) for _ in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        print(len(found), all(torch.equal(a, b) for one in found for a, b in zip(alone, one)))
    """)
    assert said == "40 True"


LONG = {
    "eager": "llmfast.attention(q, k, v)",
    "lse": "llmfast.attention(q, k, v, return_lse=True)",
    "softmax": "llmfast.softmax(x)",
    "backward": "torch.autograd.grad(out.sum(), (g,))",
}


def test_long_kernels_release_the_gil():
    """Another Python thread goes on while a kernel runs: it wakes every millisecond, and never oversleeps the whole
    call.
    """
    said = run(f"""
        q, k, v = problem(1, 2, 6000)
        x = torch.ones(3000, 20000)
        g = q.clone().requires_grad_()
        out = llmfast.attention(g, k, v)
        for call in {list(LONG.values())}:
            wakes, done = [], threading.Event()
            def watch():
                while not done.wait(0.001):
                    wakes.append(time.perf_counter())
            watcher = threading.Thread(target=watch)
            watcher.start()
            time.sleep(0.05)
            begin = time.perf_counter()
            eval(call)
            end = time.perf_counter()
            done.set(), watcher.join()
            inside = [begin, *(t for t in wakes if begin < t < end), end]
            print(end - begin, max(b - a for a, b in zip(inside, inside[1:])))
    """)
    for call, line in zip(LONG, said.splitlines(), strict=True):
        took, longest = map(float, line.split())
        assert took > 0.01, call
        assert longest < took / 2, call


@linux
def test_obeys_set_num_threads():
    said = run("""
        q = torch.zeros(1, 1, 1, 64).expand(2, 4, 300, 64)
        for n in (1, 3):
            before = tasks()
            torch.set_num_threads(n)
            llmfast.attention(q, q, q)
            print(tasks() - before)
    """)
    assert said.split() == ["0", "2"]


@linux
def test_obeys_set_num_threads_in_other_threads():
    """A thread that has asked torch for nothing yet, whose OpenMP has a number of its own."""
    said = run("""
        q = torch.zeros(1, 1, 1, 64).expand(2, 4, 300, 64)
        def work():
            before = tasks()
            llmfast.attention(q, q, q)
            print(tasks() - before)
        for n in (1, 3):
            torch.set_num_threads(n)
            thread = threading.Thread(target=work)
            thread.start(), thread.join()
    """)
    assert said.split() == ["0", "2"]


def test_another_default_device():
    """CPU tensors where new ones are made elsewhere: what a kernel writes lies on the CPU."""
    run("""
        q, k, v = problem(1, 2, 40)
        bias, sinks = torch.randn(40, 40), torch.randn(2)
        x, y, h, w = torch.randn(8, 30), torch.arange(8), torch.randn(8, 16), torch.randn(30, 16)
        def work():
            found = []
            for options in ({}, dict(bias=bias, sinks=sinks), dict(causal=True, return_lse=True)):
                leaves = [t.detach().requires_grad_() for t in (q, k, v, bias, sinks)]
                given = {n: dict(bias=leaves[3], sinks=leaves[4]).get(n, o) for n, o in options.items()}
                o = llmfast.attention(*leaves[:3], **given)
                o = o[0] + o[1][..., None] if isinstance(o, tuple) else o
                found += [o, *(g for g in torch.autograd.grad(o.sum(), leaves, allow_unused=True) if g is not None)]
            for f in (lambda x: llmfast.softmax(x, bias=x), lambda x: llmfast.cross_entropy(x, y, reduction="none"),
                      lambda x: llmfast.linear_cross_entropy(h, x[:, :16].T @ x, y), lambda x: llmfast.linear(x, w.mT)):
                try:
                    leaf = x.detach().requires_grad_()
                    o = f(leaf)
                    found += [o, torch.autograd.grad(o.sum(), leaf)[0]]
                except ValueError:
                    assert f is not None
            return found
        want = work()
        torch.set_default_device("meta")
        for a, b in zip(work(), want, strict=True):
            assert a.is_cpu and torch.equal(a, b)
    """)


@linux
def test_memory_of_a_backward():
    """Few key heads and several threads: what the chunks' gradients take doesn't grow with their number."""
    said = run("""
        torch.set_num_threads(8)
        q, k, v = (torch.randn(1, h, 16384, 64).bfloat16().requires_grad_() for h in (8, 1, 1))
        do = torch.randn_like(q)
        o = llmfast.attention(q, k, v, causal=True)
        open("/proc/self/clear_refs", "w").write("5")
        status = lambda name: int(next(s for s in open("/proc/self/status") if s.startswith(name)).split()[1])
        before = status("VmRSS")
        torch.autograd.grad(o, (q, k, v), do)
        print((status("VmHWM") - before) // 1024)
    """)
    assert int(said) < 256 + 64


def test_tensors_without_memory_are_an_error():
    said = run("""
        t, x, y = torch.randn(2, 4, 5, 8), torch.randn(3, 7), torch.arange(3)
        t.untyped_storage().resize_(0), x.untyped_storage().resize_(0)
        for call in (lambda: llmfast.attention(t, t, t), lambda: llmfast.scaled_dot_product_attention(t, t, t),
                     lambda: llmfast.softmax(x), lambda: llmfast.cross_entropy(x, y), lambda: llmfast.linear(x, x),
                     lambda: llmfast.attention(torch.randn(2, 4, 5, 8), t, t)):
            try:
                call()
            except (ValueError, RuntimeError):  # the latter is torch's, of a view
                print("refused")
    """)
    assert said.split() == ["refused"] * 6


def test_saved_tensors_that_come_back_otherwise_are_an_error():
    """A hook that gives back a shorter tensor: an error, and no write past its end."""
    said = run("""
        q, k, v = (t.requires_grad_() for t in problem(1, 2, 200))
        for index in range(5):
            for options in ({}, dict(sinks=torch.randn(2))):
                count = iter(range(99))
                shorter = lambda t: t[:, :, :100].clone() if next(count) % (5 + len(options)) == index else t
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shorter):
                    o = llmfast.attention(q, k, v, causal=True, **options)
                try:
                    torch.autograd.grad(o.sum(), (q, k, v))
                except ValueError as problem:
                    print(problem)
    """)
    assert said.splitlines() == ["a tensor saved for the gradient has another shape or dtype now"] * 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("used", ["llmfast", pytest.param("torch", marks=pytest.mark.long)])
def test_fork(used):
    """A forked child computes the same bits; after threads it does so on one of its own, for the parent's are gone."""
    said = run(
        f"""
        torch.set_num_threads(3)
        q, k, v = problem(2, 4, 300)
        if {used!r} == "torch":
            want = torch.randn(100, 100000).relu()
        else:
            want = llmfast.attention(q, k, v)
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            got = llmfast.attention(q, k, v)
            os._exit({used!r} == "llmfast" and not torch.equal(got, want))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), torch.get_num_threads())
    """
    )
    assert said == "0 3"


@linux
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_before_use_keeps_its_threads():
    said = run(
        """
        pid = os.fork()
        if pid == 0:
            q = torch.zeros(1, 1, 1, 64).expand(2, 4, 300, 64)
            llmfast.attention(q, q, q)
            os._exit(tasks() != torch.get_num_threads())
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    )
    assert said == "0"


def test_processes_start_at_once():
    children = [
        start("print(llmfast.attention(*problem(1, 2, 100), causal=True).double().sum().item())") for _ in range(3)
    ]
    said = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 3, said
    assert len(set(said)) == 1


def test_interrupt_during_a_long_call():
    """Ctrl-C arrives when the kernel returns, as KeyboardInterrupt, and the library goes on working."""
    child = start("""
        small = problem(1, 2, 200)
        want = llmfast.attention(*small)
        q, k, v = problem(1, 2, 4096)
        try:
            print("ready", flush=True)
            while True:
                llmfast.attention(q, k, v)
        except KeyboardInterrupt:
            print(torch.equal(llmfast.attention(*small), want))
    """)
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=100)[0] == "True\n"
        assert child.returncode == 0
    finally:
        child.kill()


def test_a_reader_that_leaves_is_no_fault():
    """As in `llmfast info | head -1`."""
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-m", "llmfast", "info"], stdout=pipe, stderr=pipe, cwd=ROOT)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 1
