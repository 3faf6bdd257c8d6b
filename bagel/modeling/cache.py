"""The key/value cache of contexts: preallocated, shared by reference, and safe to fork.

One buffer per layer is laid out as [headroom | context | tail]. A context is a view of the first tokens of a cache; a
prefix or a fork of it is another view of the same cache. Tokens that extend a context are written into the tail, unless
another view that is still in use reaches further: then the context first moves into a cache of its own. A block that is
only evaluated on top of a context (a noisy image) is written into the tail too or, where another view is there already,
into the headroom right before the context: the order of keys does not matter to full attention, so [block | prefix] is
one contiguous view, and a prefix never has to be copied to be drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor

SMALLEST, MOST_SPARE = 64, 2048
"""Tokens that a fresh cache holds at least, and that one which grows holds beyond what is asked for, at most."""


class KVCache:
    """Keys and values of one sequence: two tensors (layers, headroom + capacity, Hkv, D).

    Args:
        keys, values: what it holds at first.
        supply: brings weights within a limit of memory, and lets some of them leave for what is held here; or None.
    """

    def __init__(self, keys: Tensor, values: Tensor, supply: Any = None) -> None:
        self.keys, self.values, self.supply = keys, values, supply
        if supply is not None:
            supply.count(self)
        self.headroom, self.capacity = 0, keys.shape[1]  # tokens that fit before the context, and from there on
        self.views: WeakSet[Context] = WeakSet()

    def reserve(self, *, tokens: int = 0, headroom: int = 0) -> None:
        """Make room for `tokens` in all and a headroom block; whatever is held stays, and moves if it has to."""
        capacity = self.capacity
        if tokens <= capacity and headroom <= self.headroom:
            return
        if tokens > capacity:
            capacity = max(tokens, capacity + min(capacity, MOST_SPARE), SMALLEST)
        self._hold(
            self.keys[:, self.headroom :], self.values[:, self.headroom :], max(headroom, self.headroom), capacity
        )

    def _hold(self, keys: Tensor, values: Tensor, headroom: int, capacity: int) -> None:
        """Move what is held into fresh buffers."""
        if self.supply is not None:
            layers, _, heads, size = keys.shape
            self.supply.make_room(2 * layers * (headroom + capacity) * heads * size * keys.element_size())
        for name, held in (("keys", keys), ("values", values)):
            new = held.new_empty(held.shape[0], headroom + capacity, *held.shape[2:])
            new[:, headroom : headroom + held.shape[1]] = held
            setattr(self, name, new)
        self.headroom, self.capacity = headroom, capacity


class Context:
    """The first `length` tokens of a cache and the rotary position that follows them.

    Several contexts may view one cache; each may be extended, and none sees what another appends.
    """

    def __init__(self, cache: KVCache, *, length: int = 0, position: int = 0) -> None:
        self.cache, self.length, self.position = cache, length, position
        cache.views.add(self)

    def fork(self) -> Context:
        """Return a second view of the same tokens; nothing is copied before both are extended."""
        return Context(self.cache, length=self.length, position=self.position)

    def same_as(self, other: Context) -> bool:
        """Whether both views hold the very same tokens."""
        return self.cache is other.cache and self.length == other.length

    def held(self) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of its tokens, each (layers, length, Hkv, D), as views."""
        own = slice(self.cache.headroom, self.cache.headroom + self.length)
        return self.cache.keys[:, own], self.cache.values[:, own]

    def reserve(self, tokens: int, *, headroom: int = 0) -> None:
        """Make room for so many more tokens at once, and for a block evaluated on a prefix: only ever to save time."""
        self.cache.reserve(tokens=self.length + tokens, headroom=headroom)

    def claim(self, tokens: int, *, keeps: bool) -> Claim:
        """Return the place of a block of new tokens, which is this context's for as long as the claim is kept.

        Args:
            tokens: how many.
            keeps: they will become part of the context (see `advance`), instead of only being evaluated on top of it.
        """
        return claim_all([self], [tokens], keeps=keeps)[0]

    def advance(self, tokens: int, position: int) -> None:
        """Count in tokens that were written to the place of a claim, and say which position follows them."""
        self.length += tokens
        self.position = position

    def _make_room(self, tokens: int, *, keeps: bool) -> bool:
        """Make room for a block, and return whether it has to stand before the context instead of behind it."""
        followed = any(view.length > self.length for view in self.cache.views)
        if followed and not keeps:
            self.cache.reserve(headroom=tokens)
            return True
        if followed:  # go on in a cache of its own, which no other view reaches into
            keys, values = self.held()
            self.cache.views.discard(self)
            self.cache = KVCache(keys, values, self.cache.supply)
            self.cache._hold(keys, values, 0, max(self.length + tokens, SMALLEST))
            self.cache.views.add(self)
        self.cache.reserve(tokens=self.length + tokens)
        return False


def claim_all(contexts: Sequence[Context], lengths: Sequence[int], *, keeps: bool) -> list[Claim]:
    """Return a claim of each of several contexts, of which some may view one cache; see `Context.claim`."""
    blocks = list(zip(contexts, lengths, strict=True))
    taken: list[Context | None] = []
    for context, tokens in blocks:  # room for all before any is placed: what is claimed does not move with a cache
        before = context._make_room(tokens, keeps=keeps)
        taken.append(None if before else Context(context.cache, length=context.length + tokens))
    claims = []
    for (context, tokens), view in zip(blocks, taken, strict=True):
        cache, start = context.cache, context.cache.headroom
        stop = start + context.length
        block = slice(start - tokens, start) if view is None else slice(stop, stop + tokens)
        seen = slice(min(start, block.start), max(stop, block.stop))
        claims.append(Claim(cache.keys, cache.values, block, seen, view))
    return claims


@dataclass(frozen=True)
class Claim:
    """Where a block of new tokens stands, and the context that it sees.

    The buffers are those of the moment: a cache that grows later does not move what is written here.

    Args:
        keys, values: the buffers of a cache.
        block: slots of the new tokens.
        seen: slots of the context and of the new tokens.
        taken: a view that reaches over the block, so that nobody else writes there meanwhile.
    """

    keys: Tensor
    values: Tensor
    block: slice
    seen: slice
    taken: Context | None

    def write(self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Write the block's keys and values and return those of context and block, (length + n, Hkv, D).

        Args:
            layer: whose they are.
            keys: in pieces that follow one another, (n, Hkv, D) in all.
            values: as keys.
        """
        at = self.block.start
        for key, value in zip(keys, values, strict=True):
            self.keys[layer, at : at + key.shape[0]] = key
            self.values[layer, at : at + key.shape[0]] = value
            at += key.shape[0]
        return self.keys[layer, self.seen], self.values[layer, self.seen]
