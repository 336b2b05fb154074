"""Corpus, training that survives a kill, generation, perplexities, attention maps, and the commands' errors."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("nltk")
from llmfast import cli
from llmfast.models import Config, NeuralLM, NGram, Transformer, from_pretrained
from llmfast.text import attention_map, corpus, generation, tasks, training

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**options):
    torch.manual_seed(0)
    model = Transformer(
        Config(300, **(dict(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=64, tied=False) | options))
    )
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 6  # so that the logits aren't flat
    return model.eval()


def test_load_and_clean(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "e\u0301\x00a\ufeff <|endoftext|>b"}) + "\n\n", encoding="utf-8")
    assert corpus.load(path) == [("\u00e9a  b",)]
    (tmp_path / "a.tsv").write_text("one\ttwo\nthree\n")
    assert corpus.load(tmp_path / "a.tsv") == [("one",), ("three",)]
    (tmp_path / "b.tsv").write_text("one\ttwo\tmore\n")
    (tmp_path / "b.jsonl").write_text('{"q": "one", "a": "two"}')
    assert corpus.load(tmp_path / "b.tsv", 2) == corpus.load(tmp_path / "b.jsonl", 2) == [("one", "two")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"x", "expected .txt, .jsonl or .tsv"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b"1" * 5_000, "line 1: not JSON"),
        ("a.jsonl", b"[1]", 'expected an object with a string "text"'),
        ("b.tsv", b"one\ttwo\nthree", "line 2: expected 2 texts, got 1"),
        ("b.txt", b"one", "line 1: expected 2 texts, got 1"),
        ("b.jsonl", b'{"a": "b", "c": 1}', "line 1: expected 2 texts"),
        ("b.jsonl", b'{"label": "b", "sentence": "a"}', 'line 1: expected "text" and "label", or'),
        ("b.jsonl", b'{"id": "7", "text": "a", "label": "b"}', 'line 1: expected "text" and "label", or'),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        corpus.load(tmp_path / name, 2 if name[0] == "b" else 1)


def test_lines_end_at_the_newline_alone(tmp_path):
    """U+2028, U+0085, VT and a lone CR are inside a text; a byte order mark and CRLF are not."""
    for name, row in (("a.txt", "{}"), ("a.jsonl", '{{"text": "{}"}}')):
        text = "one\u2028two\u0085three" + ("\x0bfour\rfive" if name == "a.txt" else "")
        (tmp_path / name).write_bytes(("\ufeff" + row.format(text) + "\r\n" + row.format("six")).encode())
        assert corpus.load(tmp_path / name) == [(corpus.clean(text),), ("six",)]


def test_the_end_marker_is_never_made_by_cleaning():
    for inside in ("\x00", "\u200b", "\ufeff"):
        assert corpus.END not in corpus.clean(f"a<|endof{inside}text|>b")
    assert corpus.clean("e\u200b\u0301") == "\u00e9"


def test_columns_have_names(tmp_path, capsys):
    rows = {
        (1, ("a",)): '{"id": "7", "text": "a"}',
        (2, ("a", "b")): '{"label": "b", "text": "a"}\n{"target": "b", "source": "a"}\n{"one": "a", "two": "b"}',
        (3, ("a", "", "b")): '{"answer": "b", "context": "", "question": "a"}',
    }
    for (columns, want), text in rows.items():
        (tmp_path / "a.jsonl").write_text(text)
        assert set(corpus.load(tmp_path / "a.jsonl", columns)) == {want}
    assert capsys.readouterr().err == ""
    (tmp_path / "a.tsv").write_text("one\ttwo\nthree\t \n\tfour\n\n")
    assert corpus.load(tmp_path / "a.tsv", 2) == [("one", "two")]
    assert "2 rows with an empty text are left out" in capsys.readouterr().err


def test_a_near_duplicate_whose_own_gram_is_the_rarest_is_found():
    assert corpus.distinct([("abcdefgh",), ("abcdefghi",)]) == [("abcdefgh",)]  # 4 of 5 grams: 0.8


def test_duplicates_go():
    long = "Attention weighs every word by how much it matters to the word that is being written."
    texts = [long, long, long.replace("every", "Every") + "!", "Another sentence altogether.", "短句。"]
    assert corpus.distinct([(t,) for t in texts]) == [(long,), ("Another sentence altogether.",), ("短句。",)]


def test_split_depends_on_the_text_alone():
    texts = [(f"text {i}",) for i in range(500)]
    kept, held = corpus.split(texts, 0.2)
    assert corpus.split(texts[::-1], 0.2)[1] == held[::-1]
    assert 60 < len(held) < 140
    assert sorted(kept + held) == sorted(texts)


def test_tokenizer_round_trip_and_packing():
    texts = [text for (text,) in corpus.load(EXAMPLES / "corpus.txt")]
    tokenizer = corpus.train_tokenizer(texts, 500)
    for text in [*texts, "𝄞 emoji 😀 and 汉字"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    pieces = corpus.sequences(texts[:3], tokenizer, 8)
    ids, target, cu = corpus.packed(pieces)
    assert max(map(len, pieces)) == 9
    assert cu.diff().tolist() == [len(p) - 1 for p in pieces]
    assert target[:7].tolist() == ids[1:8].tolist()
    asked = [t for p in pieces for t in p[1:]]
    assert asked == [t for e in tokenizer.encode_batch(texts[:3]) for t in [*e.ids, 0]]  # every token once


def little_run(folder, die=-1, how=signal.SIGINT, report=None):
    """20 steps, saved every 5, resumed where something is there; how is raised in step die. The losses."""
    report = report or (lambda step, loss: step == die and signal.raise_signal(how))
    torch.manual_seed(0)
    model = Transformer(Config(50, dim=32, layers=1, heads=2, max_length=16, dropout=0.1))
    pieces = [torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(40)]
    s = training.Settings(steps=20, batch_tokens=64, warmup=3, save_every=5)
    return training.train(model, tasks.LanguageModel(), pieces, s, folder, resume=True, report=report)


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path):
    whole = little_run(tmp_path / "whole")
    assert len(whole) == 20
    call = f"little_run({str(tmp_path / 'a')!r}, 12, signal.SIGKILL)"
    code = f"import signal; from tests.test_text import little_run; {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert len(torch.load(tmp_path / "a" / "training.pt")["losses"]) == 10
    assert little_run(tmp_path / "a") == whole


def test_an_interrupted_run_is_usable_and_goes_on(tmp_path):
    losses = little_run(tmp_path, die=7)
    assert len(losses) == 8
    from_pretrained(tmp_path)
    assert little_run(tmp_path) == little_run(tmp_path / "whole")


def test_an_interrupt_inside_a_step_waits_for_its_end(tmp_path, monkeypatch):
    """Ctrl-C when AdamW has made its part of step 7 and Muon hasn't."""
    step, calls = torch.optim.Muon.step, []

    def interrupted(self, *arguments, **named):
        calls.append(len(calls) == 7 and signal.raise_signal(signal.SIGINT))
        return step(self, *arguments, **named)

    whole = little_run(tmp_path / "whole")
    monkeypatch.setattr(torch.optim.Muon, "step", interrupted)
    assert len(little_run(tmp_path / "a")) == 8
    assert little_run(tmp_path / "a") == whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_at_once(tmp_path):
    calls = lambda step, loss: step == 7 and [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        little_run(tmp_path, report=calls)
    assert len(torch.load(tmp_path / "training.pt")["losses"]) == 5
    assert not (tmp_path / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "held", [b"", b"\x80", b"x" * 99, [], {"settings": {}}, "no losses", "losses of text"], ids=repr
)
def test_a_bad_checkpoint_is_one_error(tmp_path, held):
    little_run(tmp_path)
    path = tmp_path / "training.pt"
    if isinstance(held, bytes):
        path.write_bytes(held)
    elif isinstance(held, str):
        whole = torch.load(path)
        whole["losses"] = "abc"
        torch.save(whole if held == "losses of text" else {k: v for k, v in whole.items() if k != "losses"}, path)
    else:
        torch.save(held, path)
    with pytest.raises(ValueError, match=r"training\.pt: ") as error:
        little_run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    (tmp_path / "training.pt.new").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"training\.pt: can't be written") as error:
        little_run(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "training.pt.new").is_symlink()


def test_the_model_kept_is_the_best_on_the_validation_texts(tmp_path):
    """Random texts: what is learned of 10 of them by heart makes 10 others ever less likely, and training ends."""

    def random_run(folder, die=-1):
        torch.manual_seed(0)
        model = Transformer(Config(50, dim=32, layers=1, heads=2, max_length=16))
        pieces = [torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(20)]
        s = training.Settings(steps=200, batch_tokens=64, lr=1e-2, warmup=3, save_every=5, check_every=4, patience=3)
        lm, report = tasks.LanguageModel(), lambda step, loss: step == die and signal.raise_signal(signal.SIGINT)
        losses = training.train(model, lm, pieces[:10], s, folder, None, True, report, pieces[10:])
        return losses, tasks.surprisal(model, pieces[10:]).mean().item()

    losses, final = random_run(tmp_path / "whole")
    best = torch.load(tmp_path / "whole" / "training.pt")["best"]
    assert len(losses) == best["step"] + 12 < 200
    assert abs(final - best["loss"]) <= 1e-5
    assert tasks.surprisal(from_pretrained(tmp_path / "whole"), [[1, 2, 3]]).isfinite().all()
    random_run(tmp_path / "a", die=6)
    assert random_run(tmp_path / "a") == (losses, final)


def collect(model, prompts, **options):
    out = [[] for _ in prompts]
    for tokens in generation.generate(model, prompts, **options):
        for b, t in enumerate(tokens):
            out[b] += [] if t is None else [t]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(temperature=0.8, top_k=20, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_batch_gives_the_same_text(options, dtype):
    model, prompts = tiny().to(dtype), [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2]]
    together = collect(model, prompts, max_new_tokens=20, **options)
    assert together == [collect(model, [p], max_new_tokens=20, **options)[0] for p in prompts]
    assert len({t for row in together for t in row}) > 5
    assert [len(row) for row in together] == [20] * 3
    stop = together[0][4]
    stopped = collect(model, prompts, max_new_tokens=20, stop=(stop,), **options)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in together]


def test_greedy_is_the_argmax_of_the_whole_sequence():
    model, ids = tiny(), [5, 6, 7]
    (got,) = collect(model, [ids], max_new_tokens=70)
    assert len(got) == 64 - 3 + 1  # the model's positions are used up, and the last one still predicts
    with torch.inference_mode():
        whole = model(torch.tensor([[*ids, *got[:-1]]]))[0, 2:]
    assert whole.argmax(-1).tolist() == got


def test_top_k_and_top_p():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).log_softmax(-1).expand(400, -1)
    draw = lambda k, p: set(
        generation.choose(logits, 1.0, k, p, [torch.Generator().manual_seed(i) for i in range(400)])
    )
    assert draw(0, 1.0) == {0, 1, 2, 3}
    assert draw(2, 1.0) == {1, 2}
    assert draw(0, 0.6) == {1}
    assert draw(0, 0.7) == {1, 2}


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_p=0),
        dict(top_k=-1),
        dict(max_new_tokens=0),
    ],
)
def test_bad_generation(bad):
    with pytest.raises(ValueError, match="expected"):
        next(generation.generate(tiny(), [[1]], **bad))
    with pytest.raises(ValueError, match="holds no token"):
        next(generation.generate(tiny(), [[]]))


def test_a_temperature_next_to_0_is_greedy():
    assert collect(tiny(), [[1]], max_new_tokens=9, temperature=1e-45) == collect(tiny(), [[1]], max_new_tokens=9)


def test_stream_never_says_half_a_character():
    tokenizer = corpus.train_tokenizer(["abc"], 260)
    text, stream = "a人😀b", None
    stream = generation.Stream(tokenizer)
    said = [stream.push(t) for t in tokenizer.encode(text).ids]
    assert "".join(said) + stream.end() == text
    assert all("\ufffd" not in s for s in said)


def test_a_stream_keeps_the_space_before_its_first_word():
    """SentencePiece's decoder takes the first space of what it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", "\u2581one", "\u2581two", "s"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    for before, tokens, want in (([0, 1], [2, 3], " twos"), ([0], [1, 2], "one two"), ([1], [3, 2], "s two")):
        stream = generation.Stream(tokenizer, before)
        assert "".join(map(stream.push, tokens)) + stream.end() == want


def test_ngram_is_counts_smoothed():
    pieces = [[0, 1, 2, 1, 2], [0, 1, 3]]
    model = NGram(2, 5).fit(pieces)
    # C(1, .) = 2, 2, 3: lambda = 3 / (3 + 2); C(2) + 1 = 3 of 8 + 5 tokens
    assert math.isclose(model.surprisal([[1, 2]]).exp().item(), 1 / (0.6 * 2 / 3 + 0.4 * 3 / 13), rel_tol=1e-5)
    total = sum((-model.surprisal([[1, w]])).exp().item() for w in range(5))
    assert math.isclose(total, 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_sums_to_one_in_every_context(order):
    rand = lambda i, *size: torch.randint(1, 7, size, generator=torch.Generator().manual_seed(i)).tolist()
    pieces = [[0, *rand(i, 1 + i % 9), 0] for i in range(30)]
    model = NGram(order, 9, "kneser-ney").fit(pieces)
    for prefix in ([0], [0, 1], [0, 1, 2], [0, 8, 8, 8], [0, 1, 1, 3, 2], [0, *rand(3, 3)]):
        total = sum((-model.surprisal([[*prefix, w]])[-1]).exp().item() for w in range(9))
        assert math.isclose(total, 1.0, rel_tol=1e-5), (prefix, total)


def test_surprisal_counts_the_same_tokens():
    pieces = [[0, 5, 6, 7, 0], [0, 8, 0], [0, 9, 9, 0]]
    model = tiny()
    got = tasks.surprisal(model, pieces, batch_tokens=6)
    with torch.inference_mode():
        want = [model(torch.tensor([p[:-1]])).log_softmax(-1)[0, range(len(p) - 1), p[1:]] for p in pieces]
    assert torch.allclose(got, -torch.cat(want), atol=1e-5)
    assert len(got) == len(NeuralLM(300).surprisal(pieces)) == len(NGram(2, 300).fit(pieces).surprisal(pieces))


def test_attention_map_rows_and_heads(tmp_path):
    model = tiny()
    p = attention_map.weights(model, [1, 2, 3, 4, 5], 1, [0, 3], rows=[2, 4])
    assert p.shape == (2, 2, 5)
    assert torch.allclose(p.sum(-1), torch.ones(2, 2))
    assert (p[:, 0, 3:] == 0).all()
    whole = attention_map.weights(model, [1, 2, 3, 4, 5], 1, [0, 1, 2, 3])
    assert torch.allclose(whole[[0, 3]][:, [2, 4]], p)
    attention_map.draw(p, list("abcd人"), ["c", "人"], ["0", "3"], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_commands(tmp_path, capsys):
    data, out = tmp_path / "some.txt", tmp_path / "model"
    lines = (EXAMPLES / "corpus.txt").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:40]), encoding="utf-8")
    small = ["--steps", 8, "--dim", 32, "--layers", 1, "--vocab-size", 400, "--warmup", 2, "--save-every", 4]
    code, said, _ = run(capsys, "train", "--data", data, "--out", out, *small)
    assert code == 0
    assert "held-out rows" in said
    code, said, _ = run(capsys, "generate", "--model", out, "--prompt", "人工智能", "--max-new-tokens", 8)
    assert code == 0
    assert said.startswith("人工智能")
    both = ["--prompt", "人工智能", "--prompt", "A model"]
    code, batch, _ = run(capsys, "generate", "--model", out, *both, "--max-new-tokens", 8)
    assert batch.splitlines()[0] == said.rstrip("\n")
    code, said, _ = run(capsys, "evaluate", "--model", out, "--data", data)
    assert code == 0
    assert "transformer" in said
    code, *_ = run(capsys, "attention-map", "--model", out, "--text", "A model 人工智能", "--out", tmp_path / "a.png")
    assert code == 0


def test_only_the_same_run_goes_on(tmp_path, capsys):
    """Another file, share, shape or task under --resume, and any run without it, leave what is there as it was."""
    lines = (EXAMPLES / "corpus.txt").read_text(encoding="utf-8").splitlines()
    for name, part in (("a", lines[:40]), ("b", lines[20:100])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    out = tmp_path / "model"
    small = ["--steps", 2, "--dim", 32, "--layers", 1, "--vocab-size", 300, "--warmup", 1, "--out", out]
    go = lambda name, *more: run(capsys, "train", "--data", tmp_path / f"{name}.txt", *small, *more)
    code, first, err = go("a")
    assert code == 0, err
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    for name, more, message in (
        ("a", [], "--resume goes on, --overwrite begins anew"),
        ("b", ["--resume"], "other examples (--data, --held-out)"),
        ("a", ["--resume", "--held-out", 0.2], "other examples (--data, --held-out)"),
        ("a", ["--resume", "--dim", 64], "another dim (32, not 64)"),
        ("a", ["--resume", "--overwrite"], "--resume or --overwrite"),
    ):
        code, _, err = go(name, *more)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    code, again, err = go("a", "--resume")
    assert (code, again.splitlines()[-1]) == (0, first.splitlines()[-1]), err
    shutil.copytree(out, tmp_path / "foreign")
    (tmp_path / "foreign" / "training.pt").unlink()
    for how in ("--resume", "--overwrite"):
        code, _, err = go("a", "--out", tmp_path / "foreign", how)
        assert code == 2
        assert "holds a model that train didn't make" in err
    code, _, err = go("b", "--overwrite")
    assert code == 0, err
    assert (out / "tokenizer.json").read_bytes() != files["tokenizer.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.txt"], "No such file"),
        (["train", "--data", "corpus.csv"], "expected .txt"),
        (["train", "--data", "corpus.txt", "--device", "abacus"], "--device abacus: expected cpu"),
        (["generate", "--model", "nowhere", "--prompt", "a"], "no such folder"),
        (["evaluate", "--model", "nowhere", "--data", "x.txt"], "no such folder"),
        (["attention-map", "--model", "nowhere", "--text", "a"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_by_hand():
    done = subprocess.run(
        [sys.executable, "examples/attention_by_hand.py"], cwd=EXAMPLES.parent, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ".", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sum to 1.000000" in done.stdout
