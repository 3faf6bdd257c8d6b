"""The Mixture-of-Transformers decoder (arXiv 2411.04996): two experts per layer, one attention.

Each expert works on a stream of its own tokens and they meet in attention alone, so a token's expert is settled by
the stream it stands in.

Shapes: T tokens of an expert, Tu und tokens, Tg gen tokens, H hidden, Hq query heads, Hkv key/value heads, D channels
per head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from bagel import kernels
from bagel.config import DecoderConfig
from bagel.embedding import Embedding
from bagel.kernels import Rotary, Rounding, Rows, is_own, rotate, silu_mul
from bagel.modeling.attention import Attend, Heads
from bagel.modeling.linear import Linear, apply, takes


def residual(x: Tensor) -> Tensor:
    """Return what enters the residual stream in its type: that of the weights, but float32 for float16, too narrow."""
    return x.float() if x.dtype == torch.float16 else x


class Streams(NamedTuple):
    """The residual streams of both experts, (Tu, H) and (Tg, H)."""

    und: Tensor
    gen: Tensor


_register_namedtuple(Streams, serialized_type_name="bagel.modeling.Streams")  # or an exported model could not be saved


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): float32 inside, rounded to the input's type, then weighted."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Any:
        """Normalise the last axis of x (..., size)."""
        return kernels.rms_norm(x, self.weight, eps=self.eps)[1]


def normed(norm: Any, x: Tensor, *, to: nn.Module, add: Tensor | None = None) -> tuple[Tensor, Tensor | Rows]:
    """Return x + add (T, H), and its norm as the layer `to` would like its input."""
    weight: Any = getattr(norm, "weight", None)
    if is_own(norm, RMSNorm):
        total, h = kernels.rms_norm(x, weight, eps=norm.eps, add=add, rounding=takes(to))
    else:
        total = x if add is None else x + add
        h = norm(total)
        total = x if add is None else total.clone()  # what a hook has seen must not be written into
    if isinstance(h, Tensor) and isinstance(weight, Tensor):
        h = h.to(weight.dtype)  # a float16 model keeps its residual stream in float32
    return total, h


class Projections(nn.Module):
    """What one expert maps its tokens with before and after the attention that both experts share."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes, self.eps = (heads, kv_heads, size), config.rms_norm_eps  # Hq, Hkv, D
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv_heads) * size)
        self.o_proj = Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else None


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)); called as a linear layer is."""

    contract: ClassVar[type]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    @property
    def takes(self) -> Rounding | None:
        """How the input would best be rounded, see `bagel.modeling.linear`."""
        return takes(self.gate_up_proj)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map tokens (T, H) to (T, H) and add `add`; float32 out of a float16 model, else the type of x."""
        down = self.down_proj
        return apply(down, silu_mul(apply(self.gate_up_proj, x), rounding=takes(down)), add=add)


MLP.contract = MLP


class Expert(nn.Module):
    """One expert's half of a layer.

    In the MoE variant the gen expert owns an MLP only and shares the norms and the attention of its layer's und
    expert, which it then gets as `shared`.
    """

    def __init__(self, config: DecoderConfig, *, own_attention: bool = True) -> None:
        super().__init__()
        if own_attention:
            self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.attention = Projections(config)
            self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.own_attention = own_attention

    def heads(self, x: Tensor, rotary: Rotary, shared: Expert) -> Heads:
        """Return rotated queries and keys, and values, of the residual stream x (T, H).

        Queries and keys are normed and rotated in float32 and rounded once, just before attention; both at once where
        nothing watches, wraps or replaces their norms.
        """
        owner = self if self.own_attention else shared
        norm, attention = owner.input_norm, owner.attention
        q_heads, kv_heads, size = attention.sizes
        if x.shape[0] == 0 and not torch.is_grad_enabled():  # with gradients, other processes wait for its own
            dtype = getattr(norm, "weight", x).dtype
            keys = x.new_empty(0, kv_heads, size, dtype=dtype)
            return x.new_empty(0, q_heads, size, dtype=dtype), keys, keys
        projection, q_norm, k_norm = attention.qkv_proj, attention.q_norm, attention.k_norm
        _, h = normed(norm, x, to=projection)
        qkv = apply(projection, h).unflatten(-1, (-1, size))
        qk, v = qkv.split_with_sizes([q_heads + kv_heads, kv_heads], dim=-2)
        if q_norm is None or k_norm is None or (is_own(q_norm, RMSNorm) and is_own(k_norm, RMSNorm)):
            weights = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
            return *kernels.norm_rotate(qk, weights, rotary, q_heads=q_heads, eps=attention.eps), v
        q, k = qk.float().split_with_sizes([q_heads, kv_heads], dim=-2)
        return rotate(q_norm(q), rotary).to(v.dtype), rotate(k_norm(k), rotary).to(v.dtype), v

    def finish(self, x: Tensor, seen: Tensor, shared: Expert) -> Tensor:
        """Add what attention gathered (T, Hq, D), and then the MLP, to the residual stream x (T, H)."""
        if x.shape[0] == 0 and not torch.is_grad_enabled():
            return x
        owner, mlp = self if self.own_attention else shared, self.mlp
        gathered = apply(owner.attention.o_proj, seen.flatten(-2))
        x, h = normed(owner.post_norm, x, add=gathered, to=mlp)
        return apply(mlp, h, add=x)


class DecoderLayer(nn.Module):
    """One layer: both experts around one attention. The dense variant sends both streams through one expert."""

    def __init__(self, config: DecoderConfig, *, index: int, with_gen: bool) -> None:
        super().__init__()
        self.index = index
        self.und = Expert(config)
        self.gen = Expert(config, own_attention=config.has_gen_attention) if with_gen else None

    def forward(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> Streams:
        """Map both residual streams to themselves; they stay as they are where nothing but keys is wanted."""
        und, gen = self.und, self.gen or self.und
        seen = attend(self.index, und.heads(x.und, rotary[0], und), gen.heads(x.gen, rotary[1], und))
        if seen is None:
            return x
        return Streams(und.finish(x.und, seen.und, und), gen.finish(x.gen, seen.gen, und))


class Decoder(nn.Module):
    """The language model of BAGEL: token embedding, layers of two experts, two final norms, LM head.

    Args:
        config: sizes (`llm_config.json`).
        with_gen: build the generating expert; False for a model that only understands.
    """

    def __init__(self, config: DecoderConfig, *, with_gen: bool = True) -> None:
        super().__init__()
        with_gen = with_gen and config.has_gen_expert
        self.config = config
        self.supply: Any = None
        """Brings weights that do not fit the device in time, see `bagel.memory.Supply`; None where all are there."""
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index=index, with_gen=with_gen) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_gen = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if with_gen else None
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes."""
        return next(self.norm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.norm.parameters()).device

    def rotary(self, und: Tensor, gen: Tensor) -> tuple[Rotary, Rotary]:
        """Return the rotary tables of the positions (Tu,) and (Tg,) of both streams (arXiv 2104.09864), by halves.

        Angles are computed in float32; both halves of a head have the same.
        """
        size, count = self.config.head_dim, und.shape[0]
        positions = torch.cat([und, gen]).float()
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        angles = positions[:, None] * self.config.rope_theta**-exponents  # (Tu + Tg, D/2)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]
        return (cos[:count], sin[:count]), (cos[count:], sin[count:])

    def forward(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> Streams:
        """Run all layers; the result is not yet normed (see `logits` and `Bagel.velocity`).

        The residual streams have the type of the weights, but float32 for float16, which is too narrow for them.
        """
        if x.und.dtype == torch.float16:
            x = Streams(x.und.float(), x.gen.float())
        supply, (und, gen) = self.supply, x
        with nullcontext(self.layers) if supply is None else supply.through(self.layers, und, gen) as layers:
            for layer in layers:
                x = layer(x, rotary, attend)
        return x

    def next_logits(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the logits (B, vocab) float32 of what follows one new token (B,) at its position in each of B texts.

        This is one decode step.
        """
        x = self.embed_tokens(ids)
        hidden = self(Streams(x, x[:0]), self.rotary(positions, positions[:0]), attend)
        return self.logits(hidden.und)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (T, vocab) of und tokens (T, H) as they leave the last layer."""
        normed = self.norm(hidden).to(self.dtype)
        if self.lm_head is None:  # tied: the table of embeddings is the head
            return nn.functional.linear(normed, self.embed_tokens.weight).float()
        with nullcontext() if self.supply is None else self.supply.using(self.lm_head):
            return self.lm_head(normed).float()
