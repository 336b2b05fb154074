"""`python -m llmfast check`: the case table on this machine, and a support table made from what passed."""

from functools import lru_cache, partial

import torch

from . import backends, cases, functional

CROSS_ENTROPY = {
    "plain": {},
    "every option": dict(label_smoothing=0.1, ignore_index=1, z_loss=0.01, softcap=5.0),
}
FEATURES = {  # a row of the support table and the cases that stand for it
    "full": ("square", "ragged", "long ragged", "one key", "single query"),
    "causal, bottom-right": ("causal", "causal 128", "causal more keys", "causal fewer keys"),
    "causal, top-left": ("top-left more keys", "top-left fewer keys"),
    "sliding window": ("window", "causal window", "window pair", "window past keys"),
    "grouped heads (GQA, MQA)": ("grouped heads", "one kv head"),
    "any head dim to 256": ("head 16", "odd head", "head 80", "odd wide head", "head 256"),
    "Dv != D": ("Dv != D", "Dv > D"),
    "bool mask": ("mask", "mask by row", "padding mask", "nothing visible"),
    "bias and its gradient": ("bias", "bias by head", "bias by key", "bias with -inf"),
    "softcap": ("softcap", "softcap causal"),
    "ALiBi": ("alibi", "alibi by batch"),
    "sinks and their gradient": ("sinks", "sinks, no key"),
    "dropout": ("dropout", "dropout causal"),
    "packed sequences": ("packed", "packed grouped", "packed window", "packed with a rest"),
    "lse and its gradient": ("gradient of lse",),
    "softmax, log_softmax": tuple(f"softmax: {n}" for n in ("ragged", "wide", "log", "causal tall", "mask", "bias")),
    "cross entropy": tuple(f"cross entropy: {n}" for n in CROSS_ENTROPY),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def device_of(backend: str) -> str | None:
    """Where a backend can be tried on this machine; None where it needs a GPU that isn't there."""
    if backend in ("cuda", "triton"):
        return "cuda" if torch.cuda.is_available() else None
    return "cpu"


@lru_cache(maxsize=8)  # the backends of a machine go over the few cases of a feature in turn
def _problem(name, dtype, device):
    """Ways to run a case on a backend, with its gradients and then without, and what is wrong with a result."""
    operation, _, case = name.rpartition(": ")
    if operation == "softmax":
        x, options, dy = cases.softmax_problem(cases.SOFTMAX_CASES[case], dtype, device=device)
        ways = [lambda backend, dy=dy: cases.run_softmax(x, options, dy, backend) for dy in (dy, None)]
        return ways, lambda got: cases.softmax_disagreements(x, options, dy, got)
    if operation == "cross entropy":
        return _cross_entropy(CROSS_ENTROPY[case], dtype, device)
    p = cases.problem(cases.CASES[case], dtype, device=device)
    ways = [p] if p.do is None else [p, p._replace(do=None, dlse=None)]
    yards = cases.yardsticks(p)
    return [partial(cases.run, way) for way in ways], lambda got: cases.disagreements(p, got, yards)


def _cross_entropy(options, dtype, device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 517, generator=g).mul(3).to(device, dtype)
    target = torch.randint(0, 517, (33,), generator=g).to(device)

    def run(backend, logits=logits):
        leaf = logits.detach().requires_grad_()
        loss = functional.cross_entropy(leaf, target, reduction="none", backend=backend, **options)
        return {"loss": loss.detach(), "dlogits": torch.autograd.grad(loss.sum(), leaf)[0]}

    truth, near = run("reference", logits.double()), run("reference")

    def wrong(got):
        c = {"loss": cases.C_FORWARD, "dlogits": cases.C_GRADIENT}
        judged = (cases.breaks(n, x, truth[n], [near[n]], c[n], x.dtype, by_head=False) for n, x in got.items())
        return [fault for faults in judged for fault in faults]

    return [run], wrong


def check_case(name: str, dtype: torch.dtype, backend: str) -> str:
    """'yes', 'forward' where there is no backward, 'no' where the backend refuses; raises RuntimeError on a wrong
    result.
    """
    ways, wrong = _problem(name, dtype, device_of(backend))
    for run, answer in zip(ways, ("yes", "forward"), strict=False):
        try:
            got = run(backend)
        except NotImplementedError:
            continue
        if faults := wrong(got):
            raise RuntimeError(f"{name} in {str(dtype)[6:]} on {backend} is wrong: {'; '.join(faults)}")
        return answer
    return "no"


def support_table(check=check_case, names=backends.ORDER, dtypes=DTYPES) -> list[list[str]]:
    """Rows of feature and, for each backend, what its cases say in float32 (bfloat16 where there is no float32)."""
    rows = [["", *names]]
    worst = lambda answers: min(answers, key=["no", "forward", "yes"].index)

    def cell(features, dtype, backend):
        return "not tried" if device_of(backend) is None else worst([check(n, dtype, backend) for n in features])

    for feature, features in FEATURES.items():
        row = [feature]
        for backend in names:
            answer = cell(features, torch.float32, backend)
            row.append(cell(features, torch.bfloat16, backend) if answer == "no" else answer)
        rows.append(row)
    for name, dtype in dtypes.items():
        rows.append([name, *(cell(FEATURES["full"], dtype, backend) for backend in names)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The table as the README has it."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def run_all(backend: str, dtypes=("float32", "bfloat16"), progress=None) -> tuple[int, list[str]]:
    """Every case on one backend: how many were right, and what was wrong."""
    right, wrong = 0, []
    for name in cases.CASES:
        for dtype in dtypes:
            try:
                right += check_case(name, DTYPES[dtype], backend) != "no"
            except RuntimeError as problem:
                wrong.append(str(problem))
        if progress:
            progress()
    return right, wrong
