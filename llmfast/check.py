"""`python -m llmfast check`: the case table on this machine, and a support table made from what passed."""

from functools import lru_cache

import torch

from . import backends, cases

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
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def device_of(backend: str) -> str | None:
    """Where a backend can be tried on this machine; None where it needs a GPU that isn't there."""
    if backend in ("cuda", "triton"):
        return "cuda" if torch.cuda.is_available() else None
    return "cpu"


@lru_cache(maxsize=8)  # the backends of a machine go over the few cases of a feature in turn
def _judge(name, dtype, device):
    p = cases.problem(cases.CASES[name], dtype, device=device)
    return p, cases.yardsticks(p)


def check_case(name: str, dtype: torch.dtype, backend: str) -> str:
    """'yes', 'forward' where there is no backward, 'no' where the backend refuses; raises RuntimeError on a wrong
    result.
    """
    p, yards = _judge(name, dtype, device_of(backend))
    tried = [p] if p.do is None else [p, p._replace(do=None, dlse=None)]
    for problem, answer in zip(tried, ("yes", "forward"), strict=False):
        try:
            got = cases.run(problem, backend)
        except NotImplementedError:
            continue
        if wrong := cases.disagreements(problem, got, yards):
            raise RuntimeError(f"{name} in {str(dtype)[6:]} on {backend} is wrong: {'; '.join(wrong)}")
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
