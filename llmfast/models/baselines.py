"""The language models before the transformer: n-gram counts, and the feed-forward network of Bengio et al. (2003)."""

import math
from collections import Counter, defaultdict

import torch
from torch import nn

from ..functional import cross_entropy


class NGram:
    """P(w | context) = C(context, w) / C(context), smoothed, from nltk.lm.

    smoothing is "witten-bell" (1991), or "kneser-ney" (1995) with its discount. Every token of the vocabulary counts
    once more as a single word, so none is impossible.

    >>> NGram(3, vocab_size).fit(pieces).surprisal(held_out)
    """

    def __init__(self, order: int, vocab_size: int, smoothing: str = "witten-bell", discount: float = 0.75):
        if order < 1:
            raise ValueError(f"order: expected at least 1, got {order}")
        from nltk.lm import NgramCounter

        self.words = list(map(str, range(vocab_size)))  # nltk looks up text only
        self.order, self.smoothing, self.discount, self.counts = order, smoothing, discount, NgramCounter()
        self._choose()

    def _choose(self):
        from nltk.lm import Vocabulary, WittenBellInterpolated
        from nltk.lm.models import InterpolatedLanguageModel

        words = Vocabulary(self.words, unk_cutoff=1, unk_label="unknown")
        if self.smoothing == "witten-bell":
            self.lm = WittenBellInterpolated(self.order, vocabulary=words, counter=self.counts)
        elif self.smoothing == "kneser-ney":
            options = dict(order=self.order, discount=self.discount, longest=self._longest, size=len(self.words))
            self.lm = InterpolatedLanguageModel(
                _kneser_ney(), self.order, vocabulary=words, counter=self.counts, params=options
            )
        else:
            raise ValueError(f"smoothing: expected witten-bell or kneser-ney, got {self.smoothing!r}")

    _longest = 0  # of the n-grams counted

    def _padded(self, piece, order):
        return [str(piece[0])] * (order - 2) + list(map(str, piece))  # so that a text's first words have whole contexts

    def fit(self, pieces: list[list[int]], longest: int | None = None) -> "NGram":
        from nltk.util import everygrams

        self._longest = longest or self.order
        self.counts.update(everygrams(self._padded(p, self._longest), max_len=self._longest) for p in pieces)
        self.counts.update([[(w,) for w in self.words]])
        self._choose()
        return self

    @classmethod
    def best(
        cls, pieces, validation, vocab_size: int, orders=(2, 3, 4, 5, 6, 7), discounts=(0.6, 0.75, 0.9)
    ) -> "NGram":
        """The order and smoothing that surprise least on validation, then fitted on both."""
        model, found = cls(max(orders), vocab_size).fit(pieces), []
        for order in orders:
            for smoothing, discount in [("witten-bell", 0.0), *(("kneser-ney", d) for d in discounts)]:
                model.order, model.smoothing, model.discount = order, smoothing, discount
                model._choose()
                found.append((model.surprisal(validation).mean().item(), order, smoothing, discount))
        _, order, smoothing, discount = min(found)
        return cls(order, vocab_size, smoothing, discount).fit(pieces + validation)

    def surprisal(self, pieces: list[list[int]]) -> torch.Tensor:
        """-log p of each token after the first of each piece, in order."""
        out, n = [], self.order
        for p in (self._padded(p, n) for p in pieces):
            for i in range(max(1, n - 1), len(p)):
                out.append(-math.log(self.lm.unmasked_score(p[i], tuple(p[i - n + 1 : i]))))
        return torch.tensor(out)


def _kneser_ney():
    from nltk.lm.smoothing import KneserNey

    class Remembered(KneserNey):
        """nltk's goes over all n-grams for every word asked; here what precedes is counted once."""

        def __init__(self, vocabulary, counter, longest, size, **options):
            super().__init__(vocabulary, counter, **options)
            self.before, self.size = defaultdict(Counter), size
            for n in range(2, self._order + 1 if longest else 0):
                for context, seen in self.counts[n].items():
                    self.before[context[1:]].update(seen.keys())
            self.totals = {context: words.total() for context, words in self.before.items()}

        def _continuation_counts(self, word, context=()):
            return self.before[context][word], self.totals[context]

        def unigram_score(self, word):
            if self._order == 1:
                return self.counts.unigrams.freq(word)
            count, total = self._continuation_counts(word)
            return (count + 1) / (total + self.size)

        def alpha_gamma(self, word, context):
            if len(context) + 1 == self._order:
                return super().alpha_gamma(word, context)
            if context not in self.totals:  # only ever at a text's beginning
                return 0.0, 1.0
            count, total = self._continuation_counts(word, context)
            taken = self.discount * len(self.before[context])  # from as many words as follow context anywhere
            return max(count - self.discount, 0.0) / total, taken / total

    return Remembered


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

    def fit(self, pieces, validation, epochs: int = 40, patience: int = 3, batch: int = 256, lr: float = 2e-3):
        """Becomes the best on validation; ends when it was no better for `patience` epochs."""
        x, y = self.windows(pieces)
        opt = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)
        g, best, waited = torch.Generator().manual_seed(0), (math.inf, {}), 0
        for _ in range(epochs):
            self.train()
            for rows in torch.randperm(len(y), generator=g).split(batch):
                cross_entropy(self(x[rows]), y[rows]).backward()
                opt.step()
                opt.zero_grad()
            loss = self.eval().surprisal(validation).mean().item()
            waited = 0 if loss < best[0] else waited + 1
            if not waited:
                best = loss, {k: v.clone() for k, v in self.state_dict().items()}
            if waited == patience:
                break
        self.load_state_dict(best[1])
        return self

    @torch.inference_mode()
    def surprisal(self, pieces: list[list[int]]) -> torch.Tensor:
        x, y = self.windows(pieces)
        return torch.cat(
            [cross_entropy(self(a), b, reduction="none") for a, b in zip(x.split(4096), y.split(4096), strict=True)]
        )
