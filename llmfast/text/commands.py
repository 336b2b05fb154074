"""train, generate, evaluate and attention-map: the options of each, and what it does with them."""

import sys
from pathlib import Path

import torch

from .. import models
from . import corpus, generation, training


def add(commands) -> None:
    """Adds the four commands to argparse's sub-commands."""
    c = commands.add_parser("train", help="train a language model on a file of texts")
    c.add_argument("--task", choices=["lm"], default="lm")
    c.add_argument("--data", required=True, help=".txt, .jsonl or .tsv, a text a line")
    c.add_argument("--out", default="model", help="folder for the model and its checkpoints (default: model)")
    c.add_argument("--held-out", type=float, default=0.1, help="share of the texts kept for evaluate (default: 0.1)")
    for name, default in dict(vocab_size=500, dim=128, layers=4, heads=4, max_length=256).items():
        c.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=f"default: {default}")
    for name, default in vars(training.Settings()).items():
        if name != "bf16":
            c.add_argument(
                "--" + name.replace("_", "-"), type=type(default), default=default, help=f"default: {default}"
            )
    c.add_argument("--dropout", type=float, default=0.1, help="default: 0.1")
    c.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    c.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    c.set_defaults(run=train)
    c = commands.add_parser("generate", help="continue a prompt")
    c.add_argument("--model", required=True, help="a folder in the Hugging Face layout")
    c.add_argument("--prompt", required=True, action="append", help="may be repeated: a batch")
    c.add_argument("--max-new-tokens", type=int, default=100, help="default: 100")
    c.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    c.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest (default: all)")
    c.add_argument("--top-p", type=float, default=1.0, help="and from the fewest that reach p (default: 1)")
    c.add_argument("--stop", action="append", default=[], help="a token that ends the text; may be repeated")
    c.add_argument("--seed", type=int, default=0, help="default: 0")
    c.set_defaults(run=generate)
    c = commands.add_parser("evaluate", help="perplexity of n-gram, neural network and transformer on held-out text")
    c.add_argument("--model", required=True, help="the folder that train made")
    c.add_argument("--data", required=True, help="the file that train read: the same texts are held out")
    c.add_argument("--held-out", type=float, default=0.1, help="as given to train (default: 0.1)")
    c.add_argument("--order", type=int, default=3, help="of the n-gram model (default: 3)")
    c.set_defaults(run=evaluate)
    c = commands.add_parser("attention-map", help="draw attention weights as a heat map")
    c.add_argument("--model", required=True, help="a folder in the Hugging Face layout")
    c.add_argument("--text", required=True)
    c.add_argument("--layer", type=int, default=-1, help="default: the last")
    c.add_argument("--heads", type=int, nargs="+", default=[0], help="default: 0")
    c.add_argument("--rows", type=int, nargs="+", help="only these queries")
    c.add_argument("--out", default="attention.png", help="default: attention.png")
    c.set_defaults(run=attention_map)


def main(chosen) -> int:
    """Runs a command; a user's mistake is one line and status 2."""
    try:
        chosen.run(chosen)
    except (ValueError, OSError, ModuleNotFoundError) as problem:
        print(f"llmfast {chosen.command}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def pieces_of(path, share, tokenizer, length):
    """Token sequences of a file's training and held-out texts."""
    kept, held_out = corpus.split(corpus.distinct(corpus.load(path)), share)
    return corpus.sequences(kept, tokenizer, length), corpus.sequences(held_out, tokenizer, length)


def train(a) -> None:
    from rich.progress import Progress

    texts, held_out = corpus.split(corpus.distinct(corpus.load(a.data)), a.held_out)
    out = Path(a.out)
    if not a.resume and (out / "config.json").exists() and not (out / "training.pt").exists():
        raise ValueError(f"{out}: holds a model that train didn't make; give another --out")
    tokenizer = corpus.train_tokenizer(texts, a.vocab_size)
    texts, validation = corpus.split(texts, 0.05, "validation") if a.patience else (texts, [])
    validation = corpus.sequences(validation, tokenizer, a.max_length)
    s = training.Settings(**{name: getattr(a, name) for name in vars(training.Settings())})
    torch.manual_seed(s.seed)
    shape = dict(dim=a.dim, layers=a.layers, heads=a.heads, max_length=a.max_length, dropout=a.dropout)
    hidden = -(-a.dim * 8 // 3 // 32) * 32  # swiglu has three matrices: two thirds of 4 dim
    model = models.Transformer(models.Config(tokenizer.get_vocab_size(), hidden=hidden, **shape))
    pieces = corpus.sequences(texts, tokenizer, a.max_length)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} texts, {sum(map(len, pieces))} tokens, {size / 1e6:.1f} million weights")
    with Progress() as bar:
        line = bar.add_task("training", total=s.steps)
        report = lambda step, loss: bar.update(line, completed=step + 1, description=f"loss {loss:.3f}")
        losses = training.train_lm(model, pieces, s, out, tokenizer, a.resume, report, validation)
    if len(losses) < s.steps:
        print(f"{len(losses)} of {s.steps} steps: ended by --patience, or by Ctrl-C (--resume goes on)")
    perplexity = training.surprisal(model, corpus.sequences(held_out, tokenizer, a.max_length)).mean().exp()
    print(f"perplexity {perplexity:.1f} on {len(held_out)} held-out texts; {out} holds the model")


def ends(folder, tokenizer, stop) -> tuple[int, ...]:
    """Ids of the tokens that end a text: the model's own and those named."""
    own = models.checkpoints.read_json(Path(folder) / "config.json").get("eos_token_id")
    own = [] if own is None else own if isinstance(own, list) else [own]
    for text in stop:
        if tokenizer.token_to_id(text) is not None:
            own.append(tokenizer.token_to_id(text))
        elif len(ids := tokenizer.encode(text, add_special_tokens=False).ids) == 1:
            own += ids
        else:
            raise ValueError(f"--stop {text!r}: isn't one token")
    return tuple(own)


def generate(a) -> None:
    model, tokenizer = models.from_pretrained(a.model), corpus.load_tokenizer(a.model)
    stop = ends(a.model, tokenizer, a.stop)
    start = tokenizer.token_to_id(corpus.END)
    prompts = [([] if start is None else [start]) + tokenizer.encode(p, add_special_tokens=False).ids for p in a.prompt]
    streams = [generation.Stream(tokenizer) for _ in prompts]
    one = len(prompts) == 1
    texts = list(a.prompt)
    print(texts[0] if one else "", end="", flush=True)
    options = dict(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, stop=stop, seed=a.seed)
    for tokens in generation.generate(model, prompts, a.max_new_tokens, **options):
        for b, token in enumerate(tokens):
            new = "" if token is None else streams[b].push(token)
            texts[b] += new
            print(new if one else "", end="", flush=True)
    rest = [s.end() for s in streams]
    print(rest[0] if one else "\n".join(t + r for t, r in zip(texts, rest, strict=True)))


def evaluate(a) -> None:
    from rich.console import Console
    from rich.table import Table

    model, tokenizer = models.from_pretrained(a.model), corpus.load_tokenizer(a.model)
    pieces, held_out = pieces_of(a.data, a.held_out, tokenizer, model.config.max_length)
    torch.manual_seed(0)
    V = model.config.vocab_size
    neural = models.NeuralLM(V).fit(pieces)
    rows = {
        f"{a.order}-gram": models.NGram(a.order, V).fit(pieces).surprisal(held_out),
        f"neural network, {neural.context} tokens of context": neural.surprisal(held_out),
        "transformer": training.surprisal(model, held_out),
    }
    table = Table("model", "perplexity", "bits a token", title=f"{len(rows['transformer'])} held-out tokens")
    for name, nats in rows.items():
        table.add_row(name, f"{nats.mean().exp():.2f}", f"{nats.mean() / torch.tensor(2.0).log():.3f}")
    Console().print(table)


def attention_map(a) -> None:
    from . import attention_map as maps

    model, tokenizer = models.from_pretrained(a.model), corpus.load_tokenizer(a.model)
    ids = tokenizer.encode(a.text).ids
    if not ids:
        raise ValueError("--text: holds no token")
    if a.rows and (bad := [r for r in a.rows if not 0 <= r < len(ids)]):
        raise ValueError(f"--rows: expected numbers below {len(ids)}, got {bad[0]}")
    p = maps.weights(model, ids, a.layer, a.heads, a.rows)
    names = maps.labels(tokenizer, ids)
    rows = names if a.rows is None else [names[r] for r in a.rows]
    if note := maps.draw(p, names, rows, [f"layer {a.layer}, head {h}" for h in a.heads], a.out):
        print(note, file=sys.stderr)
    print(f"{a.out}: {len(a.heads)} heads, {len(rows)} x {len(ids)} tokens")
