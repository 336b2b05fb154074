"""transformers with llmfast's attention: the same logits and the same generated tokens as eager, on tiny random
models.
"""

import os
import random
from unittest import mock

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
tr = pytest.importorskip("transformers", minversion="5")

import llmfast
from llmfast import hf

tr.logging.set_verbosity_error()
llmfast.enable_hf()

VOCAB, N = 97, 12
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
GQA = dict(**BASE, num_key_value_heads=2)
HEADS = dict(**GQA, head_dim=8)
LAYERS = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
SEQ2SEQ = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
)
SEQ2SEQ |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64)
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
SPEECH = dict(
    num_mel_bins=8, max_source_positions=16, max_target_positions=48, decoder_start_token_id=1, bos_token_id=1
)
PATCHES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
)
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)

DECODERS = {
    "llama": (tr.LlamaForCausalLM, tr.LlamaConfig(**GQA)),
    "qwen2": (tr.Qwen2ForCausalLM, tr.Qwen2Config(**GQA)),
    "qwen2 window": (tr.Qwen2ForCausalLM, tr.Qwen2Config(**GQA, use_sliding_window=True, **LAYERS)),
    "qwen2_moe window": (
        tr.Qwen2MoeForCausalLM,
        tr.Qwen2MoeConfig(
            **GQA, use_sliding_window=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **LAYERS
        ),
    ),
    "qwen3": (tr.Qwen3ForCausalLM, tr.Qwen3Config(**HEADS)),
    "mistral": (tr.MistralForCausalLM, tr.MistralConfig(**GQA, sliding_window=4)),
    "mixtral": (tr.MixtralForCausalLM, tr.MixtralConfig(**GQA, sliding_window=5, **EXPERTS)),
    "gemma": (tr.GemmaForCausalLM, tr.GemmaConfig(**HEADS)),
    "gemma2": (tr.Gemma2ForCausalLM, tr.Gemma2Config(**HEADS, sliding_window=4, query_pre_attn_scalar=8)),
    "gemma3": (tr.Gemma3ForCausalLM, tr.Gemma3TextConfig(**HEADS, **LAYERS)),
    "gpt2": (tr.GPT2LMHeadModel, tr.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": (tr.GPTNeoXForCausalLM, tr.GPTNeoXConfig(**BASE)),
    "gpt_oss": (tr.GptOssForCausalLM, tr.GptOssConfig(**HEADS, **LAYERS, **EXPERTS)),
    "phi": (tr.PhiForCausalLM, tr.PhiConfig(**GQA)),
    "phi3": (tr.Phi3ForCausalLM, tr.Phi3Config(**GQA, sliding_window=4, pad_token_id=0)),
    "olmo2": (tr.Olmo2ForCausalLM, tr.Olmo2Config(**GQA)),
    "cohere2": (tr.Cohere2ForCausalLM, tr.Cohere2Config(**GQA, **LAYERS)),
    "granite": (tr.GraniteForCausalLM, tr.GraniteConfig(**GQA)),
    "starcoder2": (tr.Starcoder2ForCausalLM, tr.Starcoder2Config(**GQA, sliding_window=4)),
    "stablelm": (tr.StableLmForCausalLM, tr.StableLmConfig(**GQA)),
    "opt": (
        tr.OPTForCausalLM,
        tr.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
    ),
    "llama4 chunks": (
        tr.Llama4ForCausalLM,
        tr.Llama4TextConfig(
            **HEADS,
            attention_chunk_size=5,
            num_local_experts=2,
            intermediate_size_mlp=64,
            layer_types=["chunked_attention", "full_attention"],
        ),
    ),
}
ENCODERS = {
    "bert": (tr.BertForMaskedLM, tr.BertConfig(**BASE)),
    "roberta": (tr.RobertaForMaskedLM, tr.RobertaConfig(**BASE)),
    "distilbert": (
        tr.DistilBertForMaskedLM,
        tr.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    ),
    "electra": (tr.ElectraForMaskedLM, tr.ElectraConfig(**BASE, embedding_size=32)),
    "modernbert": (
        tr.ModernBertForMaskedLM,
        tr.ModernBertConfig(
            **BASE,
            local_attention=6,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
}
ENCODER_DECODERS = {
    "t5": (tr.T5ForConditionalGeneration, tr.T5Config(**T5)),
    "bart": (tr.BartForConditionalGeneration, tr.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
    "marian": (
        tr.MarianMTModel,
        tr.MarianConfig(**SEQ2SEQ, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=0),
    ),
    "whisper": (
        tr.WhisperForConditionalGeneration,
        tr.WhisperConfig(**SEQ2SEQ, **SPEECH, pad_token_id=0, eos_token_id=2),
    ),
}
IMAGES = {
    "vit": (tr.ViTForImageClassification, tr.ViTConfig(**PATCHES)),
    "dinov2": (tr.Dinov2ForImageClassification, tr.Dinov2Config(**PATCHES)),
    "siglip": (tr.SiglipVisionModel, tr.SiglipVisionConfig(**PATCHES)),
    "clip": (tr.CLIPVisionModel, tr.CLIPVisionConfig(**PATCHES)),
}
ARCHITECTURES = DECODERS | ENCODERS | ENCODER_DECODERS | IMAGES
SHORT = {"llama", "gemma2", "gpt2", "gpt_oss", "t5", "bert", *random.Random(0).sample(sorted(ARCHITECTURES), 6)}
GENERATORS = [n for n in ARCHITECTURES if n in DECODERS or n in ("t5", "bart", "marian", "whisper")]


def each(names):
    return [pytest.param(n, marks=() if n in SHORT else pytest.mark.long, id=n) for n in names]


def make(name):
    """A tiny model, its weights large enough that the softmax isn't flat."""
    torch.manual_seed(0)
    cls, config = ARCHITECTURES[name]
    model = cls(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 2 and any(
                x in key for x in ("q_proj", "k_proj", "query", "key", "qkv", "q_lin", "k_lin", "c_attn", "Wqkv")
            ):
                p.mul_(12)
    return model


def inputs(name, padding=None):
    """The arguments of one forward, and which tokens (2, N) count."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, N), generator=g)
    real = torch.ones(2, N, dtype=torch.bool)
    if padding:
        real[0, :5] = False
        real = real if padding == "left" else real.flip(1)
    ids = torch.where(real, ids, 0)
    given = dict(input_ids=ids) | (dict(attention_mask=real.long()) if padding else {})
    if name in IMAGES:
        return dict(pixel_values=torch.randn(2, 3, 8, 8, generator=g)), None
    if name == "whisper":
        return dict(input_features=torch.randn(2, 8, 32, generator=g), decoder_input_ids=ids), real
    if name in ENCODER_DECODERS:
        target = torch.randint(3, VOCAB, (2, 7), generator=g)
        return given | dict(decoder_input_ids=target), torch.ones(2, 7, dtype=torch.bool)
    return given, real


def run(model, implementation, given, **options):
    """What the model gives; that it asked llmfast, where it should, is seen too: some only say that they do."""
    model.set_attn_implementation(implementation)
    spies = [mock.patch.object(hf, name, wraps=getattr(hf, name)) for name in ("attention", "attention_varlen")]
    with torch.no_grad(), spies[0] as whole, spies[1] as packed:
        out = model(**given, **options)
    assert (whole.called or packed.called) == implementation.startswith("llmfast")
    return out


def logits(out):
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


def close(got, want):
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_logits(name, padding):
    if padding and name in (*IMAGES, "whisper"):
        pytest.skip("has no padding")
    model = make(name)
    given, real = inputs(name, padding)
    got, want = (logits(run(model, i, given)) for i in ("llmfast", "eager"))
    close(*((got, want) if real is None else (got[real], want[real])))


def ways():
    """In the short tier a seeded third of the ways to generate with the models of its own."""
    draw = random.Random(0)
    for name in GENERATORS:
        for padding in (None, "left"):
            for how in ("greedy", "static", "beams"):
                short = draw.random() < 1 / 3 and name in SHORT
                yield pytest.param(name, padding, how, marks=[] if short else pytest.mark.long)


@pytest.mark.parametrize(("name", "padding", "how"), list(ways()))
def test_generate(name, padding, how):
    if padding and name == "whisper":
        pytest.skip("has no padding")
    model = make(name)
    given, _ = inputs(name, padding)
    if name == "whisper":
        given = dict(input_features=given["input_features"])
    given.pop("decoder_input_ids", None)
    options = {"static": dict(cache_implementation="static", disable_compile=True), "beams": dict(num_beams=3)}.get(
        how, {}
    )
    tokens = {}
    for implementation in ("llmfast", "eager"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(**given, **options, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(tokens["llmfast"], tokens["eager"])


@pytest.mark.parametrize("name", each(["llama", "gemma2", "gpt_oss", "t5", "bart", "bert", "gpt2"]))
def test_output_attentions(name):
    model = make(name)
    given, _ = inputs(name)
    got, want = (run(model, i, given, output_attentions=True) for i in ("llmfast", "eager"))
    compared = 0
    for key in ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions"):
        for a, b in zip(got.get(key) or (), want.get(key) or (), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared


@pytest.mark.filterwarnings("ignore:attention runs on the slow reference")
@pytest.mark.parametrize("name", each(["llama", "gemma2", "gpt_oss", "t5", "bert", "vit"]))
def test_gradients(name):
    grads = {}
    model = make(name)
    given, _ = inputs(name)
    for implementation in ("llmfast", "eager"):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        logits(model(**given)).square().mean().backward()
        grads[implementation] = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    assert grads["llmfast"].keys() == grads["eager"].keys()
    for key, want in grads["eager"].items():
        assert (grads["llmfast"][key] - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, key


@pytest.mark.filterwarnings("ignore:attention runs on the slow reference")
def test_dropout_reaches_the_kernel():
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0)
    model = tr.GPT2LMHeadModel(tr.GPT2Config(**shape, attn_pdrop=0.4)).train()
    given, _ = inputs("gpt2")
    model.set_attn_implementation("llmfast")
    torch.manual_seed(5)
    first = model(**given).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(**given).logits)
    assert not torch.equal(first, model(**given).logits)
    assert torch.equal(model.eval()(**given).logits, model(**given).logits)
    first.sum().backward()


@pytest.mark.parametrize("name", each(["llama", "gpt2", "gpt_oss", "gemma2", "mistral"]))
def test_packed(name):
    """Sequences of 5 and 7 tokens in one row, as DataCollatorWithFlattening lays them out, against each alone."""
    model = make(name)
    ids = inputs(name)[0]["input_ids"][:1]
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    lengths = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=7, max_length_k=7)
    got = run(model, "llmfast", dict(input_ids=ids, position_ids=position_ids), use_cache=False, **lengths).logits
    alone = [run(model, "eager", dict(input_ids=ids[:, a:b])).logits for a, b in ((0, 5), (5, 12))]
    close(got, torch.cat(alone, 1))


@pytest.mark.parametrize("kind", [bool, float])
def test_masks_of_ones_own(kind):
    model = make("llama")
    given, _ = inputs("llama")
    seen = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    seen[:, :, :, 3] = seen[:, :, :, 3] & (torch.arange(N) == 3)
    as_float = torch.zeros(2, 1, N, N).masked_fill(~seen, torch.finfo(torch.float32).min)
    want = run(model, "eager", given | dict(attention_mask=as_float)).logits
    close(run(model, "llmfast", given | dict(attention_mask=seen if kind is bool else as_float)).logits, want)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "qwen2_moe window", "llama4 chunks"])
def test_a_window_needs_no_mask(name, monkeypatch):
    """No N x N mask where the kernel knows the window; one where the model keeps the window to itself."""
    model = make(name)
    given, _ = inputs(name)
    masks = []

    def spy(module, query, key, value, attention_mask, **options):
        masks.append(attention_mask)
        return hf.attention_forward(module, query, key, value, attention_mask, **options)

    tr.AttentionInterface.register("llmfast_spy", spy)
    tr.masking_utils.AttentionMaskInterface.register("llmfast_spy", hf.attention_mask)
    run(model, "llmfast_spy", given)
    assert any(m is not None for m in masks) == (name in ("qwen2_moe window", "llama4 chunks"))


def test_packed_refuses():
    q = torch.randn(2, 4, 6, 8)
    cu = torch.tensor([0, 6])
    lengths = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(ValueError, match="packed sequences lie in one row"):
        hf.attention_forward(None, q, q, q, None, **lengths)
    with pytest.raises(ValueError, match="can't have a position_bias"):
        hf.attention_forward(None, q[:1], q[:1], q[:1], None, position_bias=torch.zeros(1, 4, 6, 6), **lengths)
    with pytest.raises(ValueError, match="packed sequences have no weights"):
        hf.attention_forward(None, q[:1], q[:1], q[:1], None, output_attentions=True, **lengths)


def test_without_registering():
    model = make("llama")
    with pytest.raises(ValueError, match="llmfast2"):
        model.set_attn_implementation("llmfast2")
    llmfast.enable_hf("llmfast2")
    model.set_attn_implementation("llmfast2")


@pytest.mark.parametrize("name", ["gemma2", pytest.param("llama", marks=pytest.mark.long)])
def test_compile(name):
    """Decoding on a static cache under torch.compile with a whole graph."""
    model = make(name)
    given, _ = inputs(name)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static")
    model.set_attn_implementation("eager")
    want = model.generate(**given, **options, disable_compile=True)
    model.set_attn_implementation("llmfast")
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    close(step(**given, use_cache=False).logits.detach(), run(model, "eager", given).logits)
    model.set_attn_implementation("llmfast")
    model.generation_config.compile_config = tr.CompileConfig(backend="aot_eager", fullgraph=True)
    model.generation_config.compile_config._compile_all_devices = True
    assert torch.equal(model.generate(**given, **options), want)


def test_a_real_encoder():
    """The same embeddings as eager on sentences of different lengths, from pretrained weights where their package is
    installed, else from random ones.
    """
    from benchmarks.bench_encoder import Shape, embed, load, tokens

    batch = tokens(Shape("float32", 8, 40))
    got, want = (embed(load(i, torch.float32), batch) for i in ("llmfast", "eager"))
    assert (got - want).abs().max() <= 1e-6
