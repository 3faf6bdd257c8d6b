"""Decoding as a CUDA graph: at one token a text the launching of kernels takes longer than the kernels.

A graph replays the very same work on the very same memory, so caches have a fixed size here and lengths live on the
GPU; the forward is that of `Decoder`, with an attention of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bagel.attention import attend_appended
from bagel.modeling.bagel import Bagel
from bagel.modeling.cache import Context
from bagel.modeling.layers import Heads
from bagel.modeling.mot import Streams

SMALLEST = 1024
"""Tokens of the smallest cache; larger ones are powers of two, so that few graphs serve many lengths."""
SHARE = 4
"""A graph may take a quarter of the free memory for its caches."""


class FixedCaches:
    """Keys and values (layers, B, capacity, Hkv, D) of B texts, each (B,) tokens long; the attention of one new token.

    Args:
        model: whose decoder it is for.
        texts: B.
        capacity: tokens of each.
    """

    def __init__(self, model: Bagel, texts: int, capacity: int) -> None:
        config = model.config.llm_config
        shape = (config.num_hidden_layers, texts, capacity, config.num_key_value_heads, config.head_dim)
        # Zeros: what lies behind a text has no weight, but weight zero times NaN is NaN.
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(texts, device=model.device, dtype=torch.int32)

    def __call__(self, layer: int, und: Heads, gen: Heads) -> tuple[Tensor, Tensor]:
        """Append the und tokens, one a text (B, heads, D), and return what they gather; there are no gen tokens."""
        seen = attend_appended(*und, self.keys[layer], self.values[layer], self.lengths)
        return seen, gen[0]


class DecodeStep:
    """The logits that follow one token of each of B texts.

    On a GPU the work is captured as a graph when this is made, elsewhere it is done as it comes.

    Args:
        model: its weights must stay where they are.
        texts: B.
        capacity: tokens that each may reach, the one that is appended with it.
    """

    def __init__(self, model: Bagel, texts: int, capacity: int) -> None:
        self.model, self.texts, self.capacity = model, texts, capacity
        self.weights = _addresses(model)
        self.caches = FixedCaches(model, texts, capacity)
        self.ids = torch.zeros(texts, device=model.device, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.graph = self._captured() if can_capture(model) else None

    def fits(self, model: Bagel, texts: int, tokens: int) -> bool:
        """Whether this may be used again: for as many texts of so many tokens, and the same weights."""
        return texts == self.texts and tokens <= self.capacity and self.weights == _addresses(model)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Go on from B contexts, which stay as they are."""
        for row, context in enumerate(contexts):
            cache, length = context.cache, context.length
            held = slice(cache.headroom, cache.headroom + length)
            self.caches.keys[:, row, :length] = cache.keys[:, held]
            self.caches.values[:, row, :length] = cache.values[:, held]
        self.caches.lengths.copy_(torch.tensor([context.length for context in contexts]))
        self.positions.copy_(torch.tensor([context.position for context in contexts]))

    def __call__(self, ids: Tensor) -> Tensor:
        """Append a token (B,) to each text and return the logits (B, vocab) float32, valid until the next call."""
        self.ids.copy_(ids)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        decoder = self.model.decoder
        x = decoder.embed(self.ids)
        tables = decoder.rotary(self.positions), decoder.rotary(self.positions[:0])
        hidden = decoder(Streams(x, x[:0]), tables, self.caches)
        logits = decoder.logits(hidden.und)
        self.caches.lengths += 1
        self.positions += 1
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # first uses allocate, choose kernels and compile: not within a graph
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._run()
        return graph


def can_capture(model: Bagel) -> bool:
    """Whether graphs can be made of a model: it is on the current GPU."""
    return model.device.type == "cuda" and model.device.index == torch.cuda.current_device()


def capacity_for(tokens: int) -> int:
    """Return the size of caches for so many tokens."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


def affordable(model: Bagel, texts: int, capacity: int) -> bool:
    """Whether caches of that size leave enough of the GPU's memory free."""
    config = model.config.llm_config
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return size * texts * capacity * SHARE <= torch.cuda.mem_get_info(model.device)[0]


def _addresses(model: Bagel) -> tuple[int, ...]:
    """Where the decoder's weights are: a graph reads them there, whatever becomes of the modules."""
    decoder = model.decoder
    return tuple(tensor.data_ptr() for part in (decoder.parameters(), decoder.buffers()) for tensor in part)
