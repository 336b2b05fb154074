"""Models end to end, random weights: prefill and decode of transformers with each attention, and the thin transformer
beside transformers with sdpa: a decoding step, generated tokens, a training step of GPT-2's smallest.

python -m benchmarks run models
python -m benchmarks run models --dtypes bfloat16 --lengths 256    (the training step's tokens)
"""

import os
import tempfile
from functools import cache
from typing import NamedTuple

import torch

import llmfast
import llmfast.models

NEW = 32  # tokens of a generated text


class Shape(NamedTuple):
    model: str
    dtype: str  # of a training step: bfloat16 is autocast over float32 weights
    step: str  # prefill: a prompt; decode: one token after it; generate: NEW tokens, greedy; train: one step of AdamW
    tokens: int
    backward: bool = False

    def __str__(self):
        return f"{self.model} {self.dtype} {self.step} {self.tokens}"


@cache
def theirs(model, dtype, device):
    """GPT-2's smallest (12 layers, 12 heads of 64), or 4 Llama-shaped layers, 16 heads of 64 on 4 key heads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llmfast.enable_hf()
    torch.manual_seed(0)
    if model == "gpt2":
        built = GPT2LMHeadModel(GPT2Config(n_positions=2048, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        heads = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, intermediate_size=2816)
        built = LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, num_hidden_layers=4, max_position_embeddings=8192, **heads)
        )
    return built.to(device, dtype).eval()


@cache
def thin(model, dtype, device):
    """The same weights in llmfast.models.Transformer."""
    with tempfile.TemporaryDirectory() as folder:
        theirs(model, dtype, device).save_pretrained(folder)
        return llmfast.models.from_pretrained(folder, device=device)


def providers(device):
    return {"sdpa": "sdpa", "eager": "eager", "llmfast": "llmfast", "llmfast thin": "thin"}


def skip(name, shape):
    return shape.step in ("train", "generate") and name in ("eager", "llmfast")


def shapes(device, lengths=(512,), dtypes=("float32", "bfloat16"), backward=False):
    """`lengths` are the training step's tokens."""
    for dtype in dtypes:
        for model in ("gpt2", "llama"):
            yield Shape(model, dtype, "prefill", 512)
            yield Shape(model, dtype, "decode", 1024)
        yield Shape("gpt2", dtype, "generate", 128)
        for tokens in lengths:
            yield Shape("gpt2", dtype, "train", tokens, True)


def inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 30000, (1, shape.tokens + (shape.step in ("decode", "train"))), generator=g).to(device)]


def call(provider, shape, tensors):
    (ids,) = tensors
    dtype = getattr(torch, shape.dtype)
    if shape.step == "train":
        return training(provider, shape, ids)
    model = (thin if provider == "thin" else theirs)(shape.model, dtype, ids.device.type)
    steps = {"prefill": prefill, "decode": decode, "generate": generate}
    run = steps[shape.step](provider, model, ids)

    def step():
        if provider != "thin":
            model.set_attn_implementation(provider)
        with torch.inference_mode():
            return run()

    return step


def prefill(provider, model, ids):
    if provider == "thin":
        return lambda: model.words(model.hidden(ids)[:, -1:])
    return lambda: model(ids, use_cache=False, logits_to_keep=1).logits


@torch.inference_mode()
def decode(provider, model, ids):
    if provider == "thin":
        seen = llmfast.models.Cache(model.config, 1, ids.shape[1], model.embed.weight)
        model.hidden(ids[:, :-1], cache=seen)
    else:
        seen = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def step():
        if provider == "thin":
            logits = model(ids[:, -1:], cache=seen)
            seen.lengths -= 1
        else:
            logits = model(ids[:, -1:], past_key_values=seen, logits_to_keep=1).logits
            seen.crop(-1)
        return logits

    return step


def generate(provider, model, ids):
    """How many tokens were made; how right they are is what decode measures."""
    if provider == "thin":
        from llmfast.text import generation

        return lambda: torch.tensor([len(list(generation.generate(model, ids.tolist(), NEW)))])
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return lambda: torch.tensor(
        [model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape[1] - ids.shape[1]]
    )


def training(provider, shape, ids):
    """Forward, backward and AdamW with a rate of 0, so that every step is the first; the loss and two gradients."""
    wide = torch.float64 if shape.dtype == "float64" else torch.float32
    model = (thin if provider == "thin" else theirs)(shape.model, wide, ids.device.type)
    opt = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    first = model.embed.weight if provider == "thin" else model.transformer.wte.weight
    last = model.decoder.last.weight if provider == "thin" else model.transformer.ln_f.weight

    def step():
        if provider != "thin":
            model.set_attn_implementation(provider)
        model.train()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=shape.dtype == "bfloat16"):
            if provider == "thin":
                loss = model.loss(ids[:, :-1], ids[:, 1:])
            else:
                loss = model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        out = loss.detach(), first.grad.clone(), last.grad.clone()
        opt.zero_grad()
        model.eval()
        return out

    return step


def truth(shape, tensors):
    if shape.step == "generate":
        return torch.tensor([NEW])
    return call("eager", shape._replace(dtype="float64"), tensors)()


def work(shape):
    return {"prefill": shape.tokens, "decode": 1, "generate": NEW, "train": shape.tokens}[shape.step], "tokens/s"
