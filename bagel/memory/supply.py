"""Weights that do not fit their device: some stay there, the others arrive shortly before they are needed.

One forward needs the decoder's weights in a known order, layer by layer. Of these as many stay on the device as there
is room for, spread evenly over the layers, so that there is time to copy the others while those that stay compute. What
is copied goes into slots that are used in turn. The order goes round: while the last layers compute, the first ones
arrive for the next forward. Nothing is rounded or reordered: results are the same bits as without a limit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bagel.memory.choice import Experts, chosen, nbytes, needs, passing
from bagel.memory.errors import NotEnoughMemoryError
from bagel.memory.movers import Mover, mover_for
from bagel.memory.sizes import GIB, said
from bagel.memory.units import Unit


@dataclass(eq=False)
class Slot:
    """Memory (nbytes,) uint8 on the device, which may be overwritten from a mark on; see `Mover`."""

    memory: Tensor
    free_from: Any


@dataclass(eq=False)
class Placed:
    """A unit on the device: in which slot, and from which mark on its values are there."""

    slot: Slot
    ready_from: Any


class Supply:
    """Brings weights to the device that computes with them in time, within a limit.

    Args:
        device: where the model computes.
        layers: the weights of each decoder layer.
        guests: weights that are needed now and then: the head, the vision encoder, the autoencoder.
        limit: bytes that may be taken on the device, whatever for.
        fixed: bytes of the weights that are always there.
        work: from the numbers of und and gen tokens to the bytes that a forward of them takes.
        slack: bytes left free for what an allocator cannot use between its blocks.
    """

    def __init__(
        self,
        device: torch.device,
        layers: Sequence[Experts],
        guests: dict[nn.Module, Unit],
        *,
        limit: int,
        fixed: int,
        work: Callable[[int, int], int],
        slack: int,
    ) -> None:
        self.device, self.layers, self.guests = device, tuple(layers), guests
        self.limit, self.fixed, self.work, self.slack = limit, fixed, work, slack
        self.mover: Mover = mover_for(device)
        self.caches: WeakSet[Any] = WeakSet()
        """What holds keys and values on the device, each with `keys` and `values`."""
        self.placed: dict[Unit, Placed] = {}
        self.free: list[Slot] = []
        self.order: tuple[Unit, ...] = ()
        self.stays: frozenset[Unit] = frozenset()
        self.latest: Unit | None = None  # guest
        self.current: frozenset[Unit] = frozenset()
        """Units that are being computed with: they stay, whatever else is asked for meanwhile."""
        self.passing = self.allowed = 0
        self.reached = 0
        self.moves = 0
        """How often weights have left the device: whoever remembers where they are must look again."""
        self.lock, self._busy = threading.RLock(), False

    def __reduce__(self) -> Any:
        raise TypeError("a model within a limit of memory cannot be copied; load it once more")

    # What a model asks for --------------------------------------------------------------------------------------------

    @contextmanager
    def through(self, layers: Sequence[nn.Module], und: Tensor, gen: Tensor) -> Iterator[Iterator[nn.Module]]:
        """Give an iterator over the decoder's layers, each of which has its weights on the device while it is current.

        Args:
            layers: of the decoder.
            und, gen: the tokens (T, H) that each expert gets.

        Raises:
            NotEnoughMemoryError: the limit is too small for so many tokens.
            RuntimeError: gradients are wanted, for which the weights would have to be there a second time.
        """
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (und, gen, *(own for layer in layers for own in layer.parameters()))
        ):
            raise RuntimeError("a model within a limit of memory has no gradients: load it without memory=...")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield iter(layers)  # what a graph was made of stays where it is, see `holds`
            return
        with self.lock:
            if self._busy:
                raise RuntimeError("a model within a limit of memory cannot be called from within itself")
            self._busy = True
            try:
                with closing(self._walk(layers, len(und), len(gen))) as walk:
                    yield walk
            except BaseException:
                self._abandon()
                raise
            finally:
                self._busy, self.current = False, frozenset()

    @contextmanager
    def using(self, module: nn.Module, work: int = 0) -> Iterator[None]:
        """Have the weights of a guest on the device, and room for so many bytes of its work; other guests leave.

        Other threads wait meanwhile, lest they take the memory that is computed with.
        """
        unit = self.guests.get(module)
        if unit is None or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            yield
            return
        with self.lock:
            before, self.current = self.current, self.current | {unit}
            try:
                self._bring(unit, work)
                yield
            except BaseException:
                self._abandon()
                raise
            finally:
                self.current = before

    def _bring(self, unit: Unit, work: int) -> None:
        self.latest = unit
        self._make_room(work + (0 if unit in self.placed else unit.nbytes), f"using the {unit.name}")
        if unit not in self.placed:
            self.allowed = max(self.allowed, self._taken() + unit.nbytes)
            self._place(unit)
        self._wait(unit)

    def expect(self, und: int, gen: int) -> None:
        """Make room for a forward of so many tokens, whose inputs are made before it begins."""
        with self.lock:
            self._make_room(self.work(und, gen), f"computing {und + gen} tokens at once")

    def make_room(self, wanted: int) -> None:
        """Make room for so many bytes of something that will stay."""
        with self.lock:
            self._make_room(wanted, "keeping what was read")

    def count(self, cache: Any) -> None:
        """Count the `keys` and `values` of a cache as taken for as long as it lives."""
        with self.lock:  # other threads may be counting
            self.caches.add(cache)

    def spare(self) -> int:
        """Return the bytes that are free while the weights stay as they are."""
        with self.lock:
            return self._room(0) - self._taken() + sum(slot.memory.nbytes for slot in self.free)

    def holds(self, *, gen: bool) -> bool:
        """Whether all that a forward of und tokens alone needs, or of both, is on the device to stay."""
        units = {unit for experts in self.layers for unit in needs(experts, int(gen))}
        return units <= self.stays and units <= self.placed.keys()

    def release(self) -> None:
        """Take all weights from the device that are not always there."""
        with self.lock:
            for unit in list(self.placed):
                self._leave(unit)
            self.order, self.stays = (), frozenset()
            self._shrink(0)

    # One forward ------------------------------------------------------------------------------------------------------

    def _walk(self, layers: Sequence[nn.Module], und: int, gen: int) -> Generator[nn.Module]:
        needed = [needs(experts, gen) for experts in self.layers]
        self._begin(tuple(unit for units in needed for unit in units), und, gen)
        for layer, units in zip(layers, needed, strict=True):
            self.current = frozenset(units)
            for unit in units:
                if unit not in self.placed:
                    self._place(unit, self._find_slot(unit) or self._slot_of_later(unit))
                self._wait(unit)
            self._place_ahead()
            yield layer
            self.current = frozenset()
            for unit in units:
                self.reached += 1
                if unit not in self.stays:
                    self._leave(unit)
            self._place_ahead()

    def _begin(self, order: tuple[Unit, ...], und: int, gen: int) -> None:
        """Have what stays on the device for forwards of this order, and no more than may be there with it."""
        self.reached, work = 0, self.work(und, gen)
        if nbytes(order) > self._room(work) - nbytes(self._guests()):
            for guest in self._guests():
                if gen or guest is not self.latest:  # a text needs the head after every forward
                    self._leave(guest)
        room = self._room(work) - nbytes(self._guests())
        spare = room - self.passing - nbytes(self.stays)
        if order != self.order or spare < 0 or (spare >= GIB and len(self.stays) < len(order)):
            self._choose(order, room, und + gen, work)
        self.allowed = nbytes(self.stays) + self.passing + nbytes(self._guests())
        self._shrink(self.allowed)
        for unit in self._later():
            if self._taken() > self.allowed:
                self._leave(unit)
                self._shrink(self.allowed)

    def _choose(self, order: tuple[Unit, ...], room: int, tokens: int, work: int) -> None:
        """Choose what of an order stays on the device within so many bytes, and let go of the rest."""
        found = chosen(order, room)
        if found is None and self._guests():
            for guest in self._guests():
                self._leave(guest)
            room = self._room(work)
            found = chosen(order, room)
        if found is None:
            least = self.limit - room + passing(order, 2)
            raise self._too_little(f"computing {tokens} tokens at once", least)
        self.order, (self.stays, self.passing) = order, found
        kept = {*self.stays, *self.guests.values()}
        for unit in [unit for unit in self.placed if unit not in kept]:
            self._leave(unit)

    def _place_ahead(self) -> None:
        """Begin to copy the weights that are needed next, as far as there are slots."""
        for ahead in range(len(self.order)):
            unit = self.order[(self.reached + ahead) % len(self.order)]
            if unit not in self.placed:
                slot = self._find_slot(unit)
                if slot is None:
                    return
                self._place(unit, slot)

    def _later(self) -> list[Unit]:
        """Return what is on the device before it is needed, the last first."""
        order = self.order[self.reached :] + self.order[: self.reached]
        return [u for u in reversed(order) if u in self.placed and u not in self.stays and u not in self.current]

    def _slot_of_later(self, unit: Unit) -> Slot | None:
        """Return a slot for a unit that is needed now, in the place of what is needed later; None if there is none."""
        slot = None
        for later in self._later():
            self._leave(later)
            slot = slot or self._find_slot(unit)
            if slot is not None:
                break
        return slot

    # Memory -----------------------------------------------------------------------------------------------------------

    def _room(self, work: int) -> int:
        """Return the bytes that weights may take beside those that are always there."""
        return self.limit - self.fixed - self._cached() - work - self.slack

    def _cached(self) -> int:
        """Return the bytes that keys and values take."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches)

    def _guests(self) -> list[Unit]:
        return [unit for unit in self.guests.values() if unit in self.placed]

    def _taken(self) -> int:
        """Return the bytes of all slots."""
        return sum(slot.memory.nbytes for slot in (*self.free, *(placed.slot for placed in self.placed.values())))

    def _shrink(self, allowed: int) -> None:
        """Give up free slots until all take no more than is allowed."""
        before = len(self.free)
        while self.free and self._taken() > allowed:
            self.free.pop(0)
        if len(self.free) < before and self.device.type == "cuda":
            torch.cuda.empty_cache()  # or something small would take a slot's memory, which no slot could have again

    def _make_room(self, wanted: int, doing: str) -> None:
        """Let go of weights until so many bytes are free."""
        room = self._room(wanted)
        self._shrink(room)
        for guest in self._guests():
            if self._taken() > room and guest not in self.current:
                self._leave(guest)
                self._shrink(room)
        for unit in sorted(self.placed, key=lambda unit: unit in self.stays):
            if self._taken() <= room:
                break
            if unit not in self.current:
                self._leave(unit)
                self.order = ()  # what stays is to be chosen anew
                self._shrink(room)
        if self._taken() > room:
            least = self.limit - room + self._taken()
            raise self._too_little(doing, least)

    def _too_little(self, doing: str, least: int) -> NotEnoughMemoryError:
        return NotEnoughMemoryError(
            f"{doing} needs {said(least)} on {self.device}, more than the limit of {said(self.limit)}: give more with "
            "memory=..., or ask for fewer or smaller images at a time"
        )

    def _find_slot(self, unit: Unit) -> Slot | None:
        """Return a slot for a unit: a free one of its size, or a new one where that is allowed; None otherwise."""
        for slot in self.free:
            if slot.memory.nbytes == unit.nbytes:
                self.free.remove(slot)
                return slot
        self._shrink(self.allowed - unit.nbytes)
        return self._new_slot(unit.nbytes) if self._taken() + unit.nbytes <= self.allowed else None

    def _place(self, unit: Unit, slot: Slot | None = None) -> None:
        """Begin to copy a unit to the device and let its modules use it there."""
        slot = slot or self._find_slot(unit) or self._new_slot(unit.nbytes)
        self.placed[unit] = Placed(slot, self.mover.start(unit.fill, slot.memory, slot.free_from))
        unit.place(slot.memory)

    def _wait(self, unit: Unit) -> None:
        """Let what follows wait until a unit's values are there."""
        self.mover.wait(self.placed[unit].ready_from)

    def _abandon(self) -> None:
        """After an error or Ctrl-C at any point: nothing on the device is trusted, all weights are at home."""
        self.mover.finish()  # no memory may go before what is being copied into it
        for unit in [unit for unit in (*itertools.chain(*self.layers), *self.guests.values()) if unit is not None]:
            unit.place(None)
        self.placed.clear()
        self.free.clear()
        self.order, self.stays = (), frozenset()
        self.moves += 1

    def _new_slot(self, nbytes: int) -> Slot:
        with torch.inference_mode(False):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return Slot(memory, self.mover.now())

    def _leave(self, unit: Unit) -> None:
        """Let a unit's modules use what is on the host again; its slot is free as soon as all work with it is done."""
        placed = self.placed.pop(unit, None)
        if placed is None:
            return
        self.mover.wait(placed.ready_from)
        unit.place(None)
        self.moves += 1
        self.free.append(Slot(placed.slot.memory, self.mover.now()))
