"""The thin transformer, the older language models, and checkpoints."""

from .baselines import NeuralLM, NGram
from .checkpoints import from_pretrained, save
from .transformer import Cache, Config, Transformer

__all__ = ["Cache", "Config", "NGram", "NeuralLM", "Transformer", "from_pretrained", "save"]
