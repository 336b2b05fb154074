"""Training: AdamW, warm-up and cosine, gradient clipping, bf16 autocast, checkpoints that a killed run goes on from."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import models
from . import corpus


@dataclass
class Settings:
    steps: int = 300
    batch_tokens: int = 2048
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    save_every: int = 100
    check_every: int = 25
    patience: int = 8


def rate(s: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))


def optimizer(model, s: Settings) -> torch.optim.AdamW:
    """AdamW; biases, norms and other vectors don't decay."""
    parameters = list(model.parameters())
    groups = [
        dict(params=[p for p in parameters if p.dim() > 1], weight_decay=s.weight_decay),
        dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)


def train_lm(
    model, pieces, s: Settings, folder, tokenizer=None, resume=False, report=lambda step, loss: None, validation=None
):  # fmt: skip
    """Trains model on token sequences, saving to folder; returns the losses of all steps.

    With validation sequences, their loss is taken every check_every steps; the model becomes the best one seen, and
    training ends when patience checks in a row were no better.

    The state after a step (weights, moments, random numbers, losses) is one file that appears whole. A run that was
    killed and is resumed has the losses it would have had. Ctrl-C saves and returns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    opt, losses, state = optimizer(model, s), [], folder / "training.pt"
    best = dict(loss=math.inf, step=0, model={})
    torch.manual_seed(s.seed)
    if resume:
        losses = restore(model, opt, s, state, best)
    per_epoch = None
    epoch, start = 0, 0
    model.train()
    try:
        for step in range(s.steps):
            if validation and len(losses) - best["step"] >= s.patience * s.check_every:
                break
            while per_epoch is None or step - start >= len(per_epoch):
                start, epoch = (0, 0) if per_epoch is None else (start + len(per_epoch), epoch + 1)
                per_epoch = corpus.batches(pieces, s.batch_tokens, epoch, s.seed)
            if step < len(losses):
                continue
            ids, target, cu = corpus.packed(per_epoch[step - start])
            for group in opt.param_groups:
                group["lr"] = rate(s, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
                loss = model.loss(ids, target, cu_seqlens=cu)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            if validation and (step + 1) % s.check_every == 0:
                check(model, validation, s, step + 1, best)
            report(step, losses[-1])
            if (step + 1) % s.save_every == 0 and step + 1 < s.steps:
                keep(model, opt, s, losses, state, best)
    except KeyboardInterrupt:
        opt.zero_grad()
    keep(model, opt, s, losses, state, best)
    if best["model"]:
        model.load_state_dict(best["model"])
    model.eval()
    finish(model, folder, tokenizer, losses)
    return losses


def check(model, validation, s, step, best) -> None:
    """Makes best the model where its loss on validation is the smallest so far."""
    model.eval()
    loss = surprisal(model, validation, s.batch_tokens).mean().item()
    model.train()
    if loss < best["loss"]:
        best.update(loss=loss, step=step, model={k: v.clone() for k, v in model.state_dict().items()})


def keep(model, opt, s, losses, path: Path, best) -> None:
    everything = dict(model=model.state_dict(), opt=opt.state_dict(), losses=losses, random=torch.get_rng_state())
    torch.save(everything | {"best": best} | {"settings": asdict(s)}, f"{path}.new")
    os.replace(f"{path}.new", path)


def restore(model, opt, s, path: Path, best) -> list[float]:
    if not path.is_file():
        return []
    try:
        found = torch.load(path, weights_only=True)
        before = {k: v for k, v in found["settings"].items() if k != "save_every"}
        if before != {k: v for k, v in asdict(s).items() if k != "save_every"}:
            raise ValueError(f"{path}: was made with other settings ({found['settings']}); use them, or another folder")
        model.load_state_dict(found["model"])
        opt.load_state_dict(found["opt"])
        best.update(found["best"])
    except (RuntimeError, EOFError, KeyError, AttributeError) as problem:
        raise ValueError(f"{path}: can't be resumed ({str(problem).splitlines()[0]})") from None
    torch.set_rng_state(found["random"])
    return found["losses"]


def finish(model, folder: Path, tokenizer, losses) -> None:
    """The model as others can load it: config.json, model.safetensors, tokenizer.json, the losses."""
    end = {} if tokenizer is None else dict(eos_token_id=tokenizer.token_to_id(corpus.END))
    end |= {"bos_token_id": end["eos_token_id"]} if end else {}
    models.save(model, folder, **end)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "losses.json").write_text(json.dumps(losses))


@torch.inference_mode()
def surprisal(model, pieces, batch_tokens: int = 2048) -> torch.Tensor:
    """-log p of each token after the first of each piece, in order, (T,) float32."""
    from .. import cross_entropy

    out, batch = [], []
    for i, piece in enumerate(pieces):
        batch.append(piece)
        if i + 1 == len(pieces) or sum(map(len, batch)) + len(pieces[i + 1]) > batch_tokens:
            ids, target, cu = corpus.packed(batch)
            out.append(cross_entropy(model(ids, cu_seqlens=cu), target, reduction="none"))
            batch = []
    return torch.cat(out)
