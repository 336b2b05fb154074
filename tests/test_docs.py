"""Every snippet of docs/drop-in.md runs, and what it replaces; of flash-attn, which needs a GPU, only what follows.
The support table of both READMEs is what the code prints.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jobs
import pytest
import torch

import llmfast
from llmfast import check

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/drop-in.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_has_its_snippets():
    assert len(SNIPPETS) == 9


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.split("\n# after")[-1].strip().splitlines()[-1][:40])
def test_snippet(snippet, tmp_path):
    names = dict(torch=torch, llmfast=llmfast, batch=torch.randn(2, 5, 32))
    names |= {x: torch.randn(1, 2, 5, 8) for x in "qkv"}
    names |= dict(scores=torch.randn(5, 5), logits=torch.randn(5, 9), target=torch.randint(0, 9, (5,)))
    names |= dict(hidden=torch.randn(5, 4), weight=torch.randn(9, 4))
    names["old"] = torch.nn.MultiheadAttention(512, 8)
    names["model"] = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    if "activate_flash" in snippet and not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash attention")
    if "AutoModel" in snippet:
        tr = pytest.importorskip("transformers", minversion="5")
        tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
        names |= dict(AutoModelForCausalLM=tr.AutoModelForCausalLM, folder=tmp_path)
    if "from flash_attn" in snippet:
        snippet = snippet.split("# after")[1].split("\n", 1)[1]
    exec(snippet, names)


def support_table(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    first = lines.index("|  | cuda | triton | cpu | reference |")
    return lines[first : first + len(check.FEATURES) + len(check.DTYPES) + 2]


def test_the_support_table_has_every_row():
    table = support_table("README.md")
    assert [line.split(" | ")[0][2:] for line in table[2:]] == [*check.FEATURES, *check.DTYPES]
    assert support_table("README.zh.md") == table


@cache
def printed_support_table():
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support_table"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.long
@jobs.job(printed_support_table)
def test_the_support_table_is_what_the_code_prints():
    assert support_table("README.md") == jobs.result(printed_support_table)
