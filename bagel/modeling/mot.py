"""The Mixture-of-Transformers decoder (arXiv 2411.04996): two experts per layer, one attention.

Each expert works on a stream of its own tokens and they meet in attention alone, so a token's expert is settled by
the stream it stands in. Shapes: Tu und tokens, Tg gen tokens, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from bagel.config import DecoderConfig
from bagel.embedding import Embedding
from bagel.modeling.attention import Attend
from bagel.modeling.layers import Expert, RMSNorm
from bagel.modeling.linear import Linear
from bagel.modeling.rope import Rotary, rotary_table


def residual(x: Tensor) -> Tensor:
    """Return what enters the residual stream in its type: that of the weights, but float32 for float16, too narrow."""
    return x.float() if x.dtype == torch.float16 else x


class Streams(NamedTuple):
    """The residual streams of both experts, (Tu, H) and (Tg, H)."""

    und: Tensor
    gen: Tensor


_register_namedtuple(Streams, serialized_type_name="bagel.modeling.Streams")  # or an exported model could not be saved


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
        """Type of the weights."""
        return next(self.parameters()).dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (T, H) of ids (T,)."""
        return residual(self.embed_tokens(ids))

    def rotary(self, und: Tensor, gen: Tensor) -> tuple[Rotary, Rotary]:
        """Return the rotary tables of the positions (Tu,) and (Tg,) of both streams."""
        und_table, gen_table = (
            rotary_table(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)
            for positions in (und, gen)
        )
        return und_table, gen_table

    def forward(self, x: Streams, rotary: tuple[Rotary, Rotary], attend: Attend) -> Streams:
        """Run all layers; the result is not yet normed (see `logits` and `Bagel.velocity`)."""
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return x

    def next_logits(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the logits (B, vocab) float32 of what follows one new token (B,) at its position in each of B texts.

        This is one decode step.
        """
        x = self.embed(ids)
        hidden = self(Streams(x, x[:0]), self.rotary(positions, positions[:0]), attend)
        return self.logits(hidden.und)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (T, vocab) of und tokens (T, H) as they leave the last layer."""
        normed = self.norm(hidden).to(self.dtype)
        if self.lm_head is None:  # tied: the table of embeddings is the head
            return nn.functional.linear(normed, self.embed_tokens.weight).float()
        return self.lm_head(normed).float()
