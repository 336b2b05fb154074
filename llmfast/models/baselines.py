"""The language models before the transformer: n-gram counts, and the feed-forward network of Bengio et al. (2003)."""

import math

import torch
from torch import nn

from ..functional import cross_entropy


class NGram:
    """P(w | context) = C(context, w) / C(context), smoothed by Witten and Bell (1991), from nltk.lm.

    Every token of the vocabulary counts once more as a single word, so none is impossible.

    >>> NGram(3, vocab_size).fit(pieces).surprisal(held_out)
    """

    def __init__(self, order: int, vocab_size: int):
        if order < 1:
            raise ValueError(f"order: expected at least 1, got {order}")
        from nltk.lm import Vocabulary, WittenBellInterpolated

        self.order = order
        self.vocabulary = list(map(str, range(vocab_size)))  # nltk looks up text only
        self.lm = WittenBellInterpolated(
            order, vocabulary=Vocabulary(self.vocabulary, unk_cutoff=1, unk_label="unknown")
        )

    def fit(self, pieces: list[list[int]]) -> "NGram":
        from nltk.util import everygrams

        self.lm.fit(everygrams(list(map(str, p)), max_len=self.order) for p in pieces)
        self.lm.counts.update([[(w,) for w in self.vocabulary]])
        return self

    def surprisal(self, pieces: list[list[int]]) -> torch.Tensor:
        """-log p of each token after the first of each piece, in order."""
        out = []
        for p in (list(map(str, p)) for p in pieces):
            for i in range(1, len(p)):
                context = tuple(p[max(0, i - self.order + 1) : i])
                out.append(-math.log(self.lm.unmasked_score(p[i], context)))
        return torch.tensor(out)


class NeuralLM(nn.Module):
    """The next token from the embeddings of the `context` ones before it: embed, tanh layer, softmax."""

    def __init__(self, vocab_size: int, context: int = 4, dim: int = 64, hidden: int = 128, dropout: float = 0.2):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocab_size + 1, dim)  # the last row stands before a text's first token
        self.layers = nn.Sequential(
            nn.Flatten(-2), nn.Dropout(dropout), nn.Linear(context * dim, hidden), nn.Tanh(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(hidden, vocab_size)

    def windows(self, pieces: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, context) ids and (T,) targets."""
        blank = [self.embed.num_embeddings - 1] * self.context
        rows = [((blank + p[:i])[-self.context :], p[i]) for p in pieces for i in range(1, len(p))]
        return torch.tensor([r for r, _ in rows]), torch.tensor([t for _, t in rows])

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(windows)))

    def fit(self, pieces, epochs: int = 10, batch: int = 256, lr: float = 2e-3, seed: int = 0) -> "NeuralLM":
        x, y = self.windows(pieces)
        opt = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)
        g = torch.Generator().manual_seed(seed)
        self.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(y), generator=g).split(batch):
                cross_entropy(self(x[rows]), y[rows]).backward()
                opt.step()
                opt.zero_grad()
        return self.eval()

    @torch.inference_mode()
    def surprisal(self, pieces: list[list[int]]) -> torch.Tensor:
        x, y = self.windows(pieces)
        return torch.cat(
            [cross_entropy(self(a), b, reduction="none") for a, b in zip(x.split(4096), y.split(4096), strict=True)]
        )
