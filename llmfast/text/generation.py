"""The decoding loop: prompts read one at a time into a static cache, then all sequences a token at a time."""

from collections.abc import Iterator

import torch

from .. import functional as llmfast
from ..models import Cache


@torch.inference_mode()
def generate(
    model, prompts: list[list[int]], max_new_tokens: int = 100, *, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, stop: tuple[int, ...] = (), seed: int = 0,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yields, step by step, each prompt's next token id; None once it has stopped.

    Args:
        prompts: token ids of each; none empty.
        temperature: 0 takes the likeliest token; otherwise one is drawn, from the top_k likeliest (0: all) and of those
            from the fewest whose probabilities reach top_p.
        stop: ids that end a sequence; they are not yielded.
        seed: of every sequence's own random numbers, so that a text doesn't depend on the others.

    Raises:
        ValueError: an option out of range, or a prompt that leaves no room.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    longest = max(map(len, prompts)) + max_new_tokens
    device = model.embed.weight.device
    cache = Cache(model.config, len(prompts), min(longest, model.config.max_length), model.embed.weight)
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    rows = []
    for b, prompt in enumerate(prompts):
        hidden = model.hidden(torch.tensor([prompt], device=device), cache=cache[b])
        rows.append(model.words(hidden[:, -1]))
    logits = torch.cat(rows)  # (B, V)
    going, room = [True] * len(prompts), cache.kv.shape[3]
    for step in range(max_new_tokens):
        tokens = choose(logits, temperature, top_k, top_p, generators)
        going = [go and t not in stop for go, t in zip(going, tokens, strict=True)]
        yield [t if go else None for go, t in zip(going, tokens, strict=True)]
        going = [go and n < room for go, n in zip(going, cache.lengths.tolist(), strict=True)]
        if step + 1 == max_new_tokens or not any(going):
            return
        cache.lengths.clamp_(max=room - 1)  # who is full has stopped: what is written there is never looked at
        logits = model(torch.tensor(tokens, device=device)[:, None], cache=cache)[:, 0]


def check(model, prompts, max_new_tokens, temperature, top_k, top_p):
    if not prompts or not all(prompts):
        raise ValueError("prompt: holds no token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
        )
    if (longest := max(map(len, prompts))) > model.config.max_length:
        raise ValueError(f"prompt: {longest} tokens are more than the model's {model.config.max_length}")


def choose(logits, temperature, top_k, top_p, generators) -> list[int]:
    """One token of each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    p = llmfast.softmax(logits.float(), scale=1 / temperature)
    p, order = torch.sort(p, dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    p = p.masked_fill(p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True), 0)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))[:, 0].tolist()


class Stream:
    """Text of a growing list of byte-level tokens: what can't change any more, never half a character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.said = tokenizer, [], 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._rest(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def end(self) -> str:
        return self._rest(self.tokenizer.decode(self.ids))

    def _rest(self, text):
        new = text[self.said :]
        self.said = max(self.said, len(text))
        return new
