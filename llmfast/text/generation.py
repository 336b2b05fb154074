"""The decoding loop, and who picks the next token in it: the likeliest, a draw, or a beam search."""

import math
from collections.abc import Iterator

import torch

from .. import functional as llmfast
from ..models import Cache
from . import corpus

ROWS = 16  # as many as llmfast.linear takes with one read of the weight


def decode(model, cache, logits, pick, steps: int) -> Iterator[list[int]]:
    """Yields the tokens that pick takes from logits (B, V), step by step, until it is done or the cache is full.

    pick(logits) gives B tokens and, for a beam search, which sequence each of them goes on from. The model sees at most
    ROWS sequences at a time, so that on a CPU the bits of one don't depend on the others.
    """
    room = cache.kv.shape[3]
    parts = [slice(i, i + ROWS) for i in range(0, len(logits), ROWS)]
    caches = [cache[part] for part in parts]
    for step in range(steps):
        tokens, rows = pick(logits)
        yield tokens
        full = (cache.lengths >= room).tolist()
        if step + 1 == steps or pick.done(full):
            return
        if rows is not None:
            cache.reorder(torch.tensor(rows, device=model.device))
        cache.lengths.clamp_(max=room - 1)  # who is full has stopped: what is written there is never looked at
        ids = torch.tensor(tokens, device=model.device)[:, None]
        logits = torch.cat([model(ids[part], cache=some)[:, 0] for part, some in zip(parts, caches, strict=True)])


class Sampler:
    """Each sequence's likeliest token, or one drawn; the first that stops a sequence and what follows don't count."""

    def __init__(self, batch, device, temperature=0.0, top_k=0, top_p=1.0, stop=(), seed=0):
        self.options, self.stop = (temperature, top_k, top_p), stop
        self.generators = [torch.Generator(device).manual_seed(seed) for _ in range(batch)]
        self.going = [True] * batch

    def __call__(self, logits):
        tokens = choose(logits, *self.options, self.generators)
        self.going = [go and t not in self.stop for go, t in zip(self.going, tokens, strict=True)]
        return tokens, None

    def done(self, full) -> bool:
        self.going = [go and not f for go, f in zip(self.going, full, strict=True)]
        return not any(self.going)


class Beam:
    """The `beams` likeliest beginnings of each sentence, until it has as many ends or limits tokens.

    The best end has the largest mean log p. A sentence that has stopped is frozen, so that none depends on the others.
    """

    def __init__(self, limits: list[int], beams: int, stop: int):
        self.K, self.stop, self.limits = beams, stop, limits
        self.scores = torch.full((len(limits), beams), -torch.inf)
        self.scores[:, 0] = 0.0  # at first all beams of a sentence are the same
        self.texts = [[] for _ in range(len(limits) * beams)]
        self.ends = [[] for _ in limits]  # (mean log p, tokens)
        self.stopped = [False] * len(limits)

    def __call__(self, logits):
        K, V = self.K, logits.shape[-1]
        log_p = llmfast.log_softmax(logits.float()).cpu().view(-1, K, V) + self.scores[..., None]
        best, at = log_p.flatten(1).topk(min(2 * K, K * V))  # at most K of 2 K end
        tokens, rows, texts = [], [], []
        for b, (scores, places) in enumerate(zip(best.tolist(), at.tolist(), strict=True)):
            kept = []
            for score, place in zip(scores, places, strict=True):
                row, token = b * K + place // V, place % V
                if token != self.stop and len(kept) < K:
                    kept.append((score, row, token))
                elif token == self.stop and score > -torch.inf and not self.stopped[b]:
                    self.ends[b].append((score / (len(self.texts[row]) + 1), self.texts[row]))
            self.scores[b] = torch.tensor([score for score, _, _ in kept])
            rows += [row for _, row, _ in kept]
            tokens += [token for _, _, token in kept]
            texts += [[*self.texts[row], token] for _, row, token in kept]
            self.stopped[b] = self.stopped[b] or len(self.ends[b]) >= K or len(texts[-1]) >= self.limits[b]
            if self.stopped[b] and not self.ends[b]:
                self.ends[b].append((-torch.inf, texts[b * K]))  # it never ended: its likeliest beginning
        self.texts = texts
        return tokens, rows

    def done(self, full) -> bool:
        return all(self.stopped)

    def best(self) -> list[list[int]]:
        return [max(ends)[1] for ends in self.ends]


@torch.inference_mode()
def generate(
    model, prompts: list[list[int]], max_new_tokens: int = 100, *, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, stop: tuple[int, ...] = (), seed: int = 0,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yields, step by step, each prompt's next token id; None once it has stopped.

    Args:
        prompts: token ids of each; none empty. They are read one at a time, so that no text depends on the others.
        temperature: 0 takes the likeliest token; otherwise one is drawn, from the top_k likeliest (0: all) and of those
            from the fewest whose probabilities reach top_p.
        stop: ids that end a sequence; they are not yielded.
        seed: of every sequence's own random numbers.

    Raises:
        ValueError: an option out of range, or a prompt that leaves no room.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    longest = max(map(len, prompts)) + max_new_tokens
    cache = Cache(model.config, len(prompts), min(longest, model.config.max_length), model.embed.weight)
    rows = []
    for b, prompt in enumerate(prompts):
        hidden = model.hidden(torch.tensor([prompt], device=model.device), cache=cache[b])
        rows.append(model.words(hidden[:, -1]))
    pick = Sampler(len(prompts), model.device, temperature, top_k, top_p, stop, seed)
    for tokens in decode(model, cache, torch.cat(rows), pick, max_new_tokens):
        yield [t if go else None for go, t in zip(pick.going, tokens, strict=True)]


@torch.inference_mode()
def translate(model, tokenizer, sentences: list[str], beams: int = 4, batch: int = 16) -> list[str]:
    """Each sentence's translation by an encoder-decoder, the best of a beam search."""
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    end, length, out = tokenizer.token_to_id(corpus.END), model.config.max_length, []
    for some in (sentences[i : i + batch] for i in range(0, len(sentences), batch)):
        heard = [[end, *e.ids] for e in tokenizer.encode_batch(some)]
        if longest := next((h for h in heard if len(h) > length), None):
            raise ValueError(f"a sentence of {len(longest)} tokens is longer than the model's {length}")
        memory = [model.encode(torch.tensor([h], device=model.device))[0] for h in heard]
        limits = [min(length, 2 * len(h) + 20) for h in heard]
        cache = Cache(model.config, len(some) * beams, max(limits), model.embed.weight)
        model.remember(cache, memory, beams)
        first = torch.full((len(some) * beams, 1), end, device=model.device)
        pick = Beam(limits, beams, end)
        logits = torch.cat(
            [model(first[i : i + beams], cache=cache[i : i + beams])[:, 0] for i in range(0, len(first), beams)]
        )
        for _ in decode(model, cache, logits, pick, max(limits)):
            pass
        out += [tokenizer.decode(ids).strip() for ids in pick.best()]
    return out


def check(model, prompts, max_new_tokens, temperature, top_k, top_p):
    if not prompts or not all(prompts):
        raise ValueError("prompt: holds no token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"expected a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
        )
    if (longest := max(map(len, prompts))) > model.config.max_length:
        raise ValueError(f"prompt: {longest} tokens are more than the model's {model.config.max_length}")


def choose(logits, temperature, top_k, top_p, generators) -> list[int]:
    """One token of each row of logits (B, V)."""
    if temperature < 1e-6:  # 1 / temperature times a logit stays finite
        return logits.argmax(-1).tolist()
    p = llmfast.softmax(logits.float(), scale=1 / temperature)
    p, order = torch.sort(p, dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    p = p.masked_fill(p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True), 0)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))[:, 0].tolist()


class Stream:
    """Text of a growing list of tokens behind `before`: what can't change any more, never half a character.

    All are decoded together, since SentencePiece's decoder takes the space from the first word of what it is given.
    """

    def __init__(self, tokenizer, before=()):
        self.tokenizer, self.ids, self.said = tokenizer, list(before), len(tokenizer.decode(list(before)))

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._rest(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def end(self) -> str:
        return self._rest(self.tokenizer.decode(self.ids))

    def _rest(self, text):
        new = text[self.said :]
        self.said = max(self.said, len(text))
        return new
