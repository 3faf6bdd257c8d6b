"""The key/value cache of a context, preallocated once and shared by reference.

One buffer a layer is laid out as [headroom | context | tail]. Tokens that extend the context are written into the
tail. A block that is only evaluated on top of it (the noisy picture) is written into the tail too, or, when it is
evaluated on a *prefix* of the context, into the headroom right before the context: the order of keys does not matter
to full attention, so [block | prefix] is one contiguous view and a prefix never has to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bagel.config import DecoderConfig

Place = Literal["tail", "headroom"]


class KVCache:
    """Keys and values of one sequence: two tensors (layers, headroom + capacity, Hkv, D).

    Args:
        config: sizes of the decoder.
        device, dtype: of the buffers, those of the model.
        capacity: tokens to hold; it doubles when it runs out.
        headroom: tokens of a block that may stand before the context.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        capacity: int = 256,
        headroom: int = 0,
    ) -> None:
        shape = (config.num_hidden_layers, headroom + capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.headroom = headroom

    @property
    def capacity(self) -> int:
        """Tokens that fit behind the headroom."""
        return self.keys.shape[1] - self.headroom

    def reserve(self, *, tokens: int = 0, headroom: int = 0) -> None:
        """Make room for `tokens` in all and a headroom block; whatever is held stays, and moves if it has to."""
        if tokens <= self.capacity and headroom <= self.headroom:
            return
        capacity = self.capacity if tokens <= self.capacity else max(tokens, 2 * self.capacity)
        headroom = max(headroom, self.headroom)
        held = slice(headroom, headroom + self.capacity)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            layers, _, *rest = old.shape
            new = old.new_empty(layers, headroom + capacity, *rest)
            new[:, held] = old[:, self.headroom :]
            setattr(self, name, new)
        self.headroom = headroom


@dataclass
class Context:
    """The first `length` tokens of a cache and the rotary position that follows them.

    Several contexts may view one cache (a prefix, a fork that is decoded from); only `length` and `position` are
    theirs.
    """

    cache: KVCache
    length: int = 0
    position: int = 0

    def fork(self) -> Context:
        """Return a second view: extending it leaves this one as it is, and overwrites what follows it in the cache."""
        return replace(self)

    def same_as(self, other: Context) -> bool:
        """Whether both views hold the very same tokens."""
        return self.cache is other.cache and self.length == other.length

    def extended(
        self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], place: Place
    ) -> tuple[Tensor, Tensor]:
        """Write a block's keys and values and return those of context and block, (length + n, Hkv, D).

        Args:
            layer: whose they are.
            keys: in pieces that follow one another, (n, Hkv, D) in all.
            values: as keys.
            place: where the block stands.
        """
        cache, count = self.cache, sum(piece.shape[0] for piece in keys)
        start = cache.headroom
        stop = start + self.length
        block = slice(stop, stop + count) if place == "tail" else slice(start - count, start)
        at = block.start
        for key, value in zip(keys, values, strict=True):
            cache.keys[layer, at : at + key.shape[0]] = key
            cache.values[layer, at : at + key.shape[0]] = value
            at += key.shape[0]
        seen = slice(min(start, block.start), max(stop, block.stop))
        return cache.keys[layer, seen], cache.values[layer, seen]
