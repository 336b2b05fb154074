"""Training: Muon and AdamW, warm-up and cosine, clipping, bf16 autocast, checkpoints that a killed run goes on from."""

import json
import math
import signal
import threading
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from torch import nn

from .. import models
from . import corpus


@dataclass
class Settings:
    steps: int = 2500
    batch_tokens: int = 1024
    lr: float = 2e-3
    matrix_lr: float = 0.03
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    save_every: int = 100
    check_every: int = 100
    patience: int = 8


def rate(s: Settings, step: int) -> float:
    """The part of the learning rate in a step: linear warm-up, then half a cosine down to nothing."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizers(model, s: Settings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for all else; AdamW alone if matrix_lr is 0.

    Biases, norms and other vectors don't decay.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and ".blocks." in name and s.matrix_lr > 0]
    taken = set(map(id, matrices))
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        dict(params=[p for p in rest if p.dim() > 1], weight_decay=s.weight_decay),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)
    muon = [torch.optim.Muon(matrices, lr=s.matrix_lr, weight_decay=s.weight_decay)] if matrices else []
    return [adamw, *muon]


class Step(nn.Module):
    """A task's loss as a module's forward: what DistributedDataParallel wraps."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch):
        return self.task.loss(self.model, batch)


def train(
    model, task, examples, s: Settings, folder, tokenizer=None, resume=False, report=lambda step, loss: None,
    validation=None, shard=False,
):  # fmt: skip
    """Trains model on the examples of a task (tasks.py), saving to folder; returns the losses of all steps.

    With validation examples, their loss is taken every check_every steps; the model becomes the best one seen, and
    training ends when patience checks in a row were no better.

    The state after a step (weights, moments, losses) is one file that appears whole; random numbers follow from the
    step. A run that was killed and is resumed has the losses it would have had. Ctrl-C ends the step, saves and
    returns; a second one doesn't wait. Under torchrun every process takes its part of each batch; the losses are those
    of one process, and the first one writes. Weights, gradients and moments are copied (DistributedDataParallel) or,
    with shard, divided (FSDP2).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    step_of = Step(model, task)
    if world > 1 and shard:
        from torch.distributed.fsdp import fully_shard

        for stack in filter(None, (model.encoder, model.decoder)):
            for block in stack.blocks:
                fully_shard(block)
        fully_shard(step_of)
    opts, losses, state = optimizers(model, s), [], folder / "training.pt"
    rates = [[group["lr"] for group in opt.param_groups] for opt in opts]
    best = dict(loss=math.inf, step=0, model={}, checks=[])
    made = identity(model, task, (examples, validation), tokenizer)
    if resume:
        losses = restore(model, opts, s, state, best, made)
    if world > 1 and not shard:
        step_of = nn.parallel.DistributedDataParallel(step_of)
    per_epoch, epoch, start = None, 0, 0
    model.train()
    with finishing_steps() as came:
        for step in range(s.steps):
            if validation and len(losses) - best["step"] >= s.patience * s.check_every:
                break
            while per_epoch is None or step - start >= len(per_epoch):
                start, epoch = (0, 0) if per_epoch is None else (start + len(per_epoch), epoch + 1)
                per_epoch = corpus.batches(examples, s.batch_tokens, epoch, s.seed, task.size)
            if step < len(losses):
                continue
            batch = per_epoch[step - start]
            torch.manual_seed((s.seed * 1_000_003 + step) * world + rank)  # of dropout: the same after a restart
            mine = batch[rank::world]  # where there are fewer than processes, the rest count an example for nothing
            part = sum(map(task.asked, mine)) / sum(map(task.asked, batch)) if mine else 0.0
            with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
                loss = step_of(mine or batch[:1]) * part
            (loss * world).backward()  # the processes' gradients are averaged
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            for opt, base in zip(opts, rates, strict=True):
                for group, lr in zip(opt.param_groups, base, strict=True):
                    group["lr"] = lr * rate(s, step)
                opt.step()
                opt.zero_grad()
            reached = torch.stack([loss.detach(), loss.new_tensor(len(came))])
            if world > 1:
                dist.all_reduce(reached)  # all end after the same step
            losses.append(reached[0].item())
            if validation and (step + 1) % s.check_every == 0:
                check(step_of, model, task, validation, s, step + 1, best)
            report(step, losses[-1])
            if (step + 1) % s.save_every == 0 and step + 1 < s.steps:
                keep(model, opts, s, losses, state, best, made)
            if reached[1] if world > 1 else came:
                break
        keep(model, opts, s, losses, state, best, made)
        if best["model"]:
            load_whole(model, [], best["model"], {})
        model.eval()
        weights, _ = whole_state(model, opts)
        if rank == 0:
            finish(model.config, weights, folder, tokenizer, losses, best["checks"])
    if world > 1:
        dist.barrier()  # nobody goes on before the model is there
    return losses


@contextmanager
def finishing_steps():
    """Gives a list that a first Ctrl-C is noted in, so that the step is made whole; a second one is KeyboardInterrupt.

    Only the main thread is ever interrupted, and a handler that isn't Python's is left alone.
    """
    came, before = [], signal.getsignal(signal.SIGINT)

    def note(number, frame):
        came.append(number)
        signal.signal(number, before)

    ours = threading.current_thread() is threading.main_thread() and callable(before)
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@torch.no_grad()
def check(step_of, model, task, validation, s, step, best) -> None:
    """Makes best the model where its loss on validation is the smallest so far."""
    model.eval()
    total = sum(map(task.asked, validation))
    batches = corpus.in_order(validation, s.batch_tokens, task.size)
    loss = sum(step_of(b).item() * sum(map(task.asked, b)) for b in batches) / total
    model.train()
    best["checks"].append((step, loss))
    if loss < best["loss"]:
        weights, _ = whole_state(model, [])
        best.update(loss=loss, step=step, model={k: v.clone() for k, v in weights.items()})


def whole_state(model, opts) -> tuple[dict, dict]:
    """Weights and moments of the whole model, also where the processes have a part each; every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # half a second of imports

    return get_state_dict(model, opts, options=StateDictOptions(full_state_dict=True))


def load_whole(model, opts, weights, moments) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(model, opts, model_state_dict=weights, optim_state_dict=moments, options=whole)


def identity(model, task, examples, tokenizer) -> dict:
    """What a run that goes on has in common with the one before."""
    crc = lambda text: zlib.crc32(text.encode())
    return asdict(model.config) | {
        "task": type(task).__name__,
        "tokenizer": tokenizer and crc(tokenizer.to_str()),
        "examples (--data, --held-out)": crc(repr(examples)),
    }


def keep(model, opts, s, losses, path: Path, best, made) -> None:
    weights, moments = whole_state(model, opts)
    everything = dict(model=weights, opts=moments, losses=losses, best=best, settings=asdict(s), made=made)
    if dist.is_initialized() and dist.get_rank():
        return
    with models.checkpoints.whole(path) as new:
        torch.save(everything, new)


def restore(model, opts, s, path: Path, best, made) -> list[float]:
    if not path.is_file():
        return []
    try:
        found = torch.load(path, weights_only=True, map_location=model.device)
        before = {k: v for k, v in found["settings"].items() if k != "save_every"}
        if before != {k: v for k, v in asdict(s).items() if k != "save_every"}:
            raise ValueError(f"{path}: was made with other settings ({found['settings']}); use them, or another folder")
        if other := [name for name in made if found["made"][name] != made[name]]:
            name = other[0]
            values = f" ({found['made'][name]}, not {made[name]})" if name in asdict(model.config) else ""
            kind = "other" if name.startswith("examples") else "another"
            raise ValueError(f"{path}: was made with {kind} {name}{values}; use that, or another folder")
        if not all(isinstance(loss, float) for loss in found["losses"]):
            raise TypeError("its losses aren't numbers")
        load_whole(model, opts, found["model"], found["opts"])
        best.update(found["best"])
        return found["losses"]
    except (RuntimeError, EOFError, LookupError, AttributeError, TypeError, UnpicklingError) as problem:
        why = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ValueError(f"{path}: can't be resumed ({why})") from None


def finish(config, weights, folder: Path, tokenizer, losses, checks) -> None:
    """The model as others can load it: config.json, model.safetensors, tokenizer.json; the losses, and their plot."""
    end = {} if tokenizer is None else dict(eos_token_id=tokenizer.token_to_id(corpus.END))
    end |= {"bos_token_id": end["eos_token_id"]} if end else {}
    model = models.Transformer(config)
    model.load_state_dict(weights)
    models.save(model, folder, **end)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "losses.json").write_text(json.dumps(losses))
    plot(losses, checks, folder / "losses.png")


def plot(losses, checks, path) -> None:
    """Each step's loss, their running mean, and the loss on the validation texts, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    mean, means = losses[0] if losses else 0.0, []
    for loss in losses:
        mean += 0.05 * (loss - mean)
        means.append(mean)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=0.8, label="each step")
    axis.plot(range(1, len(losses) + 1), means, color="tab:blue", label="running mean")
    if checks:
        axis.plot(*zip(*checks, strict=True), "o-", color="tab:orange", markersize=3, label="validation")
    axis.set(xlabel="step", ylabel="loss (nats)")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
