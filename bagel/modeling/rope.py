"""Rotary position embedding in Qwen2's half-split form (arXiv 2104.09864), angles in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from bagel.kernels import Rotary, rotate

__all__ = ["Rotary", "rotary_table", "rotate"]


def rotary_table(positions: Tensor, *, head_dim: int, theta: float) -> Rotary:
    """Return the table of rotary positions (T,); both halves of a head have the same angles."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-exponents  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]
