"""Rectified flow (arXiv 2209.03003): the schedule of times and the Euler steps from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[list[Tensor], int], list[Tensor]]
"""x (n, P) of every picture and the index of the evaluation -> v (n, P) of every picture."""


@dataclass(frozen=True)
class FlowStep:
    """One evaluation of one picture's trajectory.

    `index` counts evaluations from 0 to `num_steps` - 1; `t` in (0, 1]; `latents` (n, P) float32 are x at time t,
    before the step; `velocity` (n, P) float32 is what the step uses, after guidance. `picture` counts within a batch.
    Both tensors are the flow's own: an observer must not change them.
    """

    index: int
    num_steps: int
    t: float
    latents: Tensor
    velocity: Tensor
    picture: int = 0


def flow_timesteps(num_timesteps: int, *, shift: float = 1.0) -> Tensor:
    """Return the times (num_timesteps,) float32 on the CPU, from 1 down to 0, shifted by s t / (1 + (s - 1) t).

    N times make N - 1 evaluations: the last time, 0, is only arrived at.

    Raises:
        ValueError: fewer than 2 times, or a shift that is not positive.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2 (one evaluation), got {num_timesteps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"timestep_shift must be positive and finite, got {shift}")
    t = torch.linspace(1, 0, num_timesteps)
    return shift * t / (1 + (shift - 1) * t)


def euler(
    velocity: Velocity,
    noise: list[Tensor],
    timesteps: Tensor,
    *,
    on_step: Callable[[FlowStep], object] | None = None,
) -> list[Tensor]:
    """Integrate pictures from noise to data with Euler's method; nothing here reads the device.

    Args:
        velocity: evaluates every picture at once.
        noise: x at t = 1 of each picture, (n, P) float32.
        timesteps: from `flow_timesteps`.
        on_step: sees each picture's step before it is taken; what it raises ends the integration.

    Returns:
        x at t = 0 of each picture, (n, P) float32.
    """
    times = timesteps.tolist()
    steps = (timesteps[:-1] - timesteps[1:]).tolist()
    x = noise
    for index, dt in enumerate(steps):
        v = velocity(x, index)
        if on_step is not None:
            for picture, (latents, now) in enumerate(zip(x, v, strict=True)):
                on_step(FlowStep(index, len(steps), times[index], latents, now, picture))
        x = [a - b * dt for a, b in zip(x, v, strict=True)]
    return x
