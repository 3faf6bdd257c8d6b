"""Rotary embedding of a two-dimensional patch grid, for encoders without a learned position table."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rotary_table(position_ids: Tensor, *, side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that `rotate` takes, computed in float32.

    The first half of a head turns with the patch's row (`id // side`), the second with its column (`id % side`), each
    with head_dim/4 frequencies THETA^(-4i/head_dim), i = 0, 1, ...

    position_ids: (N,) integers, `row * side + column`.
    Returns cos and sin, each (N, 1, 2, head_dim/4) in float32: patch, head (broadcast), row or column, frequency.
    """
    exponents = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=position_ids.device)
    coordinates = torch.stack([position_ids // side, position_ids % side], dim=-1)  # (N, 2)
    angles = coordinates[:, None, :, None] * THETA**-exponents  # (N, 1, 2, head_dim/4)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their patch's row and column; computed in float32, rounded to x's type once.

    x: (N, heads, head_dim); channel i of a half-head is paired with channel i + head_dim/4.
    table: cos and sin of `rotary_table`.
    """
    cos, sin = table
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (N, heads, 2, head_dim/4) each
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return turned.flatten(-3).to(x.dtype)
