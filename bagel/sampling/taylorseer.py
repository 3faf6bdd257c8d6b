"""TaylorSeer (arXiv 2503.06923): predict what an evaluation would give from a Taylor series over earlier ones.

Only the last layer's output reaches the picture, so that one alone is kept: the same numbers as keeping every
layer's, at a fraction of the memory.
"""

from __future__ import annotations

import math

from torch import Tensor


class TaylorSeer:
    """The state of one guidance branch of one picture; lives for one generation.

    Args:
        first: evaluations at the start that are always computed.
        interval: after those, one evaluation in `interval` is computed and the others are predicted.
        max_order: highest derivative kept.
    """

    def __init__(self, *, first: int = 5, interval: int = 3, max_order: int = 6) -> None:
        self.first, self.interval, self.max_order = first, interval, max_order
        self.index = 0  # of the next evaluation of this branch
        self.last_full = 0
        self.derivatives: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether the next evaluation has to be computed."""
        return self.index < self.first or self.index - self.last_full >= self.interval

    def record(self, value: Tensor) -> None:
        """Take a computed value (n, H) and renew the derivatives by finite differences."""
        renewed = [value]
        distance = self.index - self.last_full
        if self.index > self.first - 2:
            for old in self.derivatives[: self.max_order]:
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
