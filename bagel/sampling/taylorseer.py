"""TaylorSeer (arXiv 2503.06923): predict what an evaluation would give from a Taylor series over earlier ones.

Only the last layer's output reaches the image, so that one alone is kept: the same numbers as keeping every layer's,
at a fraction of the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from bagel.parameters import Parameters, option


@runtime_checkable
class CacheState(Protocol):
    """The cached evaluations of one guidance branch of one image; lives for one generation."""

    @property
    def due(self) -> bool:
        """Whether the next evaluation has to be computed."""
        ...

    def record(self, value: Tensor, /) -> None:
        """Take the computed value (n, H) of the next evaluation."""
        ...

    def predict(self) -> Tensor:
        """Return the predicted value (n, H) of the next evaluation."""
        ...


@runtime_checkable
class Caching(Protocol):
    """Whatever saves evaluations by predicting some of them from others."""

    def start(self) -> CacheState:
        """Return the state of one branch at the start of a generation."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Parameters):
    """Which evaluations are computed, and how far the series goes that predicts the others."""

    first: int = option(5, "evaluations at the start that are always computed", at_least=1)
    interval: int = option(3, "after those, one evaluation in so many is computed", at_least=1)
    max_order: int = option(6, "the highest derivative kept", at_least=0)

    def start(self) -> TaylorSeries:
        """Return the empty series of one branch."""
        return TaylorSeries(self)


class TaylorSeries:
    """The series of one guidance branch of one image; lives for one generation.

    Args:
        seer: when to compute and how many derivatives to keep.
    """

    def __init__(self, seer: TaylorSeer) -> None:
        self.seer = seer
        self.index = 0  # of the next evaluation of this branch
        self.last_full = 0
        self.derivatives: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether the next evaluation has to be computed."""
        return self.index < self.seer.first or self.index - self.last_full >= self.seer.interval

    def record(self, value: Tensor, /) -> None:
        """Take a computed value (n, H) and renew the derivatives by finite differences."""
        renewed = [value]
        distance = self.index - self.last_full
        if self.index > self.seer.first - 2:
            for old in self.derivatives[: self.seer.max_order]:
                renewed.append((renewed[-1] - old) / distance)
        self.derivatives = renewed
        self.last_full = self.index
        self.index += 1

    def predict(self) -> Tensor:
        """Return the predicted value (n, H) of the next evaluation."""
        distance = self.index - self.last_full
        self.index += 1
        value = self.derivatives[0]
        for order, derivative in enumerate(self.derivatives[1:], start=1):
            value = value + derivative * (distance**order / math.factorial(order))
        return value
