"""Rectified flow (arXiv 2209.03003): the times, and the way from noise (t = 1) to data (t = 0) step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bagel.parameters import described

SHIFTS = (0.001, 1000.0)
"""The least and the largest shift; in float32 the times of one far beyond either are no longer those of a flow."""
Velocity = Callable[[Tensor, float], Tensor]
"""x (N, P) float32, the tokens of all images of a batch one after the other, and the shifted time -> v (N, P)."""


@runtime_checkable
class Solver(Protocol):
    """Whatever takes one step of the flow; any such function will do.

    The model was trained at times above 0: a step to next_t = 0 is better taken without an evaluation there.
    A solver that remembers something from step to step has a method `start()`, called once per generation, which
    returns the object or function that takes its steps.
    """

    def __call__(self, velocity: Velocity, x: Tensor, t: float, next_t: float, /) -> Tensor:
        """Return x (N, P) at the time next_t from x (N, P) at t; x itself must stay as it is."""
        ...


@dataclass(frozen=True)
class Euler:
    """The solver of the official code: one evaluation per step."""

    def __call__(self, velocity: Velocity, x: Tensor, t: float, next_t: float, /) -> Tensor:
        """Return x at next_t along the velocity at t."""
        # Beside a float32 tensor the difference is rounded to float32: just what subtracting float32 times gives.
        return x - velocity(x, t) * (t - next_t)


@dataclass(frozen=True)
class FlowStep:
    """One step of one image's trajectory, before it is taken. The tensors are the observer's to keep and to change.

    `index` counts steps from 0 to `num_steps` - 1; `t` in (0, 1] and `next_t` in [0, t) are the times of the step;
    `latents` (n, P) float32 are x at t; `velocity` (n, P) float32 is the first one evaluated in the step, after
    guidance; `next_latents` (n, P) are x at next_t. `picture`, also called `image`, counts within a batch.
    """

    index: int
    num_steps: int
    t: float
    next_t: float
    latents: Tensor
    velocity: Tensor
    next_latents: Tensor
    picture: int = 0

    @property
    def image(self) -> int:
        """The image's number within its batch."""
        return self.picture


OnStep = Callable[[FlowStep], Tensor | None]
"""Sees each step of each image; a tensor that it returns takes the place of the step's `next_latents`."""


def flow_timesteps(num_timesteps: int, *, shift: float = 1.0) -> Tensor:
    """Return the times (num_timesteps,) float32 on the CPU, from 1 down to 0, shifted by s t / (1 + (s - 1) t).

    N times make N - 1 steps: the last time, 0, is only arrived at.

    Raises:
        ValueError: fewer than 2 times, or a shift out of `SHIFTS`.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2 (one step), got {num_timesteps}")
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise ValueError(f"timestep_shift must lie in [{SHIFTS[0]}, {SHIFTS[1]}], got {shift}")
    t = torch.linspace(1, 0, num_timesteps, device="cpu")
    return shift * t / (1 + (shift - 1) * t)


def integrate(
    solver: Solver,
    velocity: Velocity,
    noise: Tensor,
    timesteps: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    on_step: OnStep | None = None,
    watch: Callable[[Sequence[tuple[float, float]]], Iterable[tuple[float, float]]] = iter,
) -> Tensor:
    """Return x (N, P) float32 at the last time; nothing here reads the device.

    Args:
        solver: takes each step.
        velocity: evaluates all images at once.
        noise: x at the first time, (N, P) float32: the tokens of all images one after the other. It is not changed.
        timesteps: falling times on the CPU, from `flow_timesteps` or a part of them.
        sizes: tokens of each image; None: it is one image.
        on_step: sees each image's step before it is taken, and may replace its `next_latents`; what it raises ends
            the integration.
        watch: goes round the pairs of times, as a progress bar does.

    Raises:
        TypeError: the solver or on_step returns something else than latents of the same shape.
    """
    times = timesteps.tolist()
    step = solver.start() if hasattr(solver, "start") else solver  # pyright: ignore[reportAttributeAccessIssue]
    if not callable(step):
        raise TypeError(f"the solver's start() must return what takes its steps, got {described(step)}")
    x = noise
    for index, (t, next_t) in enumerate(watch(list(itertools.pairwise(times)))):
        seen = velocity if on_step is None else _FirstOf(velocity)
        next_x = checked("the solver", step(seen, x, t, next_t), like=x)
        if on_step is not None:
            first = getattr(seen, "value", None)
            v = (x - next_x) / (t - next_t) if first is None else first  # the mean, if none was evaluated
            next_x = _observed(on_step, (index, len(times) - 1, t, next_t), x, v, next_x, sizes or [x.shape[0]])
        x = next_x
    return x


def _observed(
    on_step: OnStep,
    place: tuple[int, int, float, float],
    x: Tensor,
    v: Tensor,
    next_x: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Show each image's step, and return what the flow goes on with."""
    changed = []
    parts = zip(*(values.split(list(sizes)) for values in (x, v, next_x)), strict=True)
    for image, (now, velocity, following) in enumerate(parts):
        given = on_step(FlowStep(*place, _copied(now), _copied(velocity), _copied(following), image))
        changed.append(following if given is None else checked("on_step", given, like=following))
    return torch.cat(changed)


class _FirstOf:
    """A velocity that remembers the first value it gave."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.value: Tensor | None = None

    def __call__(self, x: Tensor, t: float, /) -> Tensor:
        v = self.velocity(x, t)
        if self.value is None:
            self.value = v
        return v


def _copied(x: Tensor) -> Tensor:
    with torch.inference_mode(False):  # or an observer could neither change it later nor differentiate through it
        return x.clone()


def checked(what: str, value: Any, *, like: Tensor) -> Tensor:
    """Return what a replaceable part has returned.

    Raises:
        TypeError: it is no tensor of the shape of `like`.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or not value.is_floating_point():
        got = described(value)
        if isinstance(value, Tensor):
            got = f"shape {tuple(value.shape)}" + ("" if value.is_floating_point() else f" of {value.dtype}")
        raise TypeError(f"{what} must return a tensor of shape {tuple(like.shape)}, got {got}")
    return value.to(like)
