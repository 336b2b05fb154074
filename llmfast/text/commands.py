"""The commands on text: the options of each, and what it does with them."""

import contextlib
import os
import sys
from pathlib import Path

import torch

from .. import models
from . import corpus, generation, tasks, training


def add(commands) -> None:
    """Adds the commands to argparse's sub-commands."""

    def command(run, help, model=True):
        c = commands.add_parser(run.__name__.replace("_", "-"), help=help, description=help)
        c.set_defaults(run=run)
        c.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
        if model:
            c.add_argument("--model", required=True, help="a folder in the Hugging Face layout, as train makes it")
        return c

    def sampling(c, temperature=0.0):
        c.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
        c.add_argument(
            "--temperature", type=float, default=temperature, help="0: the likeliest token (default: %(default)s)"
        )
        c.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest (default: all)")
        c.add_argument("--top-p", type=float, default=1.0, help="and from the fewest that reach p (default: 1)")
        c.add_argument("--stop", action="append", default=[], help="a token that ends the text; may be repeated")
        c.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    c = command(train, "train a model on a file: a language model, a classifier, a translator", model=False)
    c.add_argument("--task", choices=list(tasks.TASKS), default="lm", help="default: %(default)s")
    c.add_argument("--data", required=True, help=".txt, .jsonl or .tsv, a line each: a text; a text and its label; "
                   "a sentence and its translation")  # fmt: skip
    c.add_argument("--out", default="model", help="folder for the model and its checkpoints (default: %(default)s)")
    c.add_argument("--held-out", type=float, default=0.1, help="share kept for the marks (default: %(default)s)")
    c.add_argument("--init", help="a folder of train --task lm: its tokenizer, shape and weights are where this begins")
    for name, default in dict(vocab_size=500, dim=128, layers=2, heads=4, max_length=256).items():
        c.add_argument("--" + name.replace("_", "-"), type=int, default=default, help="default: %(default)s")
    said = dict(matrix_lr="Muon's for the blocks' matrices; 0: AdamW for all", lr="AdamW's",
                patience="checks without progress before the end; 0: never checked")  # fmt: skip
    for name, default in vars(training.Settings()).items():
        if name != "bf16":
            about = said.get(name, "") + " (default: %(default)s)"
            c.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=about.strip())
    c.add_argument("--dropout", type=float, default=0.15, help="default: %(default)s")
    c.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    c.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    c.add_argument("--overwrite", action="store_true", help="begin anew where --out holds a model of train")
    c.add_argument("--shard", action="store_true", help="under torchrun: divide weights and moments (FSDP2)")
    c = command(generate, "continue a prompt")
    c.add_argument("--prompt", required=True, action="append", help="may be repeated: a batch")
    sampling(c)
    c = command(classify, "the likeliest label of each text")
    c.add_argument("--text", action="append", default=[], help="may be repeated")
    c.add_argument("--data", help="a .tsv or .jsonl of texts and labels: accuracy, precision, recall, F1")
    c = command(translate, "translate sentences by beam search")
    c.add_argument("--text", action="append", default=[], help="may be repeated")
    c.add_argument("--data", help="a .tsv or .jsonl of sentences and translations: BLEU")
    c.add_argument("--held-out", type=float, help="with --data: only the share that train kept")
    c.add_argument("--beams", type=int, default=4, help="default: %(default)s")
    c = command(answer, "answer a question by continuing a prompt")
    c.add_argument("--question", required=True)
    c.add_argument("--context", default="", help="a text that holds the answer")
    c.add_argument("--examples", help="a .jsonl of question, context and answer: the prompt shows some of them first")
    c.add_argument("--shots", type=int, default=3, help="how many examples (default: %(default)s)")
    sampling(c)
    c = command(chat, "talk with a model, a line at a time; an empty line ends")
    sampling(c, temperature=0.7)
    c = command(evaluate, "perplexity of n-gram, neural network and transformer on held-out text")
    c.add_argument("--data", required=True, help="the file that train read: the same texts are held out")
    c.add_argument("--held-out", type=float, default=0.1, help="as given to train (default: %(default)s)")
    c.add_argument("--words", action="store_true", help="also an n-gram model of jieba's words")
    c = command(attention_map, "draw attention weights as a heat map")
    c.add_argument("--text", required=True)
    c.add_argument("--layer", type=int, default=-1, help="default: the last")
    c.add_argument("--heads", type=int, nargs="+", default=[0], help="default: 0")
    c.add_argument("--rows", type=int, nargs="+", help="only these queries")
    c.add_argument("--out", default="attention.png", help="default: %(default)s")


def main(chosen) -> int:
    """Runs a command; a user's mistake is one line and status 2."""
    try:
        gpu = torch.cuda.is_available()
        if chosen.device != "cpu" and not (gpu and chosen.device.startswith("cuda")):
            raise ValueError(
                f"--device {chosen.device}: expected cpu" + (" or cuda" if gpu else "; torch finds no GPU")
            )
        for name in ("prompt", "text", "question", "context", "stop"):
            given = getattr(chosen, name, None) or []
            if any("\udc80" <= c <= "\udcff" for c in "".join(given)):
                raise ValueError(f"--{name}: not UTF-8")
        chosen.run(chosen)
    except (ValueError, OSError, ModuleNotFoundError) as problem:
        print(f"llmfast {chosen.command}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def halves(path, share, columns=1):
    """A file's training, validation and held-out rows: the same in every command."""
    kept, held_out = corpus.split(corpus.distinct(corpus.load(path, columns)), share)
    return *corpus.split(kept, 0.05, "validation"), held_out


def load(a, task=None):
    """Model, tokenizer and task of --model; the task, if given, must be that one."""
    model, tokenizer = models.from_pretrained(a.model, device=a.device), corpus.load_tokenizer(a.model)
    found = tasks.of(model)
    if task is not None and type(found) is not tasks.TASKS[task]:
        made = next((name for name, t in tasks.TASKS.items() if t is type(found)), "hidden words")
        raise ValueError(f"{a.model}: was made for {made}; {a.command} needs a model of train --task {task}")
    return model, tokenizer, found


def train(a) -> None:
    """Under torchrun: one process for each device, each with its part of every batch."""
    import torch.distributed as dist

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return train_here(a)
    if a.device == "cuda":
        a.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(a.device)
    dist.init_process_group("nccl" if a.device.startswith("cuda") else "gloo")
    try:
        if dist.get_rank():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                train_here(a)
        else:
            train_here(a)
    finally:
        dist.destroy_process_group()


def train_here(a) -> None:
    from rich.progress import Progress

    Task, out = tasks.TASKS[a.task], Path(a.out)
    if a.resume and a.overwrite:
        raise ValueError("expected --resume or --overwrite, not both")
    if not (a.resume or a.overwrite) and (out / "training.pt").exists():
        raise ValueError(f"{out}: holds a run of train; --resume goes on, --overwrite begins anew")
    rows, validation, held_out = halves(a.data, a.held_out, Task.columns)
    if (out / "config.json").exists() and not (out / "training.pt").exists():
        raise ValueError(f"{out}: holds a model that train didn't make; give another --out")
    if not a.patience:
        rows, validation = rows + validation, []
    task = Task(rows + validation + held_out)
    if a.task == "classify" and len(task.labels) < 2:
        raise ValueError(f"{a.data}: expected at least 2 labels, got {task.labels[0]}")
    s = training.Settings(**{name: getattr(a, name) for name in vars(training.Settings())})
    torch.manual_seed(s.seed)
    if a.init:
        base, tokenizer = models.from_pretrained(a.init), corpus.load_tokenizer(a.init)
        model = tasks.begun(base, task, a.dropout).to(a.device)
        a.max_length = base.config.max_length
    else:
        seen = [text for row in rows for text in row[: 1 if a.task == "classify" else None]]
        again = a.resume and (out / "tokenizer.json").exists()
        tokenizer = corpus.load_tokenizer(out) if again else corpus.train_tokenizer(seen, a.vocab_size)
        hidden = -(-a.dim * 8 // 3 // 32) * 32  # swiglu has three matrices: two thirds of 4 dim
        shape = dict(dim=a.dim, hidden=hidden, layers=a.layers, heads=a.heads, max_length=a.max_length)
        shape |= dict(kind=task.kind, dropout=a.dropout, **task.options())
        model = models.Transformer(models.Config(tokenizer.get_vocab_size(), **shape)).to(a.device)
    examples = task.examples(rows, tokenizer, a.max_length)
    tokens, size = sum(map(task.size, examples)), sum(p.numel() for p in model.parameters())
    print(f"{len(rows)} texts, {tokens} tokens, {size / 1e6:.1f} million weights")
    with Progress() as bar:
        line = bar.add_task("training", total=s.steps)
        report = lambda step, loss: bar.update(line, completed=step + 1, description=f"loss {loss:.3f}")
        validation = task.examples(validation, tokenizer, a.max_length)
        if a.overwrite and int(os.environ.get("RANK", 0)) == 0:
            for name in ("training.pt", "config.json", "model.safetensors", "tokenizer.json"):
                (out / name).unlink(missing_ok=True)  # none of the old run may be taken for the new one's
        losses = training.train(model, task, examples, s, out, tokenizer, a.resume, report, validation, a.shard)
    if len(losses) < s.steps:
        print(f"{len(losses)} of {s.steps} steps: ended by --patience, or by Ctrl-C (--resume goes on)")
    model = models.from_pretrained(out, device=a.device)
    print(f"{marks(task.measure(model, tokenizer, held_out))} on {len(held_out)} held-out rows; {out} holds the model")


def marks(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" if value < 1.5 else f"{name} {value:.1f}" for name, value in found.items())


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


def beginning(folder, model, tokenizer) -> list[int]:
    """What stands before a text: the model's bos_token_id, or the token of a text's end where it has one."""
    own = models.checkpoints.read_json(Path(folder) / "config.json").get("bos_token_id")
    if not isinstance(own, int) or not 0 <= own < model.config.vocab_size:
        own = tokenizer.token_to_id(corpus.END)
    return [] if own is None else [own]


def stream(a, model, tokenizer, prompts: list[str], show=None, until=()) -> list[str]:
    """What follows each prompt; show is called with each new piece of the first. A text in `until` ends it, unsaid."""
    stop, start = ends(a.model, tokenizer, a.stop), beginning(a.model, model, tokenizer)
    ids = [start + tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    streams, texts = [generation.Stream(tokenizer, before) for before in ids], [""] * len(prompts)
    options = dict(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, stop=stop, seed=a.seed)
    for tokens in generation.generate(model, ids, a.max_new_tokens, **options):
        for b, token in enumerate(tokens):
            new = "" if token is None else streams[b].push(token)
            texts[b] += new
            if show and not b and new and not any(u in texts[0] for u in until):
                show(new)
        if until and all(any(u in t for u in until) for t in texts):
            return [t[: min(t.index(u) for u in until if u in t)] for t in texts]
    rest = [s.end() for s in streams]
    if show and rest[0]:
        show(rest[0])
    return [t + r for t, r in zip(texts, rest, strict=True)]


def generate(a) -> None:
    model, tokenizer, _ = load(a, "lm")
    say = lambda text: print(text, end="", flush=True)
    if len(a.prompt) == 1:
        say(a.prompt[0])
        stream(a, model, tokenizer, a.prompt, say)
        print()
    else:
        print("\n".join(p + t for p, t in zip(a.prompt, stream(a, model, tokenizer, a.prompt), strict=True)))


def texts_or_data(a):
    if bool(a.text) == bool(a.data):
        raise ValueError("expected --text or --data")
    a.clean = [corpus.clean(text) for text in a.text]
    if not all(a.clean):
        raise ValueError("--text: holds no text")


def classify(a) -> None:
    model, tokenizer, task = load(a, "classify")
    texts_or_data(a)
    if a.data:
        rows = corpus.load(a.data, 2)
        print(f"{marks(task.measure(model, tokenizer, rows))} on {len(rows)} rows")
        return
    batch = [
        ids for ids, _ in task.examples([(t, task.labels[0]) for t in a.clean], tokenizer, model.config.max_length)
    ]
    with torch.inference_mode():
        p, at = task.logits(model, batch).softmax(-1).max(-1)
    for text, label, certain in zip(a.clean, at.tolist(), p.tolist(), strict=True):
        print(f"{task.labels[label]}\t{certain:.2f}\t{text}")


def translate(a) -> None:
    model, tokenizer, _ = load(a, "translate")
    texts_or_data(a)
    if not a.data:
        print("\n".join(generation.translate(model, tokenizer, a.clean, a.beams)))
        return
    rows = corpus.load(a.data, 2) if a.held_out is None else halves(a.data, a.held_out, 2)[-1]
    said = generation.translate(model, tokenizer, [r[0] for r in rows], a.beams)
    for (heard, right), text in zip(rows, said, strict=True):
        print(f"{heard}\t{text}" + ("" if text == right else f"\t(right: {right})"))
    print(f"BLEU {tasks.bleu(said, [r[1] for r in rows]):.3f} on {len(rows)} sentences")


def question(text, context="", answer="") -> str:
    """The form of the corpus: 问 and 答 for Chinese."""
    asks, answers, gap = ("问\uff1a", "答\uff1a", "") if corpus.chinese(text) else ("Question: ", " Answer:", " ")
    return f"{context}{gap if context else ''}{asks}{text}{answers}{gap if answer else ''}{answer}"


def answer(a) -> None:
    model, tokenizer, _ = load(a, "lm")
    shown = []
    if a.examples:
        rows = [
            r
            for r in corpus.load(a.examples, 3)
            if corpus.chinese(r[0]) == corpus.chinese(a.question) and r[0] != a.question
        ]
        shown = [question(*r) for r in rows[: a.shots]]
    prompt = "\n".join([*shown, question(corpus.clean(a.question), corpus.clean(a.context))])
    print(stream(a, model, tokenizer, [prompt], until=("\n",))[0].strip())


def chat(a) -> None:
    """The model's own template where it has one (tokenizer_config.json), else question and answer."""
    model, tokenizer, _ = load(a, "lm")
    path, said = Path(a.model) / "tokenizer_config.json", []
    template = models.checkpoints.read_json(path).get("chat_template") if path.is_file() else None
    for line in iter(lambda: asked().strip(), ""):
        said.append({"role": "user", "content": line})
        while True:  # the oldest lines go where they don't fit
            prompt = rendered(template, said)
            room = model.config.max_length - len(tokenizer.encode(prompt, add_special_tokens=False).ids) - 1
            if room > min(a.max_new_tokens, model.config.max_length // 2) or len(said) == 1:
                break
            said = said[2:]
        until = () if template else ("\n", "Question:", "问\uff1a")
        text = stream(a, model, tokenizer, [prompt], lambda new: print(new, end="", flush=True), until)[0]
        print(flush=True)
        said.append({"role": "assistant", "content": text.strip()})


def asked() -> str:
    print("> " if sys.stdin.isatty() else "", end="", flush=True)
    try:
        line = sys.stdin.readline()
        line.encode()  # in the C locale Python lets through what isn't UTF-8
    except UnicodeError:
        raise ValueError("standard input: not UTF-8") from None
    return line


def rendered(template, said) -> str:
    if template is None:
        pairs = [(said[i]["content"], said[i + 1]["content"]) for i in range(0, len(said) - 1, 2)]
        return " ".join([*(question(q, "", w) for q, w in pairs), question(said[-1]["content"])])
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return made.render(messages=said, add_generation_prompt=True, bos_token="", eos_token="")
    except TemplateError as problem:
        raise ValueError(f"chat_template: {problem}") from None


def evaluate(a) -> None:
    from rich.console import Console
    from rich.table import Table

    model, tokenizer, task = load(a, "lm")
    rows, validation, held_out = halves(a.data, a.held_out)
    parts = (rows, validation, held_out)
    pieces, checked, held = (task.examples(r, tokenizer, model.config.max_length) for r in parts)
    torch.manual_seed(0)
    V = model.config.vocab_size
    console = Console()
    with console.status("counting n-grams, orders 2 to 7, and smoothing them"):
        ngram = models.NGram.best(pieces, checked, V)
    with console.status("training the neural network"):
        neural = models.NeuralLM(V).fit(pieces, checked)
    found = {
        f"{ngram.order}-gram, {ngram.smoothing}, the best of 24 on validation": ngram.surprisal(held),
        f"neural network, {neural.context} tokens of context": neural.surprisal(held),
        "transformer": tasks.surprisal(model, held),
    }
    table = Table("model", "perplexity", "bits a token", title=f"{len(found['transformer'])} held-out tokens")
    for name, nats in found.items():
        table.add_row(name, f"{tasks.perplexity(nats):.2f}", f"{nats.mean() / torch.tensor(2.0).log():.3f}")
    console.print(table)
    if a.words:
        best, perplexity, unknown = tasks.words(rows, validation, held_out)
        print(
            f"{best.order}-gram of jieba's words: perplexity {perplexity:.1f} a word, {unknown:.0%} never read before"
        )


def attention_map(a) -> None:
    from . import attention_map as maps

    model, tokenizer, _ = load(a)
    if model.config.kind == "encoder-decoder":
        raise ValueError(f"{a.model}: was made for translate; attention-map needs a decoder or an encoder alone")
    ids = tokenizer.encode(corpus.clean(a.text)).ids
    if not ids:
        raise ValueError("--text: holds no token")
    if a.rows and (bad := [r for r in a.rows if not 0 <= r < len(ids)]):
        raise ValueError(f"--rows: expected numbers below {len(ids)}, got {bad[0]}")
    p = maps.weights(model, ids, a.layer, a.heads, a.rows)
    names, layer = maps.labels(tokenizer, ids), a.layer % model.config.layers
    rows = names if a.rows is None else [names[r] for r in a.rows]
    if note := maps.draw(p, names, rows, [f"layer {layer}, head {h}" for h in a.heads], a.out):
        print(note, file=sys.stderr)
    print(f"{a.out}: {len(a.heads)} heads, {len(rows)} x {len(ids)} tokens")
