"""What differs between the tasks: the columns of the data, its examples, the model, the loss of a batch, the marks.

lm         a text a line                    next token; a decoder
classify   sentence, label                  the label from the mean of the last hidden states; an encoder
translate  sentence, its translation        next token of the translation, given the sentence; encoder and decoder
"""

from collections import Counter
from dataclasses import replace

import torch

from .. import functional as llmfast
from .. import models
from . import corpus


class LanguageModel:
    columns, kind = 1, "decoder"

    def __init__(self, rows=()):
        pass

    def examples(self, rows, tokenizer, length: int) -> list[list[int]]:
        return corpus.sequences([r[0] for r in rows], tokenizer, length)

    def asked(self, example) -> int:
        """How many predictions the loss is the mean of."""
        return len(example) - 1

    def size(self, example) -> int:
        return len(example)

    def loss(self, model, batch) -> torch.Tensor:
        ids, target, cu = corpus.packed(batch, model.device)
        return model.loss(ids, target, cu_seqlens=cu)

    def options(self) -> dict:
        """Fields of the model's Config that follow from the data."""
        return {}

    def measure(self, model, tokenizer, rows) -> dict[str, float]:
        return {"perplexity": perplexity(surprisal(model, self.examples(rows, tokenizer, model.config.max_length)))}


class Classification(LanguageModel):
    columns, kind = 2, "encoder"

    def __init__(self, rows=(), labels=()):
        self.labels = list(labels) or sorted({r[1] for r in rows})

    def examples(self, rows, tokenizer, length):
        number = {label: i for i, label in enumerate(self.labels)}
        ids = [e[: length + 1] for e in corpus.sequences([r[0] for r in rows], tokenizer, 2**30)]
        if unknown := next((r[1] for r in rows if r[1] not in number), None):
            raise ValueError(f"the label {unknown!r} isn't one of {', '.join(self.labels)}")
        return [(e[:-1], number[r[1]]) for e, r in zip(ids, rows, strict=True)]

    def asked(self, example):
        return 1

    def size(self, example):
        return len(example[0])

    def logits(self, model, batch) -> torch.Tensor:
        """(B, labels) of token sequences."""
        ids, cu = corpus.joined(batch, model.device)
        return model.classify(ids, cu)

    def loss(self, model, batch):
        target = torch.tensor([label for _, label in batch], device=model.device)
        return llmfast.cross_entropy(self.logits(model, [ids for ids, _ in batch]), target)

    def options(self):
        return dict(labels=tuple(self.labels))

    def measure(self, model, tokenizer, rows):
        """Accuracy, and precision, recall and F1 as means over the labels."""
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_f1_score,
            multiclass_precision,
            multiclass_recall,
        )

        examples = self.examples(rows, tokenizer, model.config.max_length)
        with torch.inference_mode():
            batches = ([ids for ids, _ in batch] for batch in corpus.in_order(examples, 8192, self.size))
            got = torch.cat([self.logits(model, batch).argmax(-1).cpu() for batch in batches])
        want, n = torch.tensor([label for _, label in examples]), len(self.labels)
        macro = dict(precision=multiclass_precision, recall=multiclass_recall, F1=multiclass_f1_score)
        found = {"accuracy": multiclass_accuracy(got, want, n, average="micro")}
        found |= {name: f(got, want, n, average="macro") for name, f in macro.items()}
        return {name: value.item() for name, value in found.items()}


class Translation(LanguageModel):
    columns, kind = 2, "encoder-decoder"

    def examples(self, rows, tokenizer, length):
        sides = [corpus.sequences([r[i] for r in rows], tokenizer, 2**30) for i in (0, 1)]
        if longest := next((e for side in sides for e in side if len(e) > length + 1), None):
            raise ValueError(f"a sentence of {len(longest)} tokens is longer than the model's {length}")
        return list(zip(*sides, strict=True))

    def asked(self, example):
        return len(example[1]) - 1

    def size(self, example):
        return len(example[0]) + len(example[1])

    def loss(self, model, batch):
        heard, cu_heard = corpus.joined([heard for heard, _ in batch], model.device)
        ids, target, cu = corpus.packed([said for _, said in batch], model.device)
        memory = model.encode(heard, cu_heard)
        return model.loss(ids, target, cu_seqlens=cu, memory=memory, cu_memory=cu_heard)

    def measure(self, model, tokenizer, rows, beams: int = 4):
        from . import generation

        said = generation.translate(model, tokenizer, [r[0] for r in rows], beams)
        return {"BLEU": bleu(said, [r[1] for r in rows])}


TASKS = {"lm": LanguageModel, "classify": Classification, "translate": Translation}


def of(model: models.Transformer):
    """The task that a model was made for; None for an encoder without labels, such as BERT."""
    if model.config.labels:
        return Classification(labels=model.config.labels)
    made = {"decoder": LanguageModel, "encoder-decoder": Translation}.get(model.config.kind)
    return made and made()


def begun(base: models.Transformer, task, dropout: float) -> models.Transformer:
    """A model for a task whose blocks, the encoder's and the decoder's, are those of a language model."""
    model = models.Transformer(replace(base.config, kind=task.kind, dropout=dropout, **task.options()))
    read = {n.replace("decoder.", to): t for n, t in base.state_dict().items() for to in ("decoder.", "encoder.")}
    model.load_state_dict(model.state_dict() | {n: read[n] for n in model.state_dict() if n in read})
    return model


def perplexity(nats: torch.Tensor) -> float:
    return nats.mean().exp().item()


def bleu(said: list[str], right: list[str]) -> float:
    """BLEU (Papineni et al., 2002), 0 to 1, of all sentences together: words in English, characters in Chinese."""
    from torchmetrics.text import SacreBLEUScore

    return SacreBLEUScore(tokenize="zh" if corpus.chinese("".join(right)) else "13a")(said, [[r] for r in right]).item()


def words(rows, validation, held_out) -> tuple[models.NGram, float, float]:
    """The best n-gram model of jieba's words, its perplexity a word, and how many held-out words were never read.

    A word that was read fewer than twice stands as its part of speech.
    """
    tagged = [[corpus.words(r[0]) for r in part] for part in (rows, validation, held_out)]
    seen = Counter(w for text in tagged[0] for w, _ in text)
    number = {"": 0}
    for text in tagged[0]:
        for w, tag in text:
            number.setdefault(w if seen[w] > 1 else f"<{tag}>", len(number))
    ids = lambda w, tag: number.get(w, number.get(f"<{tag}>", 0))
    pieces = [[[0, *(ids(*w) for w in text), 0] for text in part] for part in tagged]
    model = models.NGram.best(*pieces[:2], len(number))
    every = [w for text in tagged[2] for w, _ in text]
    return model, perplexity(model.surprisal(pieces[2])), sum(w not in seen for w in every) / len(every)


@torch.inference_mode()
def surprisal(model, pieces, batch_tokens: int = 2048) -> torch.Tensor:
    """-log p of each token after the first of each piece, in order, (T,) float32."""
    out = []
    for batch in corpus.in_order(pieces, batch_tokens):
        ids, target, cu = corpus.packed(batch, model.device)
        out.append(llmfast.cross_entropy(model(ids, cu_seqlens=cu), target, reduction="none").cpu())
    return torch.cat(out)
