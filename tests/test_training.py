"""Swapping the kernels does not change training: 32 steps, the same losses to 2e-5."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
tr = pytest.importorskip("transformers", minversion="5")

import llmfast

llmfast.enable_hf()
SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def llama():
    return tr.LlamaForCausalLM(tr.LlamaConfig(**SHAPE, num_key_value_heads=2))


def gemma2():
    return tr.Gemma2ForCausalLM(tr.Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=6))


def gpt2():
    return tr.GPT2LMHeadModel(
        tr.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
    )


class Encoder(nn.Module):
    """Predicts each token's left neighbour."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, labels):
        logits = self.head(self.blocks(self.embed(input_ids)))
        return {"loss": F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())}


def losses(make, implementation):
    torch.manual_seed(0)
    model = make().train()
    if isinstance(model, tr.PreTrainedModel):
        model.set_attn_implementation(implementation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(32):
        ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(step % 4))
        loss = model(input_ids=ids, labels=ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


LONG = [pytest.param(make, marks=pytest.mark.long) for make in (llama, gpt2, Encoder)]


@pytest.mark.parametrize("make", [gemma2, *LONG])
def test_training(make):
    """Eager, llmfast, PyTorch's sdpa, and sdpa inside `with llmfast.sdpa()`; Gemma 2's softcap has no sdpa."""
    want, found = losses(make, "eager"), []
    if make is not Encoder:
        found.append(losses(make, "llmfast"))
    if make is not gemma2:
        found.append(losses(make, "sdpa"))
        with llmfast.sdpa():
            found.append(losses(make, "sdpa"))
    assert want[-1] < want[0]
    for got in found:
        assert ((got - want).abs() <= 2e-5 * want).all()
