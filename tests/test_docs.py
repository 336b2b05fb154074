"""Every snippet of docs/drop-in.md runs, and what it replaces; of flash-attn, which needs a GPU, only what follows."""

import re
from pathlib import Path

import pytest
import torch

import llmfast

PAGE = Path(__file__).parent.parent / "docs/drop-in.md"
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
