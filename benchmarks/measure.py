"""Time a call several times in a row, and measure what the machine can do at most: one matmul, one copy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the very first, and one mean for each repeat; the last repeat counts.

    A machine under load settles at a lower clock, so repeats follow each other without a pause and their last is the
    honest one. `calls`: how many each repeat holds, more than one of what takes less than a repeat should.
    """

    first: float
    repeats: tuple[float, ...]
    calls: int

    @property
    def last(self) -> float:
        """The last repeat."""
        return self.repeats[-1]

    @property
    def median(self) -> float:
        """The median of all repeats."""
        return statistics.median(self.repeats)

    @property
    def spread(self) -> float:
        """Slowest less fastest repeat, as a share of the median."""
        return (max(self.repeats) - min(self.repeats)) / self.median


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, measured: operations per second in one large matmul, bytes per second in a copy.

    A copied byte counts twice, as read and as written.
    """

    matmul: float
    copy: float


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return how long a call takes until the device is done, and its result."""
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - start, result


def measure(call: Callable[[], Any], device: torch.device, *, repeat: int, at_least: float = 0.0) -> tuple[Timing, Any]:
    """Call once to warm up, then `repeat` times in a row; return the times and the last result.

    Args:
        call: what to time.
        device: to wait for, before and after each repeat only.
        repeat: how often.
        at_least: seconds of a repeat; a shorter call is made several times in each.
    """
    first, _ = seconds(call, device)
    once, result = seconds(call, device)
    calls = max(1, math.ceil(at_least / max(once, 1e-9)))

    def several() -> Any:
        for _ in range(calls):
            out = call()
        return out

    found = [once] if calls == 1 else []  # what is long enough alone was the first repeat already
    while len(found) < repeat:
        taken, result = seconds(several, device)
        found.append(taken / calls)
    return Timing(first, tuple(found), calls), result


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """Measure both ceilings, one after the other, each for long enough that the clock settles.

    On a GPU the matmul is 8192x8192x8192 in `dtype` and the copy 1 GiB; on a CPU both are smaller.
    """
    gpu = device.type == "cuda" and not quick
    side, size = (8192, 2**30) if gpu else (256, 2**20) if quick else (2048, 2**28)
    at_least = 0.0 if quick else 1.0
    with torch.inference_mode():
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        matmul, _ = measure(lambda: torch.mm(a, b, out=product), device, repeat=3, at_least=at_least)
        source = torch.zeros(size, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy, _ = measure(lambda: target.copy_(source), device, repeat=3, at_least=at_least)
    return Ceilings(matmul=2 * side**3 / matmul.last, copy=2 * size / copy.last)


def reset_peak(device: torch.device) -> None:
    """Forget the peak of GPU memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes of GPU memory that tensors held since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
