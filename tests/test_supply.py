"""Weights within a limit, part by part: what is asked in any order, units and their slots, what stays."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
import torch
from limited_models import HOST, PHOTO, SMALL, limited
from torch import nn

from bagel.memory import NotEnoughMemoryError, units
from bagel.memory.choice import passing
from bagel.memory.placement import weight_bytes
from bagel.memory.supply import Supply
from bagel.memory.units import Piece, Unit
from bagel.pipeline import BagelPipeline


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_asked_for_in_whatever_order_values_are_right_and_within_the_limit(seed):
    """Forwards, guests and room in a random order, some stopped half-way, some without memory."""
    world = World(random.Random(seed))
    for _ in range(30):
        with contextlib.suppress(Stopped, NotEnoughMemoryError, torch.OutOfMemoryError):
            world.random.choice([world.forward, world.forward, world.guest, world.room])()
    world.supply.release()
    assert all(module.weight.equal(weight) for module, weight in world.weights.items())


class Stopped(Exception):
    pass


class World:
    """A supply of random units, and what they hold."""

    def __init__(self, numbers: random.Random) -> None:
        self.random = numbers

        def module(*sizes: int) -> nn.Linear:
            return nn.Linear(numbers.choice(sizes), 1, bias=False).requires_grad_(False)

        def unit(own: nn.Module | None) -> Unit | None:
            return None if own is None else Unit("weight", [own], smallest=0)

        self.pairs = [(module(300, 500), module(300, 700) if numbers.random() < 0.9 else None) for _ in range(5)]
        self.guests = [module(200, 300, 900) for _ in range(3)]
        every = [own for own in (*itertools.chain(*self.pairs), *self.guests) if own is not None]
        self.weights = {own: own.weight.clone() for own in every}
        layers = [(unit(und), unit(gen)) for und, gen in self.pairs]
        guests = {guest: unit(guest) for guest in self.guests}
        total = sum(2048 + own.weight.nbytes for own in every)
        limit = numbers.randrange(9000, total)
        self.supply = Supply(HOST, layers, guests, limit=limit, fixed=0, work=lambda u, g: u + g, slack=0)  # pyright: ignore
        new_slot = self.supply._new_slot

        def lacking(size: int):
            if numbers.random() < 0.03:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return new_slot(size)

        self.supply._new_slot = lacking

    def forward(self) -> None:
        und, gen = self.random.choice([1, 500, 2000, 4000]), self.random.choice([0, 0, 100, 3000, 6000])
        stop = self.random.choice([None] * 6 + [0, 1, 2, 3])
        with self.supply.through([nn.Identity()] * 5, torch.empty(und, 1), torch.empty(gen, 1)) as layers:
            for index, _ in enumerate(layers):
                for own in self.pairs[index][: 2 if gen else 1]:
                    assert own is None or own.weight.equal(self.weights[own])
                assert self.supply._taken() <= self.supply.limit - und - gen
                if index == stop:
                    raise Stopped

    def guest(self) -> None:
        guest, work = self.random.choice(self.guests), self.random.choice([0, 100, 2000])
        with self.supply.using(guest, work):
            assert guest.weight.equal(self.weights[guest])
            assert self.supply._taken() <= self.supply.limit - work

    def room(self) -> None:
        wanted = self.random.choice([0, 1000, 5000])
        self.supply.make_room(wanted)
        assert self.supply._taken() <= self.supply.limit - wanted


# What stays -----------------------------------------------------------------------------------------------------------


def test_weights_hold_while_all_that_a_forward_needs_stays():
    pipe = limited("tiny", 1.0)
    supply = pipe.model.decoder.supply
    assert not supply.holds(gen=False)
    pipe.understand([], "What?", max_new_tokens=2, progress=False)
    assert supply.holds(gen=False)
    assert not supply.holds(gen=True)
    pipe.text_to_image("a red circle", seed=1, **SMALL)
    assert supply.holds(gen=True)
    supply.stays -= {supply.layers[0][0]}  # as one that only passes
    assert not supply.holds(gen=False)
    supply.stays |= {supply.layers[0][0]}
    supply.make_room(supply.limit - supply.fixed - supply.layers[0][0].nbytes)
    assert not supply.holds(gen=False)


def test_what_always_stays_is_all_that_is_in_no_unit():
    pipe = limited("tiny", 0.3)
    supply = pipe.model.decoder.supply
    held = [part.home.nbytes for unit in itertools.chain(*supply.layers, supply.guests.values()) for part in unit.parts]
    assert supply.fixed == weight_bytes(pipe.model, pipe.vae) - sum(held) > 0


def test_what_is_spare_is_the_limit_less_what_stands_there():
    pipe = limited("tiny", 0.3)
    supply = pipe.model.decoder.supply
    pipe.understand(PHOTO, "What?", max_new_tokens=2, progress=False)
    standing = sum(placed.slot.memory.nbytes for placed in supply.placed.values())
    assert supply.spare() == supply.limit - supply.fixed - standing
    supply._leave(next(iter(supply.placed)))
    assert supply.spare() > supply.limit - supply.fixed - standing


def tight() -> tuple[BagelPipeline, Supply]:
    """A pipeline in which a text's head and one of its experts at a time have room, and the next one."""
    pipe = limited("tiny", 0.0)
    supply = pipe.model.decoder.supply
    experts = [und for und, _ in supply.layers]
    supply.limit = supply.fixed + supply.guests[pipe.model.decoder.lm_head].nbytes + passing(experts, 2)
    return pipe, supply


def test_a_text_fetches_its_head_once():
    pipe, supply = tight()
    started, start = [], supply.mover.start
    supply.mover.start = lambda fill, *rest: (started.append(fill.__self__), start(fill, *rest))[1]
    pipe.understand([], "What?", max_new_tokens=6, progress=False)
    assert started.count(supply.guests[pipe.model.decoder.lm_head]) == 1
    assert started.count(supply.layers[0][0]) > 1


def test_a_limit_that_is_raised_is_used(monkeypatch):
    pipe, supply = tight()
    pipe.understand([], "What?", max_new_tokens=2, progress=False)
    assert not supply.stays
    monkeypatch.setattr("bagel.memory.supply.GIB", supply.layers[0][0].nbytes)
    supply.limit += supply.layers[0][0].nbytes
    pipe.understand([], "What?", max_new_tokens=2, progress=False)
    assert supply.holds(gen=False)


# Units ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_files_are_read_a_few_rows_at_a_time_and_no_further_than_a_piece(monkeypatch, rows):
    linear, stored = nn.Linear(6, 10, bias=False, device="meta"), torch.randn(10, 6)
    monkeypatch.setattr(units, "READ_BYTES", rows * 6 * 4)
    read = []

    def piece(start: int, count: int) -> Piece:
        def rows_of(first: int, last: int) -> torch.Tensor:
            assert last <= count
            read.append(last - first)
            return stored[start + first : start + last]

        return Piece(start, count, rows_of)

    unit = Unit("test", [linear], pieces={(linear, "weight"): [piece(0, 4), piece(4, 6)]}, smallest=0)
    memory = torch.empty(unit.nbytes, dtype=torch.uint8)
    unit.fill(memory)
    unit.place(memory)
    assert linear.weight.equal(stored)
    assert read == {1: [1] * 10, 3: [3, 1, 3, 3], 5: [4, 5, 1]}[rows]


def test_tensors_of_a_unit_are_aligned_and_laid_out_as_at_home():
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    conv.register_buffer("bytes", torch.arange(7, dtype=torch.uint8))
    unit = Unit("test", [conv, nn.Linear(3, 5)], smallest=0)
    memory = torch.zeros(unit.nbytes, dtype=torch.uint8)
    wanted = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    strides = conv.weight.stride()
    unit.fill(memory)
    unit.place(memory)
    assert all(part.start % 512 == 0 for part in unit.parts)
    assert conv.weight.stride() == strides
    assert conv.weight.untyped_storage().data_ptr() == memory.data_ptr()
    assert all(tensor.equal(wanted[name]) for name, tensor in conv.state_dict().items())
