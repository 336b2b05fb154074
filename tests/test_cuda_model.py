"""The CUDA kernels on the host model of the GPU (tests/cuda_model): the case table, random problems, planted faults.

A new kernel is here when it has its rows in the case table, its draw in fuzz.cpp (run under sanitizers too) and a
planted fault for each barrier it relies on.
"""

import platform
import random
import re
import shutil

import cuda_model
import jobs
import pytest
import test_attention as test_attention_of
import test_cross_entropy
import test_triton_decode
import torch
from cuda_model import conformance

import llmfast
from llmfast import backends, cases

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found: the CUDA kernels run on no host model"),
    jobs.job(cuda_model.library),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def cuda(monkeypatch):
    """The cuda backend runs on the host model."""
    jobs.result(cuda_model.library)
    monkeypatch.setitem(backends._ops, ("attention", "cuda"), cuda_model.attention)
    monkeypatch.setitem(backends._ops, ("softmax", "cuda"), cuda_model.softmax)
    monkeypatch.setitem(backends._ops, ("cross_entropy", "cuda"), cuda_model.cross_entropy)
    yield
    cuda_model.schedule(0)


def rows(table, dtypes):
    """Every case in the first dtype, a seeded sample of them in the others, the rest in the long tier."""
    draw = random.Random(0)
    for name in table:
        for dtype in dtypes:
            short = dtype == dtypes[0] or draw.random() < 0.3
            yield pytest.param(name, dtype, marks=[] if short else pytest.mark.long, id=f"{name}-{dtype}")


@pytest.mark.parametrize(("name", "dtype"), list(rows(cases.CASES, ["bf16", "fp16"])))
def test_attention(cuda, name, dtype):
    p = cases.problem(cases.CASES[name], DTYPES[dtype])
    if "bias" in p.options:  # its gradient is refused
        p = p._replace(do=None, dlse=None)
    try:
        got = cases.run(p, "cuda")
    except NotImplementedError as reason:
        if "dropout" not in str(reason) and "more than 256" not in str(reason):  # what these kernels leave to Triton
            raise
        pytest.skip(str(reason))
    assert cases.disagreements(p, got) == []


@pytest.mark.parametrize(("name", "dtype"), list(rows(cases.SOFTMAX_CASES, ["bf16", "fp16", "fp32"])))
def test_softmax(cuda, name, dtype):
    x, options, dy = cases.softmax_problem(cases.SOFTMAX_CASES[name], DTYPES[dtype])
    assert cases.softmax_disagreements(x, options, dy, cases.run_softmax(x, options, dy, "cuda")) == []


@pytest.mark.parametrize(("name", "dtype"), list(rows(test_cross_entropy.OPTIONS, list(DTYPES))))
@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (33, 517), (5, 5003), (4, 1024)], ids=str)
def test_cross_entropy_agrees_with_float64(cuda, shape, name, dtype):
    test_cross_entropy.test_agrees_with_float64(shape, name, dtype, "cuda")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="g++'s -mfma is x86's")
@jobs.job(cuda_model.library, "fma")
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 131072), (64, 8192)])
def test_a_maximum_that_stays_costs_nothing(monkeypatch, Nq, Nk):
    """Of large scores, where 2^(c m - c m), one product rounded and one not, isn't 1 and would count once a tile."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g).half() for n in (Nq, Nk, Nk))
    k[:, :, 5] = q[:, :, 0] * 3  # for the first query the largest score by far stands at the beginning
    jobs.result(cuda_model.library, "fma")
    monkeypatch.setitem(backends._ops, ("attention", "cuda"), cuda_model.contracted())
    got, want = (
        llmfast.attention(*(t.to(d) for t in (q, k, v)), scale=0.4, return_lse=True, backend=b)
        for b, d in (("cuda", torch.half), ("reference", torch.double))
    )
    near = llmfast.attention(q, k, v, scale=0.4, return_lse=True, backend="reference")
    for i, dtype in ((0, torch.half), (1, torch.float32)):
        assert cases.breaks("ol"[i], got[i], want[i], [near[i]], cases.C_FORWARD, dtype, by_head=False) == []


@pytest.mark.parametrize("scale", [1e-46, 1e-39, -1e-46])
def test_a_scale_that_is_no_float32(cuda, scale):
    p = cases.problem(cases.CASES["causal"], torch.half)
    for q in (p.q, p.q[:, :, :1]):
        got, want = (llmfast.attention(q, p.k, p.v, scale=scale, causal=True, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_gradient_of_a_bias_made_in_a_graph(cuda, backend):
    """It is no leaf that says it needs one: the kernels without it must not be asked."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 20, 32).half().requires_grad_() for _ in range(3))
    w = torch.randn(20, 20).half().requires_grad_()
    fn = lambda q, k, v, w: llmfast.attention(q, k, v, bias=w * 2).float().square().sum()
    want = torch.autograd.grad(fn(q, k, v, w), (q, k, v, w))
    with llmfast.use_backend("cuda"), pytest.raises(NotImplementedError, match="gradient of bias"):
        torch.autograd.grad(torch.compile(fn, backend=backend)(q, k, v, w), (q, k, v, w))
    assert want[3].shape == w.shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(cuda, reduction):
    test_cross_entropy.test_linear("everything", reduction, 16, "cuda")


@pytest.mark.parametrize("columns", [40, 1500, 20_000])
def test_nan_spoils_its_row_only(cuda, columns):
    x, y = torch.randn(3, columns), torch.tensor([1, 2, 3])
    x[1, columns // 2] = float("nan")
    want = [False, True, False]
    for t in (x, x.half()):
        assert llmfast.cross_entropy(t, y, reduction="none", backend="cuda").isnan().tolist() == want
        for f in (llmfast.softmax, llmfast.log_softmax):
            assert f(t, backend="cuda").isnan().all(1).tolist() == want


@pytest.mark.parametrize(("name", "dtype"), list(rows(test_triton_decode.OPTIONS, ["bf16", "fp16"])))
def test_decode(cuda, name, dtype):
    test_triton_decode.check_against_float64(name, DTYPES[dtype], "cuda")


def test_decode_pages_neighbours_and_room_change_no_bit(cuda):
    q, k, v = test_triton_decode.cache(torch.bfloat16)
    lengths = torch.tensor(test_triton_decode.LENGTHS, dtype=torch.int32)
    o = llmfast.attention_decode(q, k, v, lengths, backend="cuda")
    for seed in (1, 3):  # the last split to finish is another
        cuda_model.schedule(seed)
        assert torch.equal(llmfast.attention_decode(q, k, v, lengths, backend="cuda"), o)
    for b, n in enumerate(lengths):
        one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], lengths[b : b + 1])
        assert torch.equal(llmfast.attention_decode(*one, backend="cuda"), o[b : b + 1])
    *pages, table = test_triton_decode.in_pages(k, v)
    assert torch.equal(llmfast.attention_decode(q, *pages, lengths, page_table=table, backend="cuda"), o)


@pytest.mark.parametrize("Nq", [13, 20])
def test_decode_of_many_queries_of_a_large_group(cuda, Nq):
    """More rows than one tile holds; more queries than decoding usually has; with Nq = 13 no cache lengths either."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 24, generator=g).half() for h, n in ((10, Nq), (1, 300), (1, 300)))
    lengths = torch.tensor([300], dtype=torch.int32)
    call = llmfast.attention if Nq == 13 else lambda *t, causal, **o: llmfast.attention_decode(*t, lengths, **o)
    want = call(q.double(), k.double(), v.double(), causal=True, backend="reference")
    near = call(q, k, v, causal=True, backend="reference")
    got = call(q, k, v, causal=True, backend="cuda")
    assert cases.breaks("o", got, want, [near], cases.C_FORWARD, torch.float16, by_head=False) == []


def test_a_target_out_of_range_is_nan_for_its_row(cuda):
    x, y = torch.randn(4, 300), torch.tensor([0, 300, -1, 299])
    op = cuda_model.cross_entropy
    spec, extras = llmfast.spec.CrossEntropySpec(), llmfast.spec.CrossEntropyExtras()
    loss, lse = op.forward(x, y, spec, extras)
    assert loss.isnan().tolist() == [False, True, True, False]
    dx = op.backward(torch.ones(4), x, y, lse, spec, extras)
    assert dx.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "seed", [1, 2, 3, pytest.param(4, marks=pytest.mark.long), pytest.param(5, marks=pytest.mark.long)]
)
def test_every_schedule_gives_the_same_bits(cuda, seed):
    p = cases.problem(cases.CASES["causal more keys"], torch.bfloat16)._replace(do=None, dlse=None)
    x, wide = torch.randn(3, 1500), torch.randn(2, 100_000).half()
    dy = torch.randn(2, 100_000).half()
    soften = lambda: cases.run_softmax(wide, {}, dy, "cuda")  # 4 blocks of a cluster hold a row
    cuda_model.schedule(0)
    want, y, of_clusters = cases.run(p, "cuda"), llmfast.softmax(x, backend="cuda"), soften()
    cuda_model.schedule(seed)
    got = cases.run(p, "cuda")
    assert torch.equal(got.o, want.o)
    assert torch.equal(got.lse, want.lse)
    assert torch.equal(llmfast.softmax(x, backend="cuda"), y)
    assert all(torch.equal(t, of_clusters[n]) for n, t in soften().items())


@pytest.mark.parametrize("columns", [65544, pytest.param(200_000, marks=pytest.mark.long), 262144, 262152])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_rows_of_clusters(cuda, columns, dtype):
    """Of 4 and 8 blocks, and just too long for them."""
    case = cases.SoftmaxCase((1, columns), {})
    x, options, dy = cases.softmax_problem(case, DTYPES[dtype])
    assert cases.softmax_disagreements(x, options, dy, cases.run_softmax(x, options, dy, "cuda")) == []


def test_a_head_depends_on_itself_alone(cuda):
    """Batch-invariance, and NaN in one sequence stays there."""
    p = cases.problem(cases.Case(2, 2, 2, 70, 90, 64, 64, dict(causal=True)), torch.bfloat16)._replace(do=None)
    whole = cases.run(p, "cuda")
    one = cases.run(cases.Problem(*(t[1:, 1:].clone() for t in p[:3]), p.options, None, None), "cuda")
    assert torch.equal(whole.o[1:, 1:], one.o)
    for t in p[:3]:
        t[0, 0, 3] = float("nan")
    spoiled = cases.run(p, "cuda")
    assert spoiled.o[0, 0, 3].isnan().all()
    assert torch.equal(spoiled.o[1], whole.o[1])
    assert torch.equal(spoiled.o[0, 1], whole.o[0, 1])


def test_tiles_outside_the_window_are_not_visited(cuda):
    test_attention_of.test_tiles_outside_the_window_are_not_visited("cuda")


def test_refusals_are_sentences(cuda):
    q = torch.randn(1, 1, 8, 32)
    h, wide = q.half(), torch.zeros(1, 1, 8, 264).half()
    for t, options, why in (
        (q, {}, "float32 is not float16 or bfloat16"),
        (h, dict(dropout_p=0.5), "dropout is not supported"),
        (wide, {}, "head dim 264 is more than 256"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            llmfast.attention(t, t, t, backend="cuda", **options)


def test_every_wrapper_has_a_probe():
    """What conformance.py compares with a GPU: all of ptx.cuh, and the probes run on the host model."""
    text = (cuda_model.ROOT / "csrc/cuda/ptx.cuh").read_text()
    wrappers = set(re.findall(r"__device__ __forceinline__ [\w:]+\*? (\w+)(?:<\w+>)?\(", text))
    probes = (cuda_model.HERE / "conformance.cu").read_text()
    assert wrappers >= {"ldmatrix_x4_trans", "mma_m16n8k16", "shuffle_up", "shared_memory", "pack"}
    assert {name for name in wrappers if not re.search(rf"\b{name}\b", probes)} == set()
    assert all(len(words) > 100 for _, words in conformance.model().values())


# ---- sanitizers


KINDS = ["attention", "backward", "decode", "softmax", "cross_entropy"]


@jobs.job(cuda_model.fuzz, "asan")
@pytest.mark.parametrize("what", KINDS)
def test_address_sanitizer(request, what):
    """Random problems, exact heap sizes: no step outside, no undefined behaviour, right results."""
    count = 150 if request.config.getoption("--all") else 8
    status, output = jobs.result(cuda_model.fuzz, "asan")(what, 0, count)
    assert status == 0, output[-3000:]


@jobs.job(cuda_model.fuzz, "tsan")
@pytest.mark.parametrize("what", KINDS)
def test_thread_sanitizer(request, what):
    count = 30 if request.config.getoption("--all") else 3
    status, output = jobs.result(cuda_model.fuzz, "tsan")(what, 0, count, small=1)
    assert status == 0, output[-3000:]


@jobs.job(cuda_model.fuzz, "")
@pytest.mark.parametrize("what", KINDS)
def test_random_problems(request, what):
    count = 600 if request.config.getoption("--all") else 16
    for seed in range(4):
        status, output = jobs.result(cuda_model.fuzz, "")(what, 1000 * seed, count // 4 + 1, seed)
        assert status == 0, output[-3000:]


# The faults planted in csrc/cuda by their number: what is broken, and what finds it besides wrong results. "race": no
# schedule of the host model makes a wrong result of it, ThreadSanitizer alone sees it.
FAULTS = {
    1: ("attention", "waits for one cp.async group too few", "tsan"),
    2: ("attention", "no barrier before a tile is used", "tsan"),
    3: ("attention", "a tile is loaded into the slot in use", "tsan"),
    4: ("attention", "the band is one key too wide", None),
    5: ("attention", "the row maximum lacks a shuffle", None),
    6: ("attention", "no barrier between writing and reading o in shared memory", "tsan"),
    7: ("attention", "reads one row past the end", "asan"),
    8: ("attention", "writes one row past the end", "asan"),
    31: ("backward", "dk, dv: waits for one cp.async group too few", "tsan"),
    32: ("backward", "dk, dv: no barrier before a tile is used", "tsan"),
    33: ("backward", "dk, dv: a tile is loaded into the slot in use", "tsan"),
    34: ("backward", "dk, dv: the band is one key too wide", None),
    36: ("backward", "no barrier between writing and reading a gradient in shared memory", "tsan"),
    37: ("backward", "writes one row past the end", "asan"),
    41: ("backward", "dq: waits for one cp.async group too few", "tsan"),
    42: ("backward", "dq: no barrier before a tile is used", "tsan"),
    43: ("backward", "dq: a tile is loaded into the slot in use", "tsan"),
    44: ("backward", "dq: the band is one key too wide", None),
    81: ("backward", "delta lacks a shuffle", None),
    82: ("backward", "delta reads one column past the end", "asan"),
    61: ("decode", "waits for one cp.async group too few", "tsan"),
    62: ("decode", "no fence between the partial results and the count", "race"),
    63: ("decode", "no barrier between the partial results and the count", "race"),
    64: ("decode", "the splits are merged from the last to finish on", None),
    65: ("decode", "the counter is not reset", None),
    66: ("decode", "a page one past the last is taken", "asan"),
    67: ("decode", "the page of the key past the last is looked up", "asan"),
    68: ("decode", "the band is one key too wide", None),
    69: ("decode", "no barrier between writing and reading acc in shared memory", "tsan"),
    70: ("decode", "seqlens_k is not clamped", "asan"),
    71: ("decode", "a tile is loaded into the slot in use", "tsan"),
    72: ("decode", "no warp barrier before a tile is used", "race"),
    73: ("decode", "no fence between the count and reading the partial results", "race"),
    11: ("softmax", "the reduction lacks a shuffle", None),
    12: ("softmax", "no barrier between warps of a row", "tsan"),
    13: ("softmax", "two reductions share their shared memory", "tsan"),
    14: ("softmax", "writes one column past the end", "asan"),
    15: ("softmax", "the running sum is not rescaled", None),
    16: ("softmax", "the blocks of a cluster take the same columns", None),
    17: ("softmax", "no barrier before a cluster's sums are read", "tsan"),
    18: ("softmax", "a block ends before the cluster has read its sums", None),
    19: ("softmax", "the sums of blocks are not rescaled", None),
    20: ("softmax", "a cluster writes one column past the end", "asan"),
    21: ("softmax", "the backward's sum is of one thread", None),
    22: ("softmax", "the backward writes one column past the end", "asan"),
    23: ("softmax", "the backward doesn't wait for a cluster's dy", None),
    24: ("softmax", "the backward has no barrier before a cluster's sums are read", "tsan"),
    25: ("softmax", "the backward's block ends before the cluster has read its sum", None),
    26: ("softmax", "the backward of a cluster writes one column past the end", "asan"),
    51: ("cross_entropy", "the running sum is not rescaled", None),
    52: ("cross_entropy", "two reductions share their shared memory", "tsan"),
    53: ("cross_entropy", "writes one column past the end", "asan"),
}


@pytest.mark.parametrize("fault", [n for n, (_, _, sanitizer) in FAULTS.items() if sanitizer != "race"])
def test_fault_is_caught(fault):
    what, _, sanitizer = FAULTS[fault]
    fuzz = jobs.result(cuda_model.fuzz, "asan" if sanitizer == "asan" else "")
    status, output = fuzz(what, 0, 40 if what in ("softmax", "decode") else 12, fault=fault)
    assert status != 0
    if sanitizer == "asan":
        assert "heap-buffer-overflow" in output


@pytest.mark.long
@pytest.mark.parametrize("fault", [n for n, (_, _, sanitizer) in FAULTS.items() if sanitizer in ("tsan", "race")])
def test_race_is_caught(fault):
    what = FAULTS[fault][0]
    status, output = jobs.result(cuda_model.fuzz, "tsan")(what, 0, 8, fault=fault, small=1)
    assert status == 66
    assert "data race" in output
