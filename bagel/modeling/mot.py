"""The Mixture-of-Transformers decoder (arXiv 2411.04996): two experts a layer, one attention.

Each expert works on a stream of its own tokens and they meet in attention alone, so a token's expert is settled by
the stream it stands in. Shapes: Tu und tokens, Tg gen tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bagel.config import DecoderConfig
from bagel.embedding import Embedding
from bagel.modeling.layers import Expert, Heads, RMSNorm
from bagel.modeling.rope import Rotary, rotary_table

Attend = Callable[[int, Heads, Heads], tuple[Tensor, Tensor]]
"""(layer index, heads of the und tokens, heads of the gen tokens) -> what each gathers, (Tu, Hq, D), (Tg, Hq, D)."""


class Streams(NamedTuple):
    """The residual streams of both experts, (Tu, H) and (Tg, H)."""

    und: Tensor
    gen: Tensor


class DecoderLayer(nn.Module):
    """One layer: both experts around one attention. The dense variant sends both streams through one expert."""

    def __init__(self, config: DecoderConfig, *, index: int, with_gen: bool) -> None:
        super().__init__()
        self.index = index
        self.und = Expert(config)
        self.gen = Expert(config, own_attention=config.has_gen_attention) if with_gen else None

    def forward(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> Streams:
        """Map both residual streams to themselves."""
        seen = attend(self.index, *self.heads(x, rotary))
        return Streams(
            *(e.finish(own, gathered, self.und) for e, own, gathered in zip(self._experts(), x, seen, strict=True))
        )

    def heads(self, x: Streams, rotary: tuple[Rotary, Rotary]) -> tuple[Heads, Heads]:
        """Return queries, keys and values of both residual streams."""
        und, gen = (e.heads(own, table, self.und) for e, own, table in zip(self._experts(), x, rotary, strict=True))
        return und, gen

    def _experts(self) -> tuple[Expert, Expert]:
        return self.und, self.gen or self.und


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
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index=index, with_gen=with_gen) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_gen = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if with_gen else None
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.norm.weight.dtype

    @property
    def residual_dtype(self) -> torch.dtype:
        """Type of the residual stream: the weights' own, but float32 for float16, which it would overflow."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (T, H) of ids (T,)."""
        return self.embed_tokens(ids).to(self.residual_dtype)

    def rotary(self, positions: Tensor) -> Rotary:
        """Return the rotary table of positions (T,)."""
        return rotary_table(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def forward(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> Streams:
        """Run all layers; the result is not yet normed (see `logits` and `norm_of_gen`)."""
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return x

    def heads_of_last(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> tuple[Heads, Heads]:
        """Run all layers but the last, and return its queries, keys and values: a context needs no more."""
        for layer in self.layers[:-1]:
            x = layer(x, rotary, attend)
        last = self.layers[-1]
        assert isinstance(last, DecoderLayer)
        return last.heads(x, rotary)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (T, vocab) of und tokens (T, H) as they leave the last layer."""
        normed = self.norm(hidden).to(self.dtype)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return nn.functional.linear(normed, head).float()

    def norm_of_gen(self, hidden: Tensor) -> Tensor:
        """Return the final norm, in their own type, of gen tokens (T, H) as they leave the last layer."""
        return (self.norm_gen or self.norm)(hidden)
