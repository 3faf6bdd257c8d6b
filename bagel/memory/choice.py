"""Which weights stay on a device that does not hold them all: as many as there is room for beside the slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bagel.memory.units import Unit

AHEAD = 4
"""Slots that weights pass through: two for the layer that computes, one for each expert, and two for the next."""
Experts = tuple[Unit, Unit | None]
"""The weights of a layer's und expert, and of its gen expert where it has one."""


def needs(experts: Experts, gen: int) -> tuple[Unit, ...]:
    """Return what a layer needs: the gen expert is not asked where it has no tokens."""
    und_unit, gen_unit = experts
    if not gen or gen_unit is None:
        return (und_unit,)
    return (und_unit, gen_unit)  # there are und tokens around every image


def nbytes(units: Iterable[Unit]) -> int:
    """Return the bytes that units take."""
    return sum(unit.nbytes for unit in units)


def passing(order: Sequence[Unit], slots: int = AHEAD) -> int:
    """Return the bytes of the slots that weights of this order pass through."""
    return sum(sorted((unit.nbytes for unit in order), reverse=True)[:slots])


def chosen(order: Sequence[Unit], room: int) -> tuple[frozenset[Unit], int] | None:
    """Return which units of an order stay within so many bytes, and the bytes of slots for the others.

    Those that stay are spread evenly. None where not even two slots fit.
    """
    total = nbytes(order)
    if total <= room:
        return frozenset(order), 0
    slots = next((slots for slots in range(AHEAD, 1, -1) if passing(order, slots) <= room), None)
    if slots is None:
        return None
    share = (room - passing(order, slots)) / total
    stays, kept, seen = set(), 0, 0
    for unit in order:
        seen += unit.nbytes
        if kept + unit.nbytes <= seen * share:
            stays.add(unit)
            kept += unit.nbytes
    return frozenset(stays), passing(order, slots)
