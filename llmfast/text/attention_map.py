"""Attention weights of chosen layers and heads, drawn as heat maps with the tokens on both axes."""

import warnings

import torch

from .. import functional as llmfast

CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
           "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC")  # fmt: skip


@torch.inference_mode()
def weights(model, ids: list[int], layer: int, heads: list[int], rows: list[int] | None = None) -> torch.Tensor:
    """The probabilities (len(heads), rows, N) of one layer for N tokens; no other head's matrix is made."""
    blocks = (model.decoder or model.encoder).blocks
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer: expected a number below {len(blocks)}, got {layer}")
    if bad := [h for h in heads if not 0 <= h < model.config.heads]:
        raise ValueError(f"heads: expected numbers below {model.config.heads}, got {bad[0]}")
    seen = []

    def watch(q, k, attention):
        group = attention.H // attention.Hk
        at = [h // group for h in heads]
        options = dict(causal=attention.causal, window=attention.window, rows=rows)
        seen.append(llmfast.attention_weights(q[:, heads], k[:, at], **options)[0])

    blocks[layer].attention.watch = watch
    try:
        model.hidden(torch.tensor([ids], device=model.embed.weight.device))
    finally:
        blocks[layer].attention.watch = None
    return seen[0]


def labels(tokenizer, ids: list[int]) -> list[str]:
    """A token's text; "k/n" behind a character that it is the k-th of n parts of."""
    out, group = [], []
    for i in ids:
        group.append(i)
        text = tokenizer.decode(group, skip_special_tokens=False)
        if "\ufffd" in text and len(group) < 4 and len(out) + len(group) < len(ids):
            continue
        text = text.replace(" ", "\u00b7")
        out += [text] if len(group) == 1 else [f"{text} {k}/{len(group)}" for k in range(1, len(group) + 1)]
        group = []
    return out


def draw(p: torch.Tensor, columns: list[str], rows: list[str], titles: list[str], path) -> str | None:
    """Writes a PNG of p (heads, rows, columns); returns a sentence where no installed font has the characters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    names = {f.name for f in font_manager.fontManager.ttflist}
    fonts = [n for n in CHINESE if n in names]
    foreign = any(ord(c) > 0x2E7F for t in columns for c in t)
    if foreign and not fonts:
        escape = lambda t: "".join(c if ord(c) <= 0x2E7F else f"U+{ord(c):04X} " for c in t).strip()
        columns, rows = list(map(escape, columns)), list(map(escape, rows))
    across = min(len(p), 4)
    down = -(-len(p) // across)
    size = max(2.6, 0.3 * len(columns) + 0.4) * across + 2.2, (max(2.2, 0.3 * len(rows) + 0.4) + 1.4) * down
    with plt.rc_context({"font.sans-serif": [*fonts, "DejaVu Sans"]}), warnings.catch_warnings():
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharey=True)
        for axis in axes.flat[len(p) :]:
            axis.set_visible(False)
        for i, (axis, one, title) in enumerate(zip(axes.flat, p, titles, strict=False)):
            image = axis.imshow(one.float().cpu().tolist(), cmap="Blues", vmin=0, vmax=1)
            axis.set_xticks(range(len(columns)), columns, rotation=90)
            axis.set_yticks(range(len(rows)), rows)
            axis.set(title=title, xlabel="key", ylabel="" if i % across else "query")
        figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
    if foreign and not fonts:
        return "no installed font shows Chinese: the characters stand as code points (install Noto Sans CJK)"
    return None
