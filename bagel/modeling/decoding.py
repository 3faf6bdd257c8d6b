"""Decoding as a CUDA graph: at one token a text the launching of kernels takes longer than the kernels.

Caches have a fixed size here and lengths live on the GPU; the forward is that of `Decoder`, with an attention of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bagel.kernels import attend_appended
from bagel.modeling.attention import Heads, Seen
from bagel.modeling.bagel import Bagel
from bagel.modeling.cache import Context
from bagel.modeling.graphs import can_capture, capturing, signature_of

SMALLEST, LARGEST = 1024, 32768
"""Tokens of the smallest and the largest caches; they are powers of two, so that few graphs serve many lengths."""
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
        if model.decoder.supply is not None:
            model.decoder.supply.count(self)
        self.lengths = torch.zeros(texts, device=model.device, dtype=torch.int32)

    def __call__(self, layer: int, und: Heads, gen: Heads) -> Seen:
        """Append the und tokens, one a text (B, heads, D), and return what they gather; there are no gen tokens."""
        seen = attend_appended(*und, self.keys[layer], self.values[layer], self.lengths)
        return Seen(seen, gen[0])


class DecodeStep:
    """The logits that follow one token of each of B texts.

    On a GPU the work is captured as a graph when this is made, elsewhere it is done as it comes. To be made and used in
    inference mode.

    Args:
        model: its weights must stay where they are.
        texts: B.
        capacity: tokens that each may reach, the one that is appended with it.
    """

    def __init__(self, model: Bagel, texts: int, capacity: int) -> None:
        self.model, self.texts, self.capacity = model, texts, capacity
        self.signature = signature_of(model.decoder)
        self.caches = FixedCaches(model, texts, capacity)
        self.ids = torch.zeros(texts, device=model.device, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.graph = self._captured() if can_capture(model.decoder) else None
        self.moves = moves_of(model)

    def fits(self, model: Bagel, texts: int, tokens: int) -> bool:
        """Whether this may be used again: for as many texts of so many tokens, and the same weights."""
        return texts == self.texts and tokens <= self.capacity and self.signature == signature_of(model.decoder)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Go on from B contexts, which stay as they are."""
        for row, context in enumerate(contexts):
            for own, theirs in zip((self.caches.keys, self.caches.values), context.held(), strict=True):
                own[:, row, : context.length] = theirs
                own[:, row, context.length :] = 0  # whatever another text has left there
        self.caches.lengths.copy_(torch.tensor([context.length for context in contexts]))
        self.positions.copy_(torch.tensor([context.position for context in contexts]))

    def __call__(self, ids: Tensor) -> Tensor:
        """Append a token (B,) to each text and return the logits (B, vocab) float32, valid until the next call."""
        self.ids.copy_(ids)
        supply = self.model.decoder.supply
        with nullcontext() if supply is None else supply.lock:  # or another thread might let weights leave in between
            if self.graph is None or self.moves != moves_of(self.model):
                return self._run()
            self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        logits = self.model.decoder.next_logits(self.ids, self.positions, self.caches)
        self.caches.lengths += 1
        self.positions += 1
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        for _ in range(2):  # first uses allocate, choose kernels and compile: not within a graph, nor on its stream
            self._run()
        if not stays_put(self.model):
            return None
        self.signature = signature_of(self.model.decoder)
        graph = torch.cuda.CUDAGraph()
        with capturing(), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            self.logits = self._run()
        return graph


def stays_put(model: Bagel) -> bool:
    """Whether all weights that a decode step needs stay on the device; those of a model without a limit always do."""
    supply = model.decoder.supply
    return supply is None or supply.holds(gen=False)


def moves_of(model: Bagel) -> int:
    """Return how often weights of a model have moved, so that a graph knows when it is out of date."""
    return 0 if model.decoder.supply is None else model.decoder.supply.moves


def take_step(model: Bagel, texts: int, tokens: int) -> DecodeStep | None:
    """Return a decode step for so many texts of so many tokens; None where no graph can be made, or has no room.

    The last one is kept by the model (`give_back`): making one takes a tenth of a second, and its caches take memory.
    """
    step, model.graphs.decode_step = model.graphs.decode_step, None
    if not getattr(model.attention, "has_step", False) or not can_capture(model.decoder) or not stays_put(model):
        return None
    if step is not None and step.fits(model, texts, tokens):
        return step
    del step  # its memory is free for the next
    capacity = max(SMALLEST, 1 << (tokens - 1).bit_length())
    if capacity > LARGEST or not has_room(model, texts, capacity):
        return None
    return DecodeStep(model, texts, capacity)


def give_back(model: Bagel, step: DecodeStep) -> None:
    """Let a model keep a step that was taken."""
    model.graphs.decode_step = step


def has_room(model: Bagel, texts: int, capacity: int) -> bool:
    """Whether caches of that size leave enough of the GPU's memory free."""
    config, device = model.config.llm_config, model.device
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if model.decoder.supply is not None:
        free = min(free, model.decoder.supply.spare())
    return size * texts * capacity * SHARE <= free
