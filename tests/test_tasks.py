"""Classification, translation by beam search, question answering, chat: what they lose, pick, measure and refuse."""

import io
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("torchmetrics")
from llmfast import cli
from llmfast.models import Cache, Config, Transformer, from_pretrained, save
from llmfast.text import commands, corpus, generation, tasks, training

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def sharp(model):
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 6  # so that the logits aren't flat
    return model.eval()


def translator(vocab_size=300, **options):
    torch.manual_seed(0)
    shape = dict(dim=32, layers=2, heads=4, hidden=48, max_length=64, kind="encoder-decoder")
    return sharp(Transformer(Config(vocab_size, **shape | options)))


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(["abc"], 260)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rows_of_a_batch_do_not_touch_each_other(dtype):
    """Logits of cached steps, bit by bit, at sizes where PyTorch's product depends on the rows."""
    torch.manual_seed(0)
    model = sharp(Transformer(Config(1000, dim=256, layers=2, heads=4, hidden=1344, max_length=64))).to(dtype)
    prompts, new = [[7] * n for n in range(2, 22)], torch.randint(0, 1000, (20, 5))

    def logits(rows):
        cache, seen = Cache(model.config, len(rows), 40, model.embed.weight), []
        for b, row in enumerate(rows):
            model(torch.tensor([prompts[row]]), cache=cache[b])

        class Pick:
            def __call__(self, logits):
                seen.append(logits)
                return new[rows, len(seen) - 1].tolist(), None

            def done(self, full):
                return False

        first = torch.zeros(len(rows), 1000, dtype=dtype)
        for _ in generation.decode(model, cache, first, Pick(), 5):
            pass
        return torch.stack(seen[1:], 1)

    with torch.inference_mode():
        together = logits(list(range(20)))
        apart = torch.cat([logits([b]) for b in range(20)])
    assert torch.equal(together, apart)
    assert together.float().std() > 0.5


@torch.inference_mode()
def log_p(model, heard, said):
    memory = model.encode(torch.tensor([heard]))
    logits = model(torch.tensor([said[:-1]]), memory=memory).float().log_softmax(-1)[0]
    return logits[range(len(said) - 1), said[1:]].sum().item()


def test_beam_search_finds_the_best_of_all():
    """With as many beams as there are beginnings it is exhaustive; the best has the largest mean log p."""
    model, heard, V, steps = translator(5), [0, 3, 1], 5, 3
    with torch.inference_mode():
        cache = Cache(model.config, 80, steps, model.embed.weight)
        model.remember(cache, [model.encode(torch.tensor([heard]))[0]], 80)
        pick = generation.Beam([steps], 80, stop=0)
        for _ in generation.decode(
            model, cache, model(torch.zeros(80, 1, dtype=torch.long), cache=cache)[:, 0], pick, steps
        ):
            pass
    every = [t for n in range(steps) for t in itertools.product(range(1, V), repeat=n)]
    score = {t: log_p(model, heard, [0, *t, 0]) / (len(t) + 1) for t in every}
    assert tuple(pick.best()[0]) == max(score, key=score.get)
    assert len(pick.ends[0]) == len(every)
    for mean, tokens in pick.ends[0]:
        assert math.isclose(mean, score[tuple(tokens)], rel_tol=1e-4)


def test_a_sentence_that_has_stopped_is_frozen():
    """Scripted logits, the same whatever was said: three sentences together end as each alone."""
    for seed in range(30):
        logits = torch.randn(12, 3, 1, 6, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 2, -1)

        def ends(which, logits=logits):
            pick = generation.Beam([(3, 12, 7)[b] for b in which], 2, stop=0)
            for step in logits[:, which]:
                pick(step.flatten(0, 1))
                if pick.done([]):
                    break
            return pick.ends

        assert ends([0, 1, 2]) == [ends([b])[0] for b in range(3)]


def test_one_beam_is_greedy_and_a_batch_is_each_alone(tokenizer):
    model = translator()
    sentences = ["abc", "a", "cab and more", "猫"]
    greedy = []
    for s in sentences:
        heard, said = [0, *tokenizer.encode(s).ids], [0]
        with torch.inference_mode():
            memory = model.encode(torch.tensor([heard]))
            for _ in range(64):
                said.append(int(model(torch.tensor([said]), memory=memory)[0, -1].argmax()))
                if said[-1] == 0 or len(said) == 64:
                    break
        greedy.append(tokenizer.decode(said[1:]).strip())
    together = generation.translate(model, tokenizer, sentences, beams=3)
    assert together == [generation.translate(model, tokenizer, [s], beams=3)[0] for s in sentences]
    one = generation.translate(model, tokenizer, sentences, beams=1)
    assert [a[: len(b)] for a, b in zip(greedy, one, strict=True)] == one
    assert len(set(together)) > 1
    with pytest.raises(ValueError, match="longer than the model's 64"):
        generation.translate(model, tokenizer, ["a" * 65])
    with pytest.raises(ValueError, match="beams"):
        generation.translate(model, tokenizer, ["a"], beams=0)


def test_a_packed_batch_loses_what_its_rows_lose(tokenizer):
    torch.manual_seed(0)
    rows = [("abc", "b"), ("a", "a"), ("bca b", "b")]
    for task, config in (
        (tasks.Classification(rows), dict(kind="encoder", labels=("a", "b"))),
        (tasks.Translation(rows), dict(kind="encoder-decoder")),
    ):
        model = sharp(Transformer(Config(300, dim=32, layers=2, heads=4, hidden=48, max_length=32, **config)))
        examples = task.examples(rows, tokenizer, 32)
        whole = task.loss(model, examples)
        parts = sum(task.loss(model, [e]) * task.asked(e) for e in examples) / sum(map(task.asked, examples))
        assert abs(whole - parts) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            rounded = task.loss(model, examples)
        assert 0 < abs(rounded - whole) < 0.05 * whole
        whole.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_classifier_learns_marks_and_comes_back(tmp_path, tokenizer):
    rows = [(w * n, "many" if n > 3 else "few") for w in ("a", "b", "cab") for n in range(1, 7)]
    torch.manual_seed(0)
    task = tasks.Classification(rows)
    model = Transformer(
        Config(tokenizer.get_vocab_size(), dim=32, layers=1, heads=2, max_length=32, kind="encoder", **task.options())
    )
    s = training.Settings(steps=60, batch_tokens=256, lr=1e-2, warmup=3)
    losses = training.train(model, task, task.examples(rows, tokenizer, 32), s, tmp_path, tokenizer)
    assert losses[-1] < 0.1 * losses[0]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    again = from_pretrained(tmp_path)
    assert tasks.of(again).labels == ["few", "many"]
    assert tasks.of(again).measure(again, tokenizer, rows) == dict.fromkeys(
        ("accuracy", "precision", "recall", "F1"), 1.0
    )
    wrong = [(text, "few") for text, _ in rows]  # half of them
    found = tasks.of(again).measure(again, tokenizer, wrong)
    assert found == pytest.approx(dict(accuracy=0.5, precision=0.5, recall=0.25, F1=1 / 3), abs=1e-6)
    with pytest.raises(ValueError, match="'none' isn't one of few, many"):
        task.examples([("a", "none")], tokenizer, 32)


def test_a_task_begins_from_a_language_model():
    base = Transformer(Config(300, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, max_length=32))
    for task in (tasks.Classification(labels=("a", "b")), tasks.Translation()):
        model = tasks.begun(base, task, 0.1)
        assert model.config.kind == task.kind
        assert model.config.dropout == 0.1
        for stack in filter(None, (model.encoder, model.decoder)):
            assert torch.equal(stack.blocks[1].mlp.up.weight, base.decoder.blocks[1].mlp.up.weight)
            assert torch.equal(stack.last.weight, base.decoder.last.weight)
        assert torch.equal(model.embed.weight, base.embed.weight)


def test_bleu():
    assert tasks.bleu(["the cat is on the mat"], ["the cat is on the mat"]) == pytest.approx(1.0)
    assert tasks.bleu(["猫在桌子上"], ["猫在桌子上"]) == pytest.approx(1.0)
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 fours
    by_hand = (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert tasks.bleu(["the cat is on the mat today"], ["now the cat is on the mat"]) == pytest.approx(
        by_hand, abs=1e-4
    )


def test_words_have_tags_and_rare_ones_are_their_tag():
    pytest.importorskip("jieba")
    assert ("模型", "n") in corpus.words("语言模型预测下一个词")
    rows = [("猫吃鱼",), ("狗吃鱼",)] * 5
    best, perplexity, new = tasks.words(rows, rows[:2], [("猫吃肉",)])
    assert new == pytest.approx(1 / 3)
    assert 1 < perplexity < 20
    assert best.order >= 2


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for each task, with a model that knows nothing yet."""
    out = tmp_path_factory.mktemp("models")
    data = dict(lm="corpus.txt", classify="labels.tsv", translate="pairs.tsv")
    for task, name in data.items():
        small = ["--steps", 2, "--dim", 32, "--layers", 1, "--vocab-size", 300, "--warmup", 1, "--patience", 0]
        arguments = ["train", "--task", task, "--data", EXAMPLES / name, "--out", out / task, *small]
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, arguments)))
        assert ended.value.code == 0
    return out


def test_commands(made, capsys, monkeypatch):
    code, said, _ = run(capsys, "classify", "--model", made / "classify", "--text", "下雨了", "--text", "a goal")
    assert code == 0
    assert [line.split("\t")[2] for line in said.splitlines()] == ["下雨了", "a goal"]
    again = ["--data", EXAMPLES / "labels.tsv", "--init", made / "lm", "--out", made / "init", "--steps", 2]
    code, said, _ = run(capsys, "train", "--task", "classify", *again)
    assert code == 0
    assert from_pretrained(made / "init").config.dim == 32
    code, said, _ = run(capsys, "classify", "--model", made / "classify", "--data", EXAMPLES / "labels.tsv")
    assert "F1" in said
    code, said, _ = run(capsys, "translate", "--model", made / "translate", "--text", "我喝茶。", "--beams", 2)
    assert code == 0
    code, said, _ = run(
        capsys, "translate", "--model", made / "translate", "--data", EXAMPLES / "pairs.tsv", "--held-out", 0.02
    )
    assert "BLEU" in said
    few = ["--examples", EXAMPLES / "questions.jsonl", "--shots", 2, "--max-new-tokens", 5]
    code, *_ = run(capsys, "answer", "--model", made / "lm", "--question", "Who?", "--context", "Ann is here.", *few)
    assert code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n你好\n\nnever read\n"))
    code, said, err = run(capsys, "chat", "--model", made / "lm", "--max-new-tokens", 200)
    assert code == 0, err
    assert said.count("\n") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["classify", "--model", "lm", "--text", "a"],
            "was made for lm; classify needs a model of train --task classify",
        ),
        (["translate", "--model", "classify", "--text", "a"], "was made for classify"),
        (["generate", "--model", "translate", "--prompt", "a"], "was made for translate"),
        (["classify", "--model", "classify"], "expected --text or --data"),
        (["attention-map", "--model", "translate", "--text", "a"], "was made for translate"),
        (["generate", "--model", "lm", "--prompt", "caf\udce9"], "--prompt: not UTF-8"),
        (["classify", "--model", "classify", "--text", "caf\udce9"], "--text: not UTF-8"),
        (["answer", "--model", "lm", "--question", "a", "--examples", "nowhere.jsonl"], "No such file"),
    ],
)
def test_mistakes_are_one_line(made, capsys, arguments, message):
    at = arguments.index("--model") + 1
    code, _, err = run(capsys, *arguments[:at], made / arguments[at], *arguments[at + 1 :])
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_the_models_own_first_token_is_in_front(made, monkeypatch):
    seen = []
    monkeypatch.setattr(generation, "generate", lambda model, ids, *a, **o: seen.append(ids) or [])
    model, tokenizer = from_pretrained(made / "lm"), corpus.load_tokenizer(made / "lm")
    for bos, want in ((7, 7), (None, 0), (2**40, 0), ("x", 0)):
        monkeypatch.setattr(commands.models.checkpoints, "read_json", lambda path, bos=bos: {"bos_token_id": bos})
        options = dict(stop=[], temperature=0.0, top_k=0, top_p=1.0, seed=0, max_new_tokens=1, model="")
        commands.stream(types.SimpleNamespace(**options), model, tokenizer, ["abc"])
        assert seen[-1][0][0] == want


def test_text_is_cleaned_as_a_file_is(made, capsys, tmp_path):
    said = []
    for text in ("abc e\u0301\u200b", "abc \u00e9", " abc \u00e9 "):
        code, out, _ = run(capsys, "classify", "--model", made / "classify", "--text", text)
        said.append(out.split("\t")[:2])
        assert code == 0
        p = run(capsys, "translate", "--model", made / "translate", "--text", text, "--beams", 1)
        said[-1].append(p)
    assert said[0] == said[1] == said[2]
    for command in ("classify", "translate"):
        code, _, err = run(capsys, command, "--model", made / command, "--text", "\u200b ")
        assert (code, err) == (2, f"llmfast {command}: --text: holds no text\n")


def test_marks_are_taken_in_batches(tokenizer, monkeypatch):
    rows = [("ab" * (i % 9 + 1) * 10, "xy"[i % 2]) for i in range(200)]
    task, sizes = tasks.Classification(rows), []
    torch.manual_seed(0)
    model = sharp(
        Transformer(Config(300, dim=32, layers=1, heads=2, max_length=256, kind="encoder", labels=("x", "y")))
    )
    right = [label == "xy"[p] for (_, label), p in zip(rows, _picked(task, model, rows, tokenizer), strict=True)]
    logits = task.logits
    monkeypatch.setattr(task, "logits", lambda m, batch: sizes.append(sum(map(len, batch))) or logits(m, batch))
    assert task.measure(model, tokenizer, rows)["accuracy"] == pytest.approx(sum(right) / len(rows))
    assert len(sizes) > 1
    assert max(sizes) <= 8192


def _picked(task, model, rows, tokenizer):
    with torch.inference_mode():
        examples = task.examples(rows, tokenizer, 256)
        return [int(task.logits(model, [ids]).argmax()) for ids, _ in examples]


def test_chat_needs_utf8(made, capsys, monkeypatch):
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
        code, _, err = run(capsys, "chat", "--model", made / "lm")
        assert code == 2
        assert err == "llmfast chat: standard input: not UTF-8\n"


def test_one_label_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("".join(f"number {i} {'ab' * i}\tsame\n" for i in range(60)))
    code, _, err = run(
        capsys, "train", "--task", "classify", "--data", tmp_path / "a.tsv", "--out", tmp_path / "m", "--patience", 0
    )
    assert code == 2
    assert "expected at least 2 labels, got same" in err
    assert not (tmp_path / "m").exists()


def test_an_encoder_without_labels_has_a_map_and_no_task(tmp_path, tokenizer, capsys):
    shape = dict(dim=32, layers=1, heads=2, kind="encoder", norm="layer", norm_first=False, position="learned")
    biases = dict(activation="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, token_types=2, mlm_head=True)
    save(Transformer(Config(300, **shape, **biases)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    code, *_ = run(capsys, "attention-map", "--model", tmp_path, "--text", "abc", "--out", tmp_path / "a.png")
    assert code == 0
    code, _, err = run(capsys, "generate", "--model", tmp_path, "--prompt", "abc")
    assert code == 2
    assert "was made for hidden words" in err


def test_the_prompt_of_a_question():
    assert commands.question("Who?", "Ann is here.", "Ann") == "Ann is here. Question: Who? Answer: Ann"
    assert commands.question("谁", "小红在这里。") == "小红在这里。问\uff1a谁答\uff1a"
    rows = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(r["answer"].lower() in r["context"].lower() for r in rows)


def test_chat_uses_the_models_own_template(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "x"}]
    assert commands.rendered(template, said) == "<user>hi<assistant>ho<user>x<assistant>"
    assert commands.rendered(None, said) == "Question: hi Answer: ho Question: x Answer:"
    with pytest.raises(ValueError, match="chat_template"):
        commands.rendered("{% for %}", said)


def test_examples_hold_no_near_duplicates():
    rows = corpus.load(EXAMPLES / "corpus.txt")
    assert corpus.distinct(rows, near=0.5) == rows
    for name in ("pairs.tsv", "labels.tsv"):
        rows = corpus.load(EXAMPLES / name, 2)
        assert corpus.distinct(rows, near=0.999) == rows


def test_a_classifier_is_saved_in_our_own_layout(tmp_path):
    model = Transformer(Config(50, dim=32, layers=1, heads=2, kind="encoder", labels=("a", "b")))
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmfast"
    assert from_pretrained(tmp_path).config == model.config
