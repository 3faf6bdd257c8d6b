"""What enters and leaves the decoder besides text: positions, time, and the connector to the ViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_table(side: int, channels: int) -> Tensor:
    """Return the 2-D sin-cos table (side * side, channels) float32, row-major over the grid.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] over frequencies
    10000^(-i / (channels / 4)). Source: DiT, arXiv 2212.09748.

    Raises:
        ValueError: channels not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a 2-D sin-cos table needs a multiple of 4 channels, got {channels}")
    quarter = channels // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, channels / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, channels / 2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


class PositionTable(nn.Module):
    """A fixed 2-D sin-cos table, looked up by grid cell; a stored table wins over the computed one."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.table: Tensor
        shape_alone = torch.get_default_device().type == "meta"
        self.register_buffer("table", torch.empty(side**2, channels) if shape_alone else sincos_table(side, channels))

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return rows (n, channels) for cells (n,)."""
        return self.table[position_ids]


def timestep_features(t: Tensor, size: int = 256) -> Tensor:
    """Return sinusoidal features (n, size) float32 of times t (n,) in [0, 1]: [cos | sin], frequencies from 1 to 1e-4.

    Source: DiT, arXiv 2212.09748; t is not multiplied by 1000 here.
    """
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Embed the time of the flow: 256 sinusoidal features through a two-layer MLP."""

    def __init__(self, hidden_size: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.fc1 = nn.Linear(features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """Return embeddings (n, hidden) of times t (n,) in [0, 1]."""
        features = timestep_features(t, self.features).to(next(self.parameters()).dtype)
        return self.fc2(F.silu(self.fc1(features)))


class Connector(nn.Module):
    """Two-layer MLP (gelu-tanh) from the ViT's width to the decoder's."""

    def __init__(self, vit_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vit_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (n, vit) to (n, hidden)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
