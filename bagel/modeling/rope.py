"""Rotary position embedding in Qwen2's half-split form (arXiv 2104.09864), angles in float32."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, D) float32."""


def rotary_table(positions: Tensor, *, head_dim: int, theta: float) -> Rotary:
    """Return cos and sin for rotary positions (T,): each (T, D) float32, both halves alike."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-exponents  # (T, D/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads x (T, heads, D) by the table of their positions; computed in the type of `x`."""
    cos, sin = (table[:, None] for table in rotary)  # (T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
