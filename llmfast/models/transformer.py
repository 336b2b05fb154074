"""The transformer (Vaswani et al., 2017, arXiv 1706.03762), decoder-only, encoder-only or both, on llmfast's kernels.

    attention(x):  q, k, v = x Wq, x Wk, x Wv;  o = softmax(q k^T / sqrt(D)) v;  o Wo
    mlp(x):        gelu(x W1) W2, or (silu(x Wg) * x Wu) W2
    block(x):      x = x + attention(norm(x));  x = x + mlp(norm(x))              norm first
                   x = norm(x + attention(x));  x = norm(x + mlp(x))              norm last, as in the paper and BERT

Token ids are (B, N), or packed (T,) with cu_seqlens (B + 1,): sequence b is
ids[cu_seqlens[b]:cu_seqlens[b + 1]], without padding.
Inside, x is (B, N, dim), with B = 1 when packed; q (B, H, N, D), k and v (B, Hk, N, D) are views of one product.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as llmfast


@dataclass(frozen=True)
class Config:
    """The shape of a Transformer. heads share kv_heads keys and values (GQA); hidden is the width inside the mlp."""

    vocab_size: int
    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    max_length: int = 512
    kind: str = "decoder"  # "encoder", "encoder-decoder"
    norm: str = "rms"  # "layer"
    norm_first: bool = True
    norm_eps: float = 1e-5
    position: str = "rotary"  # "learned", "sinusoidal"
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or rope_type "linear" or "llama3" with its numbers
    activation: str = "swiglu"  # "gelu", "gelu_tanh", "relu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple = ()  # for each layer None or how many keys a query sees; () is None for all
    tied: bool = True
    token_types: int = 0
    mlm_head: bool = False  # BERT's: a dense layer and a norm before the words
    labels: tuple = ()  # of a classifier, which has them instead of words
    dropout: float = 0.0

    def __post_init__(self):
        fill = dict(kv_heads=self.heads, head_dim=self.dim // self.heads, hidden=4 * self.dim)
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        choices = dict(
            kind=("decoder", "encoder", "encoder-decoder"), norm=("rms", "layer"),
            position=("rotary", "learned", "sinusoidal"), activation=("swiglu", *ACTIVATIONS),
        )  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even number, got {self.head_dim}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows: expected one for each of {self.layers} layers, got {len(self.windows)}")


ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}


class Linear(nn.Linear):
    """x weight^T + bias, the one place where the models multiply by a matrix."""

    def forward(self, x):
        return llmfast.linear(x, self.weight, self.bias)


class Where(NamedTuple):
    """What a block needs to know besides x: angles of its positions, the packing, the cache, what the encoder said."""

    rope: tuple | None = None  # cos and sin, (B or 1, N, 1, D / 2)
    cu_seqlens: Tensor | None = None
    cache: "Cache | None" = None
    memory: Tensor | None = None  # (B, M, dim); (1, T, dim) packed
    cu_memory: Tensor | None = None


class Cache:
    """Keys and values of every layer, kv (layers, B, 2 Hk, M, D), of which lengths (B,) tokens count; nothing is moved.

    A view `cache[b]` is one sequence's, `cache[a:b]` some of them: prompts are read there one at a time, whole,
    whatever the batch.
    """

    def __init__(self, config: Config, batch: int, length: int, like: Tensor):
        shape = (config.layers, batch, 2 * config.kv_heads, length, config.head_dim)
        self._over(like.new_empty(shape), torch.zeros(batch, dtype=torch.int32, device=like.device))
        self.cross = None  # of an encoder-decoder, for each layer k and v (B, Hk, M, D) of the memory
        self.memory_lengths = None

    def _over(self, kv, lengths):
        self.kv, self.lengths = kv, lengths
        self.layers = [(layer, *layer.chunk(2, 1)) for layer in kv]
        self.heads = torch.arange(kv[0, :, :, 0, 0].numel(), device=kv.device).view(kv.shape[1:3]) * kv.shape[3]

    def __getitem__(self, b: int | slice) -> "Cache":
        some, b = object.__new__(Cache), slice(b, b + 1) if isinstance(b, int) else b
        some._over(self.kv[:, b], self.lengths[b])
        some.cross = self.cross and [(k[b], v[b]) for k, v in self.cross]
        some.memory_lengths = None if self.memory_lengths is None else self.memory_lengths[b]
        return some

    def reorder(self, rows: Tensor) -> None:
        """Sequence b becomes a copy of sequence rows[b]: what a beam search keeps."""
        used = int(self.lengths.max())
        self.kv[..., :used, :] = self.kv[:, rows, :, :used]
        self.lengths.copy_(self.lengths[rows])

    def begin(self, N: int) -> None:
        """Before the layers: where their N new tokens go; N = 1, or B = 1."""
        if N == 1:
            self.rows = (self.heads + self.lengths[:, None]).flatten()  # (B 2 Hk,) of a layer's (B 2 Hk M, D)
        else:
            self.used = int(self.lengths)
        self.seen = self.lengths + N

    def attend(self, layer: int, q: Tensor, new: Tensor, window: int | None) -> Tensor:
        """Writes new (B, N, 2 Hk, D), keys and values, behind what is there, and attends with q (B, H, N, D)."""
        kv, k, v = self.layers[layer]
        if q.shape[2] == 1:
            kv.view(-1, kv.shape[-1]).index_copy_(0, self.rows, new.reshape(-1, kv.shape[-1]))
            return llmfast.attention_decode(q, k, v, self.seen, window=window)
        end = self.used + q.shape[2]
        kv[:, :, self.used : end] = new.transpose(1, 2)
        return llmfast.attention(q, k[:, :, :end], v[:, :, :end], causal=True, window=window)


def rope_angles(c: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position / theta^(2 i / D), (..., N, 1, D / 2) for positions (..., N)."""
    angles = (positions[..., None].float() * _frequencies(c, positions.device)).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _frequencies(c, device):
    s = c.rope_scaling
    f = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if s.get("rope_type") == "linear":
        f = f / s["factor"]
    elif s.get("rope_type") == "llama3":  # long wavelengths are stretched by factor, short ones left, smoothly between
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - smooth) * f / s["factor"] + smooth * f
    return f


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, N, H, D) with the pair (x[i], x[i + D / 2]) turned by its angle (RoFormer, arXiv 2104.09864)."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@cache
def sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    """The paper's positions, (length, dim): sin and cos of position / 10000^(2 i / dim)."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim].to(device)


def norm(c: Config, size: int | None = None) -> nn.Module:
    kind = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
    return kind(size or c.dim, eps=c.norm_eps)


class Attention(nn.Module):
    """Multi-head attention: masked (causal), or over the encoder's output (cross)."""

    def __init__(self, c: Config, layer: int, causal: bool, cross: bool = False):
        super().__init__()
        self.H, self.Hk, self.D = c.heads, c.kv_heads, c.head_dim
        self.layer, self.causal, self.dropout = layer, causal, c.dropout
        self.window = c.windows[layer] if c.windows else None
        if cross:
            self.q = Linear(c.dim, self.H * self.D, c.qkv_bias)
            self.kv = Linear(c.dim, 2 * self.Hk * self.D, c.qkv_bias)
        else:
            self.qkv = Linear(c.dim, (self.H + 2 * self.Hk) * self.D, c.qkv_bias)
        self.out = Linear(self.H * self.D, c.dim, c.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None for _ in range(2))
        self.watch = None  # called with q, k and causal: for looking at the weights

    def forward(self, x: Tensor, where: Where) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.D)  # (B, N, H + 2 Hk, D)
        if self.q_norm is not None or where.rope is not None:
            q, k, v = qkv.split((self.H, self.Hk, self.Hk), 2)
            if self.q_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if where.rope is not None:
                q, k = rotate(q, where.rope), rotate(k, where.rope)
            qkv = torch.cat([q, k, v], 2)
        q, kv = qkv[:, :, : self.H].transpose(1, 2), qkv[:, :, self.H :]
        if where.cache is not None:
            o = where.cache.attend(self.layer, q, kv, self.window)
        else:
            k, v = kv.transpose(1, 2).chunk(2, 1)
            if self.watch is not None:
                self.watch(q, k, self)
            o = self.attend(q, k, v, where.cu_seqlens, where.cu_seqlens)
        return self.out(o.transpose(1, 2).flatten(2))

    def across(self, x: Tensor, where: Where) -> Tensor:
        """Queries from x, keys and values from the encoder's output."""
        q = self.q(x).unflatten(-1, (-1, self.D)).transpose(1, 2)
        if where.cache is not None:
            k, v = where.cache.cross[self.layer]
            o = llmfast.attention_decode(q, k, v, where.cache.memory_lengths, causal=False)
        else:
            o = self.attend(q, *self.keys(where.memory), where.cu_seqlens, where.cu_memory)
        return self.out(o.transpose(1, 2).flatten(2))

    def keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(memory).unflatten(-1, (-1, self.D)).transpose(1, 2).split(self.Hk, 1)
        return k, v  # (B, Hk, M, D)

    def attend(self, q, k, v, cu_q, cu_k):
        options = dict(causal=self.causal, window=self.window, dropout_p=self.dropout if self.training else 0.0)
        if cu_q is None:
            return llmfast.attention(q, k, v, **options)
        packed = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, heads, D)
        return llmfast.attention_varlen(*packed, cu_q, cu_k, **options).transpose(0, 1)[None]


class Mlp(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.activation = c.activation
        self.up = Linear(c.dim, c.hidden * (2 if c.activation == "swiglu" else 1), c.mlp_bias)  # gate above up
        self.down = Linear(c.hidden, c.dim, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation != "swiglu":
            return self.down(ACTIVATIONS[self.activation](x))
        gate, x = x.chunk(2, -1)
        return self.down(F.silu(gate) * x)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int, causal: bool, cross: bool):
        super().__init__()
        self.norm_first, self.dropout = c.norm_first, c.dropout
        self.norm1, self.attention = norm(c), Attention(c, layer, causal)
        if cross:
            self.norm_cross, self.cross = norm(c), Attention(c, layer, False, cross=True)
        self.norm2, self.mlp = norm(c), Mlp(c)
        self.crosses = cross

    def forward(self, x: Tensor, where: Where) -> Tensor:
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x), where))
            if self.crosses:
                x = x + self.drop(self.cross.across(self.norm_cross(x), where))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, where)))
        if self.crosses:
            x = self.norm_cross(x + self.drop(self.cross.across(x, where)))
        return self.norm2(x + self.drop(self.mlp(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Stack(nn.Module):
    """Embedded tokens through the blocks: the paper's encoder (causal=False) or decoder."""

    def __init__(self, c: Config, causal: bool, cross: bool = False):
        super().__init__()
        self.c = c
        self.position = nn.Embedding(c.max_length, c.dim) if c.position == "learned" else None
        self.first = None if c.norm_first else norm(c)
        self.blocks = nn.ModuleList(Block(c, i, causal, cross) for i in range(c.layers))
        self.last = norm(c) if c.norm_first else None

    def forward(self, x: Tensor, positions: Tensor, where: Where) -> Tensor:
        if self.position is not None:
            x = x + self.position(positions)
        elif self.c.position == "sinusoidal":
            x = x * math.sqrt(self.c.dim) + sinusoids(self.c.max_length, self.c.dim, x.device)[positions].to(x.dtype)
        else:
            where = where._replace(rope=rope_angles(self.c, positions, x.dtype))
        x = x if self.first is None else self.first(x)
        if self.training and self.c.dropout:
            x = F.dropout(x, self.c.dropout)
        for block in self.blocks:
            x = block(x, where)
        return x if self.last is None else self.last(x)


class Transformer(nn.Module):
    """config.kind "decoder" (GPT-2, Llama), "encoder" (BERT) or "encoder-decoder" (the paper).

    >>> model = Transformer(Config(vocab_size=1000))
    >>> logits = model(ids)  # (B, N, vocab_size)
    >>> loss = model.loss(ids, target)
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.types = nn.Embedding(c.token_types, c.dim) if c.token_types else None
        self.encoder = Stack(c, causal=False) if c.kind != "decoder" else None
        self.decoder = Stack(c, causal=True, cross=c.kind != "decoder") if c.kind != "encoder" else None
        between = ACTIVATIONS["gelu" if c.activation == "swiglu" else c.activation]
        self.transform = nn.Sequential(Linear(c.dim, c.dim), between, norm(c)) if c.mlm_head else None
        self.head = Linear(c.dim, c.vocab_size, bias=c.mlm_head)
        self.classes = Linear(c.dim, len(c.labels)) if c.labels else None
        self.tie()
        if self.embed.weight.device.type != "meta":
            self.apply(self._start)

    def tie(self):
        if self.config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def _start(self, module):
        """Normal(0, 0.02); what is added to x over sqrt(2 layers) of it, so that x keeps its size with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        last = module.out if isinstance(module, Attention) else module.down if isinstance(module, Mlp) else None
        if last is not None:
            nn.init.normal_(last.weight, 0.0, 0.02 / math.sqrt(2 * self.config.layers))

    def hidden(
        self, ids: Tensor, *, cu_seqlens: Tensor | None = None, cache: Cache | None = None,
        memory: Tensor | None = None, cu_memory: Tensor | None = None, types: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The last hidden states, (*ids.shape, dim): the encoder's of an encoder, else the decoder's.

        ids (B, N), or (T,) with cu_seqlens; memory is what `encode` gave, packed with cu_memory; types, like ids, are
        BERT's token types.
        """
        stack = self.decoder or self.encoder
        return self._run(stack, ids, cu_seqlens, types, cache=cache, memory=memory, cu_memory=cu_memory)

    def encode(self, ids: Tensor, cu_seqlens: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """The encoder's output, (*ids.shape, dim)."""
        return self._run(self.encoder, ids, cu_seqlens, types)

    def _run(self, stack, ids, cu, types, cache=None, memory=None, cu_memory=None):
        positions = torch.arange(ids.shape[-1], device=ids.device)
        longest = ids.shape[-1]
        if cu is not None:
            lengths = cu.diff()
            positions = positions - torch.repeat_interleave(cu[:-1], lengths, output_size=longest)
            longest = int(lengths.max()) if lengths.is_cpu and lengths.numel() else 0
        elif cache is not None:
            cache.begin(ids.shape[-1])
            positions = cache.lengths[:, None] + positions
            longest = 0  # whoever made the cache made it no longer than the positions reach
        if longest > self.config.max_length:
            raise ValueError(f"ids: a sequence of {longest} tokens is longer than the model's {self.config.max_length}")
        x = self.embed(ids)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        where = Where(None, cu, cache, memory, cu_memory)
        if cu is None:
            x = stack(x, positions, where)
        else:
            where = where._replace(memory=None if memory is None else memory[None])
            x = stack(x[None], positions, where)[0]
        if cache is not None:
            cache.lengths += ids.shape[-1]
        return x

    def words(self, x: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., dim)."""
        return self.head(x if self.transform is None else self.transform(x))

    def forward(self, ids: Tensor, **options) -> Tensor:
        """Logits (*ids.shape, vocab_size); the options are `hidden`'s."""
        return self.words(self.hidden(ids, **options))

    def classify(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Scores (B, labels) of packed sequences, from the mean of each one's last hidden states."""
        x = self.hidden(ids, cu_seqlens=cu_seqlens)
        mean = torch.segment_reduce(x.float(), "mean", lengths=cu_seqlens.diff().long(), axis=0)
        return self.classes(mean.to(x.dtype))

    def loss(self, ids: Tensor, target: Tensor, **options) -> Tensor:
        """Mean cross entropy of target (ids' shape, -100 where nothing is asked); the logits never exist whole."""
        x = self.hidden(ids, **options)
        x = x if self.transform is None else self.transform(x)
        return llmfast.linear_cross_entropy(x, self.head.weight, target, bias=self.head.bias)

    def remember(self, cache: Cache, memory: list[Tensor], times: int = 1) -> None:
        """Puts the keys and values of each memory (M, dim), `times` over, into the cache, once for all steps."""
        lengths = torch.tensor([len(m) for m in memory], dtype=torch.int32, device=self.device)
        cache.memory_lengths, cache.cross = lengths.repeat_interleave(times), []
        for block in self.decoder.blocks:
            both = [torch.cat(block.cross.keys(m[None]), 1)[0].transpose(0, 1) for m in memory]  # (M, 2 Hk, D) each
            both = nn.utils.rnn.pad_sequence(both, batch_first=True).repeat_interleave(times, 0).transpose(1, 2)
            cache.cross.append(both.chunk(2, 1))
