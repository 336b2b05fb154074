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
    """A token's text; bytes in hex where it is a part of a character."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that stand for themselves
    rest = [b for b in range(256) if b not in plain]
    byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
    out = []
    for i in ids:
        name = tokenizer.id_to_token(i)
        text = tokenizer.decode([i])
        whole = "\ufffd" not in text
        out.append((text.replace(" ", "·") or name) if whole else " ".join(f"{byte[c]:02x}" for c in name if c in byte))
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
        escape = lambda t: "".join(c if ord(c) <= 0x2E7F else f"U+{ord(c):04X}" for c in t)
        columns, rows = list(map(escape, columns)), list(map(escape, rows))
    size = max(3.0, 0.32 * len(columns) + 1.6), max(2.6, 0.32 * len(rows) + 1.6)
    with plt.rc_context({"font.sans-serif": [*fonts, "DejaVu Sans"]}), warnings.catch_warnings():
        figure, axes = plt.subplots(1, len(p), figsize=(size[0] * len(p), size[1]), squeeze=False, layout="constrained")
        for axis, one, title in zip(axes[0], p, titles, strict=True):
            image = axis.imshow(one.float().cpu().tolist(), cmap="Blues", vmin=0, vmax=1)
            axis.set_xticks(range(len(columns)), columns, rotation=90)
            axis.set_yticks(range(len(rows)), rows)
            axis.set(title=title, xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axes[0, -1], label="weight")
        figure.savefig(path, dpi=130)
        plt.close(figure)
    if foreign and not fonts:
        return "no installed font shows Chinese: the characters stand as code points (install Noto Sans CJK)"
    return None
