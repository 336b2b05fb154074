"""Checkpoints in the Hugging Face layout (config.json, model.safetensors, tokenizer.json) without transformers.

A family is its config.json as a Config, and back, and the names of its tensors. safetensors only: no file that
can run code is ever opened, and a truncated, mis-shaped or hostile one is one ValueError that names it.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .transformer import Config, Transformer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
IGNORED = ("pooler.", "cls.seq_relationship.", "position_ids", ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


class Fields:
    """config.json, read with one clear error for what is missing or can't be."""

    def __init__(self, values: dict, path: Path):
        self.values, self.path = values, path

    def get(self, name, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name, default=None):
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{self.path}: {name}: expected a positive integer, got {value!r}")
        return value

    def number(self, name, default):
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{self.path}: {name}: expected a number, got {value!r}")
        return float(value)

    def one_of(self, name, default, allowed):
        value = self.get(name, default)
        if value not in allowed:
            raise ValueError(f"{self.path}: {name} {value!r} isn't supported; {', '.join(map(str, allowed))} are")
        return value


def _gpt2(f: Fields) -> Config:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        f.one_of(name, False, (False,))
    f.one_of("scale_attn_weights", True, (True,))
    dim = f.size("n_embd", 768)
    return Config(
        f.size("vocab_size", 50257), dim, f.size("n_layer", 12), f.size("n_head", 12), None, None,
        f.size("n_inner", 4 * dim), f.size("n_positions", 1024), norm="layer",
        norm_eps=f.number("layer_norm_epsilon", 1e-5), position="learned",
        activation=GELU[f.one_of("activation_function", "gelu_new", GELU)], qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=f.get("tie_word_embeddings", True),
    )  # fmt: skip


def _llama(f: Fields) -> Config:
    """Llama, Mistral, Qwen 2 and Qwen 3: one architecture, four sets of switches."""
    kind, layers, heads, dim = (
        f.get("model_type"), f.size("num_hidden_layers"), f.size("num_attention_heads"), f.size("hidden_size")
    )  # fmt: skip
    f.one_of("hidden_act", "silu", ("silu",))
    rope = f.get("rope_parameters") or f.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{f.path}: rope_parameters: expected an object, got {rope!r}")
    rope = Fields({**rope, "rope_type": rope.get("rope_type") or rope.get("type")}, f.path)
    rope_type = rope.one_of("rope_type", "default", ("default", "linear", "llama3"))
    rope.one_of("partial_rotary_factor", f.get("partial_rotary_factor", 1.0), (1.0,))
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    scaling = {name: rope.number(name, None) for name in needed[rope_type]}
    if scaling:
        scaling["rope_type"] = rope_type
    if rope_type == "llama3":
        scaling["original_max_position_embeddings"] = rope.size("original_max_position_embeddings")
    qwen, attention_bias = kind in ("qwen2", "qwen3"), bool(f.get("attention_bias", False))
    f.one_of("mlp_bias", False, (False,))
    window = f.get("sliding_window") if kind == "mistral" or (qwen and f.get("use_sliding_window", False)) else None
    windows = ()
    if window is not None:
        first = f.get("max_window_layers", 28) if qwen else 0
        kinds = f.get("layer_types", ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])
        windows = tuple(f.size("sliding_window") if k == "sliding_attention" else None for k in kinds)
    return Config(
        f.size("vocab_size"), dim, layers, heads, f.size("num_key_value_heads", heads),
        f.size("head_dim", dim // heads), f.size("intermediate_size"), f.size("max_position_embeddings", 2048),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", f.get("rope_theta", 10000.0)), rope_scaling=scaling,
        qkv_bias=kind == "qwen2" or attention_bias, out_bias=kind != "qwen2" and attention_bias,
        qk_norm=kind == "qwen3", windows=windows, tied=f.get("tie_word_embeddings", False),
    )  # fmt: skip


def _bert(f: Fields) -> Config:
    f.one_of("position_embedding_type", "absolute", ("absolute",))
    f.one_of("is_decoder", False, (False,))
    return Config(
        f.size("vocab_size"), f.size("hidden_size"), f.size("num_hidden_layers"), f.size("num_attention_heads"),
        None, None,
        f.size("intermediate_size"), f.size("max_position_embeddings"), "encoder", "layer", False,
        f.number("layer_norm_eps", 1e-12), "learned", activation=GELU[f.one_of("hidden_act", "gelu", GELU)],
        qkv_bias=True, out_bias=True, mlp_bias=True, token_types=f.size("type_vocab_size", 2),
        tied=f.get("tie_word_embeddings", True), mlm_head=True,
    )  # fmt: skip


def _own(f: Fields) -> Config:
    return Config(**{k: tuple(v) if k in ("windows", "labels") else v for k, v in f.get("config", {}).items()})


FAMILIES = {"gpt2": _gpt2, "bert": _bert, "llmfast": _own} | dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"), _llama
)


def names(kind: str, c: Config) -> dict[str, tuple[list[str], bool]]:
    """Our tensor -> (theirs, laid one below the other; whether theirs lie (in, out))."""
    out = {}

    def put(ours, *theirs, flip=False, ends=(".weight", ".bias")):
        for end in ends:
            out[ours + end] = [t + end for t in theirs], flip and end == ".weight"

    weight = (".weight",)
    if kind == "gpt2":
        put("embed", "transformer.wte", ends=weight)
        put("decoder.position", "transformer.wpe", ends=weight)
        for i in range(c.layers):
            ours, theirs = f"decoder.blocks.{i}.", f"transformer.h.{i}."
            put(ours + "norm1", theirs + "ln_1"), put(ours + "norm2", theirs + "ln_2")
            for a, b in (("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj"),
                         ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):  # fmt: skip
                put(ours + a, theirs + b, flip=True)
        put("decoder.last", "transformer.ln_f")
        put("head", "lm_head", ends=weight)
    elif kind == "bert":
        put("embed", "bert.embeddings.word_embeddings", ends=weight)
        put("encoder.position", "bert.embeddings.position_embeddings", ends=weight)
        put("types", "bert.embeddings.token_type_embeddings", ends=weight)
        put("encoder.first", "bert.embeddings.LayerNorm")
        for i in range(c.layers):
            ours, theirs = f"encoder.blocks.{i}.", f"bert.encoder.layer.{i}."
            put(ours + "attention.qkv", *(theirs + f"attention.self.{n}" for n in ("query", "key", "value")))
            put(ours + "attention.out", theirs + "attention.output.dense")
            put(ours + "norm1", theirs + "attention.output.LayerNorm")
            put(ours + "mlp.up", theirs + "intermediate.dense"), put(ours + "mlp.down", theirs + "output.dense")
            put(ours + "norm2", theirs + "output.LayerNorm")
        put("transform.0", "cls.predictions.transform.dense"), put("transform.2", "cls.predictions.transform.LayerNorm")
        put("head", "cls.predictions.decoder", ends=weight)
        out["head.bias"] = ["cls.predictions.bias" if c.tied else "cls.predictions.decoder.bias"], False
    else:
        put("embed", "model.embed_tokens", ends=weight)
        for i in range(c.layers):
            ours, theirs = f"decoder.blocks.{i}.", f"model.layers.{i}."
            put(ours + "attention.qkv", *(theirs + f"self_attn.{n}_proj" for n in "qkv"))
            put(ours + "attention.out", theirs + "self_attn.o_proj")
            put(ours + "attention.q_norm", theirs + "self_attn.q_norm", ends=weight)
            put(ours + "attention.k_norm", theirs + "self_attn.k_norm", ends=weight)
            put(ours + "norm1", theirs + "input_layernorm", ends=weight)
            put(ours + "norm2", theirs + "post_attention_layernorm", ends=weight)
            put(ours + "mlp.up", theirs + "mlp.gate_proj", theirs + "mlp.up_proj", ends=weight)
            put(ours + "mlp.down", theirs + "mlp.down_proj", ends=weight)
        put("decoder.last", "model.norm", ends=weight)
        put("head", "lm_head", ends=weight)
    return out


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError that names the file otherwise."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON ({problem})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


class Tensors:
    """The tensors of a checkpoint by name, over one safetensors file or the shards of an index, read when asked for."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open  # here: `llmfast info` needs no extra

        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        elif index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
                raise ValueError(f"{index}: expected a weight_map of file names")
            files = sorted(set(listed.values()))
        else:
            pickles = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt"))
            why = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
            raise ValueError(f"{folder}: no model.safetensors{why}")
        self.where = {}
        for name in files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{index}: {name!r} leads out of the folder")
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but {index.name} names it")
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as problem:
                raise ValueError(f"{path}: truncated or not safetensors ({problem})") from None
            self.where.update(dict.fromkeys(opened.keys(), (opened, path)))

    def get(self, name: str, shape: tuple | None) -> torch.Tensor:
        opened, path = self.where[name]
        found = tuple(opened.get_slice(name).get_shape())
        if shape is not None and found != shape:
            raise ValueError(f"{path}: {name} has shape {found}, config.json says {shape}")
        t = opened.get_tensor(name)
        if t.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {t.dtype}; float32, bfloat16, float16 and float64 are supported")
        return t


def from_pretrained(folder, dtype: torch.dtype | None = None, device="cpu") -> Transformer:
    """The Transformer of a checkpoint folder in the Hugging Face layout, in eval mode.

    Args:
        folder: has config.json and model.safetensors, or model.safetensors.index.json and its shards; model_type is
            gpt2, llama, mistral, qwen2, qwen3, bert, or llmfast for what only this library can build.
        dtype: of the weights; the file's by default.

    Raises:
        ValueError: a file is missing, truncated, mis-shaped, unsafe, or of an unknown model; the message names it.

    >>> model = from_pretrained("gpt2")
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    path = folder / "config.json"
    fields = Fields(read_json(path), path)
    kind = fields.one_of("model_type", None, tuple(FAMILIES))
    if fields.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights aren't supported")
    try:
        c = FAMILIES[kind](fields)
    except (TypeError, ZeroDivisionError, AttributeError) as problem:
        raise ValueError(f"{path}: {problem}") from None
    except ValueError as problem:
        raise ValueError(str(problem) if str(path) in str(problem) else f"{path}: {problem}") from None
    tensors = Tensors(folder)
    if c.layers > len(tensors.where):
        raise ValueError(f"{path}: says {c.layers} layers, but the checkpoint has {len(tensors.where)} tensors")
    root = {"gpt2": "transformer.", "bert": "bert."}.get(kind, "model.")
    present = {n if n.startswith((root, "lm_head.", "cls.")) else root + n: n for n in tensors.where}
    if kind == "bert" and "cls.predictions.transform.dense.weight" not in present:
        c = Config(**{**asdict(c), "mlm_head": False})  # BertModel: no words are predicted
    if kind == "bert" and not c.tied and "cls.predictions.bias" in present:
        present.setdefault("cls.predictions.decoder.bias", present["cls.predictions.bias"])
    if kind == "llmfast":
        present = {n: n for n in tensors.where}
    with torch.device("meta"):
        model = Transformer(c)
    table = {n: ([n], False) for n in model.state_dict()} if kind == "llmfast" else names(kind, c)
    state, used = {}, set()
    for ours, t in model.state_dict().items():
        if ours == "head.weight" and c.tied:
            used.update(table[ours][0])
            continue
        theirs, flip = table[ours]
        if missing := [n for n in theirs if n not in present]:
            raise ValueError(f"{folder}: the checkpoint lacks {missing[0]}")
        rows = _rows(ours, c, t.shape[0], len(theirs))
        shapes = [(r, *t.shape[1:]) for r in rows]
        parts = [tensors.get(present[n], s[::-1] if flip else s) for n, s in zip(theirs, shapes, strict=True)]
        used.update(theirs)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        state[ours] = (whole.t().contiguous() if flip else whole).to(device, dtype or whole.dtype)
    unknown = sorted(n for n in present if n not in used and not any(i in n for i in IGNORED))
    spare = ("cls.predictions.bias", "cls.predictions.decoder.bias", *(["lm_head.weight"] if c.tied else []))
    unknown = [n for n in unknown if n not in spare]
    if unknown:
        raise ValueError(f"{folder}: {present[unknown[0]]} has no place in a {kind} model")
    if c.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()
    return model.eval()


def _rows(ours, c, total, parts):
    """How many rows each part of our tensor has."""
    if parts == 3:
        return [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    return [total // parts] * parts


def family(c: Config, state) -> str:
    """The model_type whose config.json gives the same Config back and that names each tensor of state; else llmfast."""
    for kind in ("gpt2", "bert", "llama", "mistral", "qwen2", "qwen3"):
        try:
            again = FAMILIES[kind](Fields({"model_type": kind, **_config_json(kind, c)}, Path("config.json")))
        except (KeyError, ValueError):  # an activation or a size that the family doesn't have
            continue
        if again == replace(c, dropout=0.0) and state.keys() <= names(kind, c).keys():
            return kind
    return "llmfast"


def _config_json(kind: str, c: Config) -> dict:
    if kind == "llmfast":
        return {"config": asdict(c)}
    back = {v: k for k, v in GELU.items() if k != "gelu_pytorch_tanh"}
    if kind == "gpt2":
        return dict(
            architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_embd=c.dim, n_layer=c.layers, n_head=c.heads,
            n_inner=c.hidden, n_positions=c.max_length, layer_norm_epsilon=c.norm_eps,
            activation_function=back[c.activation], tie_word_embeddings=c.tied,
        )  # fmt: skip
    common = dict(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.hidden, max_position_embeddings=c.max_length, tie_word_embeddings=c.tied,
    )  # fmt: skip
    if kind == "bert":
        return common | dict(
            architectures=["BertForMaskedLM"], hidden_act=back[c.activation], layer_norm_eps=c.norm_eps,
            type_vocab_size=c.token_types,
        )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, **c.rope_scaling}
    window = next((w for w in c.windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in c.windows or (None,) * c.layers]
    extra = dict(use_sliding_window=window is not None, layer_types=types) if kind.startswith("qwen") else {}
    return common | extra | dict(
        architectures=[kind.capitalize() + "ForCausalLM"],
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps, hidden_act="silu",
        rope_theta=c.rope_theta, rope_parameters=rope, attention_bias=c.out_bias, sliding_window=window,
    )  # fmt: skip


@contextmanager
def whole(path: Path):
    """Gives a path beside it to write to, which takes its place; nothing stays there where the writing failed."""
    from safetensors import SafetensorError

    new = path.with_name(path.name + ".new")
    try:
        yield new
        os.replace(new, path)
    except (RuntimeError, OSError, SafetensorError) as problem:  # torch.save's of a full disk is a RuntimeError
        raise ValueError(f"{path}: can't be written ({str(problem).splitlines()[0]})") from None
    finally:
        new.unlink(missing_ok=True)


def save(model: Transformer, folder, **extra) -> None:
    """Writes config.json and model.safetensors as `from_pretrained` and transformers read them; each appears whole.

    extra goes into config.json as it is (eos_token_id, say).
    """
    from safetensors.torch import save_file

    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if not (k == "head.weight" and c.tied)}
    kind, out = family(c, state), {}
    for ours, t in state.items():
        theirs, flip = ([ours], False) if kind == "llmfast" else names(kind, c)[ours]
        for name, part in zip(theirs, t.split(_rows(ours, c, t.shape[0], len(theirs))), strict=True):
            out[name] = (part.t() if flip else part).contiguous()
    if kind == "bert" and not c.tied:  # transformers asks for both and adds the decoder's
        out["cls.predictions.bias"] = out["cls.predictions.decoder.bias"].clone()
    dtype = str(next(iter(out.values())).dtype)[6:]
    text = json.dumps({"model_type": kind, **_config_json(kind, c), "dtype": dtype, **extra}, indent=1)
    with whole(folder / "config.json") as shape, whole(folder / "model.safetensors") as weights:
        shape.write_text(text, encoding="utf-8")
        save_file(out, weights, metadata={"format": "pt"})
