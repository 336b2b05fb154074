"""The thin transformer, the older language models, and checkpoints."""

from .checkpoints import from_pretrained, save
from .transformer import Cache, Config, Transformer

__all__ = ["Cache", "Config", "Transformer", "from_pretrained", "save"]
