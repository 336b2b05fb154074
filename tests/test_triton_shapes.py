"""Triton's kernels on 210 drawn problems each, against float64: shapes and options that no row of the table names.

No draw has a result of so few numbers, or sums of so few, that it is chance which of two kernels errs less.
"""

import random

import pytest
import torch
from test_attention import DTYPES, triton_or_skip
from test_triton_tma import kernels as tma  # noqa: F401  a fixture

import llmfast
from llmfast import cases

DRAWS, SHORT = 210, 2  # of each kernel in the long tier, in the short one


def draws(*dtypes):
    for seed in range(DRAWS):
        dtype = dtypes[seed % len(dtypes)]
        yield pytest.param(seed, dtype, marks=[] if seed < SHORT else pytest.mark.long, id=f"{seed}-{dtype}")


def maybe(draw, chance, options):
    return options if draw.random() < chance else {}


def band(draw, most):
    """None, causal both ways, a window on one side or on both."""
    causal = draw.choice((False, False, True, True, "top_left"))
    window = draw.choice((None, None, draw.randint(1, most), (draw.randint(0, most), draw.randint(0, most))))
    return dict(causal=causal, window=window)


def scores(draw):
    """What changes a score whatever the layout."""
    alibi = maybe(draw, 0.2, dict(alibi="heads"))
    capped, sunk = maybe(draw, 0.2, dict(softcap=draw.uniform(1, 6))), maybe(draw, 0.2, dict(sinks=True))
    return alibi | capped | sunk | maybe(draw, 0.2, dict(scale=draw.uniform(0.05, 0.4)))


def heads(draw):
    """B, H, Hk: at most six of (batch, head), each of which the interpreter takes in turn."""
    return draw.choice(((1, 1, 1), (1, 2, 2), (1, 2, 1), (2, 1, 1), (1, 3, 1), (2, 2, 1), (1, 4, 2), (2, 3, 1)))


def head_dim(draw, most):
    return draw.randint(8, min(most, draw.choice((16, 64, 64, 128, 256, 512))))


def cuts(draw, n, parts):
    """cu_seqlens: some empty, the last may end before n."""
    inner = sorted(draw.randint(0, n) for _ in range(parts))
    return (0, *inner[:-1], draw.choice((n, inner[-1])))


def reordered(p, seed):
    """The reference with the head dims in another order: the same numbers, added in another order."""
    g = torch.Generator().manual_seed(seed)
    d, dv = (torch.randperm(t.shape[-1], generator=g) for t in (p.q, p.v))
    o, lse, grads = cases.run(p._replace(q=p.q[..., d], k=p.k[..., d], v=p.v[..., dv], do=p.do[..., dv]), "reference")
    back = {"dq": d.argsort(), "dk": d.argsort(), "dv": dv.argsort()}
    return cases.Result(o[..., back["dv"]], lse, {n: t[..., back[n]] if n in back else t for n, t in grads.items()})


@pytest.mark.parametrize(("seed", "dtype"), list(draws("fp32", "bf16", "fp16")))
def test_attention(seed, dtype):
    """Forward, and the two kernels of the backward."""
    triton_or_skip()
    draw = random.Random(seed)
    B, H, Hk = heads(draw)
    Nq, Nk, D = draw.randint(16, 200), draw.randint(8, 200), head_dim(draw, 512)
    Dv = draw.choice((D, D, head_dim(draw, 512)))
    options = scores(draw) | band(draw, 90) | maybe(draw, 0.15, dict(dropout_p=draw.uniform(0.05, 0.6)))
    options |= maybe(draw, 0.2, dict(through_lse=True))
    if draw.random() < 0.2:
        options["packed"] = cuts(draw, Nq, 3), cuts(draw, Nk, 3)
        options["causal"] = bool(options["causal"])
        B = 3
    else:
        options |= maybe(draw, 0.25, dict(mask=draw.choice(("random", "rows", "padding"))))
        options |= maybe(draw, 0.25, dict(bias=draw.choice(("full", "head", "key", "query", "hide"))))
        options |= maybe(draw, 0.2, dict(layout=draw.choice(("BNHD", "fused", "strided"))))
        options |= maybe(draw, 0.1 if "scale" in options else 0.0, dict(scale=-0.2))
    p = cases.problem(cases.Case(B, H, Hk, Nq, Nk, D, Dv, options), DTYPES[dtype], seed)
    yards = cases.yardsticks(p)
    if yards.math is None:  # dsinks has a number a head
        yards = yards._replace(math=reordered(p, seed))
    assert cases.disagreements(p, cases.run(p, "triton"), yards) == []


@pytest.mark.parametrize(("seed", "dtype"), list(draws("bf16", "fp16")))
def test_tma(seed, dtype, tma, monkeypatch):  # noqa: F811
    from llmfast.kernels import attention

    triton_or_skip()
    monkeypatch.setattr(attention, "forward", None)  # the other forward must not run
    draw = random.Random(seed)
    B, H, Hk = heads(draw)
    D, Dv = (8 * draw.randint(1, draw.choice((4, 8, 16, 32))) for _ in range(2))
    options = scores(draw) | band(draw, 90) | maybe(draw, 0.3, dict(layout=draw.choice(("BNHD", "fused"))))
    case = cases.Case(B, H, Hk, draw.randint(1, 250), draw.randint(1, 250), D, draw.choice((D, Dv)), options)
    p = cases.problem(case, DTYPES[dtype], seed)._replace(do=None, dlse=None)
    monkeypatch.setattr(tma, "sms", lambda device: draw.randint(1, 5))
    q = p.q.detach().requires_grad_()  # few queries without gradient go to the decode kernel
    o, lse = llmfast.attention(q, p.k, p.v, **p.options, return_lse=True, backend="triton")
    assert cases.disagreements(p, cases.Result(o.detach(), lse.detach(), {})) == []


@pytest.mark.parametrize(("seed", "dtype"), list(draws("fp32", "bf16", "fp16")))
def test_decode(seed, dtype):
    """What lies beyond a sequence's length holds NaN for the kernel, in the cache or in its pages."""
    triton_or_skip()
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, H, Hk = heads(draw)
    Nq, M = (
        max(8 // (B * H), draw.choice((1, 1, draw.randint(2, 16)))),
        draw.randint(1, draw.choice((40, 300, 1100, 2300))),
    )
    D = head_dim(draw, 256)
    Dv = draw.choice((D, head_dim(draw, 256)))
    q, k, v = (
        torch.randn(B, h, n, d, generator=g).mul(size).to(DTYPES[dtype])
        for h, n, d, size in ((H, Nq, D, 1.5), (Hk, M, D, 1.5), (Hk, M, Dv, 1))
    )
    lengths = torch.tensor([draw.choice((M, draw.randint(0, M))) for _ in range(B)], dtype=torch.int32)
    options = dict(causal=draw.choice((True, True, False)), window=draw.choice((None, None, draw.randint(1, M))))
    options |= maybe(draw, 0.2, dict(softcap=draw.uniform(1, 6)))
    options |= maybe(draw, 0.2, dict(scale=draw.uniform(-0.4, 0.4)))
    options |= maybe(draw, 0.2, dict(alibi_slopes=torch.rand(H, generator=g)))
    options |= maybe(draw, 0.2, dict(sinks=torch.randn(H, generator=g)))
    options |= maybe(draw, 0.2, dict(mask=torch.rand(B, 1, Nq, M, generator=g) > 0.5))
    options |= maybe(draw, 0.2, dict(bias=torch.randn(H, 1, M, generator=g)))
    call = lambda backend, q, *cache, **paged: llmfast.attention_decode(
        q, *cache, lengths, **options, **paged, return_lse=True, backend=backend
    )
    (x64, lse64), (math, lse_math) = call("reference", q.double(), k.double(), v.double()), call("reference", q, k, v)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    page = draw.choice((None, *(n for n in (1, 7, 16, 64) if M % n == 0)))
    if page is None:
        o, lse = call("triton", q, k, v)
    else:
        table = torch.randperm(B * M // page, generator=g).reshape(B, -1).int()
        pages = [torch.empty(B * M // page, Hk, page, t.shape[3], dtype=t.dtype) for t in (k, v)]
        for to, t in zip(pages, (k, v), strict=True):
            to[table.long().flatten()] = t.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
        o, lse = call("triton", q, *pages, page_table=table)
    assert cases.breaks("o", o, x64, [math], cases.C_FORWARD, o.dtype, by_head=False) == []
    assert cases.breaks("lse", lse, lse64, [lse_math], cases.C_FORWARD, torch.float32, by_head=False) == []


@pytest.mark.parametrize(("seed", "dtype"), list(draws("fp32", "bf16", "fp16")))
def test_softmax(seed, dtype):
    """softmax and log_softmax, their gradients and the bias's."""
    triton_or_skip()
    draw = random.Random(seed)
    columns = draw.randint(1, draw.choice((16, 200, 1500, 20000)))
    shape = [draw.randint(1, 6) for _ in range(draw.randint(0, 3))]
    while len(shape) > 1 and columns * torch.Size(shape).numel() > 200_000:
        shape.pop()
    options = maybe(draw, 0.3, dict(log=True)) | maybe(draw, 0.3, dict(scale=draw.uniform(-2, 2)))
    shape.append(columns)
    if draw.random() < 0.3:
        options["dim"] = draw.randrange(len(shape))
        shape[options["dim"]], shape[-1] = shape[-1], shape[options["dim"]]
    elif len(shape) > 1:
        options |= maybe(draw, 0.3, dict(causal=draw.choice((True, "top_left"))))
        options |= maybe(draw, 0.3, dict(mask=draw.choice(("random", "padding") if len(shape) == 4 else ("random",))))
        options |= maybe(draw, 0.3, dict(bias=draw.choice(("full", "key") if len(shape) == 4 else ("full",))))
    case = cases.SoftmaxCase(tuple(shape), options)
    x, options, dy = cases.softmax_problem(case, DTYPES[dtype], seed)
    assert cases.softmax_disagreements(x, options, dy, cases.run_softmax(x, options, dy, "triton")) == []
