"""Tokens per second of a GPT-2-sized and a Llama-shaped model (random weights), prefill and decode, end to end.

python -m benchmarks run models
"""

import os
from functools import cache
from typing import NamedTuple

import torch

import llmfast


class Shape(NamedTuple):
    model: str
    dtype: str
    step: str  # prefill: a prompt of `tokens`; decode: one token after `tokens`
    tokens: int
    backward: bool = False

    def __str__(self):
        return f"{self.model} {self.dtype} {self.step} {self.tokens}"


def load(model: str, dtype: torch.dtype, device: str, implementation: str):
    """GPT-2's smallest (12 heads of 64), or Llama-shaped with 16 heads of 64 on 4 key heads; 4 layers of each."""
    built = _build(model, dtype, device)
    built.set_attn_implementation(implementation)
    return built


@cache
def _build(model, dtype, device):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llmfast.enable_hf()
    torch.manual_seed(0)
    if model == "gpt2":
        built = GPT2LMHeadModel(GPT2Config(n_layer=4, n_positions=4096))
    else:
        heads = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, intermediate_size=2816)
        built = LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, num_hidden_layers=4, max_position_embeddings=8192, **heads)
        )
    return built.to(device, dtype).eval()


def providers(device):
    return {"sdpa": "sdpa", "eager": "eager", "llmfast": "llmfast"}


def shapes(device, lengths=(), dtypes=("float32", "bfloat16"), backward=False):
    for dtype in dtypes:
        for model in ("gpt2", "llama"):
            yield Shape(model, dtype, "prefill", 512)
            yield Shape(model, dtype, "decode", 1024)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 30000, (1, shape.tokens + (shape.step == "decode")), generator=g).to(device)]


def call(provider, shape, tensors):
    (ids,) = tensors
    model = load(shape.model, getattr(torch, shape.dtype), ids.device.type, provider)
    with torch.inference_mode():
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values if shape.step == "decode" else None

    def step():
        model.set_attn_implementation(provider)
        with torch.inference_mode():
            if cache is None:
                return model(ids, use_cache=False, logits_to_keep=1).logits
            logits = model(ids[:, -1:], past_key_values=cache, logits_to_keep=1).logits
            cache.crop(-1)
            return logits

    return step


def truth(shape, tensors):
    return call("eager", shape._replace(dtype="float64"), tensors)()


def work(shape):
    return shape.tokens if shape.step == "prefill" else 1, "tokens/s"


def skip(name, shape):
    return False
