"""Rows of the table that an evaluation prints: rates with their confidence intervals, and what lies behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution


@dataclass(frozen=True)
class Trial:
    """Hold one attempt: what was asked, with which seed, what was wanted and seen, and whether it is right.

    `images`: of a failure, if they are kept; the inputs first, what the model drew last.
    """

    prompt: str
    seed: int
    right: bool
    wanted: str
    seen: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Row:
    """Hold one line of the table: a rate (`right` of `total`), a quantity (`value` in `unit`), or neither.

    `interval`: (low, high) of the rate, None without one. `note`: more in words; of a row with neither, why it could
    not be measured. `trials`: the attempts, none for a row that sums up others.
    """

    name: str
    right: int = 0
    total: int = 0
    interval: tuple[float, float] | None = None
    note: str = ""
    value: float | None = None
    unit: str = ""
    trials: tuple[Trial, ...] = ()

    @property
    def rate(self) -> float | None:
        """Share of right attempts in [0, 1]; None where nothing was attempted."""
        return self.right / self.total if self.total else None


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval (low, high), in [0, 1], of a rate of `right` in `total` attempts.

    Wilson's score interval (JASA 22, 1927): sound near 0 and 1 too, where these rates lie. Raises ValueError for
    no attempts or more right ones than attempts.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"a rate needs 0 <= right <= total and total > 0, got {right} of {total}")
    share, spread = right / total, Z95**2 / total
    middle = share + spread / 2
    reach = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = ((middle + side * reach) / (1 + spread) for side in (-1, 1))
    return (0.0 if right == 0 else low), (1.0 if right == total else high)


def rate_row(name: str, trials: Sequence[Trial], note: str = "") -> Row:
    """Return the row of some attempts."""
    right = sum(trial.right for trial in trials)
    return Row(name, right, len(trials), wilson(right, len(trials)), note, trials=tuple(trials))


def sum_row(name: str, rows: Sequence[Row], note: str = "") -> Row:
    """Return the row that takes the attempts of several rows together."""
    right, total = sum(row.right for row in rows), sum(row.total for row in rows)
    return Row(name, right, total, wilson(right, total), note)


def paired_gap(first: Sequence[Trial], second: Sequence[Trial]) -> tuple[float, float, float]:
    """Return by how much the first attempts are more often right than the second: (gap, low, high), in [-1, 1].

    Both are at the same examples in the same order. The 95% interval is Newcombe's for paired shares (method 10 of
    Statistics in Medicine 17, 1998, page 2635): as sound near 0 and 1 as the Wilson intervals that it is made of.
    """
    pairs = Counter((a.right, b.right) for a, b in zip(first, second, strict=True))
    both, neither = pairs[True, True], pairs[False, False]
    total, rights = len(first), (both + pairs[True, False], both + pairs[False, True])
    p, q = (right / total for right in rights)
    (p_low, p_high), (q_low, q_high) = (wilson(right, total) for right in rights)
    margins = math.prod(right * (total - right) for right in rights)
    excess = both * neither - pairs[True, False] * pairs[False, True]
    excess = max(excess - total / 2, 0) if excess > 0 else excess
    correlation = excess / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * correlation * a * b + b * b)

    return p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


HEADING = f"{'task':<46}{'right':>11}{'rate':>9}  {'95% interval':<16}note"


def line(row: Row) -> str:
    """Return a row as a line of text under `HEADING`."""
    if row.interval is not None and row.rate is not None:
        low, high = row.interval
        counted = f"{row.right}/{row.total}"
        figures = f"{counted:>11}{100 * row.rate:>8.1f}%  {f'[{100 * low:.1f}, {100 * high:.1f}]':<16}"
    elif row.value is not None:
        figures = f"{f'{row.value:.3g} {row.unit}':>20}  {'':<16}"
    else:
        figures = f"{'-':>20}  {'':<16}"
    return f"{row.name:<46}{figures}{row.note}".rstrip()
