"""Rotary position embedding in Qwen2's half-split form (arXiv 2104.09864), angles in float32."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, 1, D) float32; the sines of the first half have their sign changed."""


def rotary_table(positions: Tensor, *, head_dim: int, theta: float) -> Rotary:
    """Return the table of rotary positions (T,); both halves of a head have the same angles."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-exponents  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads x (T, heads, D) by the table of their positions; computed in the type of `x`."""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
