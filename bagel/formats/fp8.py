"""Weights of eight bits with float32 scales, as single-file checkpoints hold them: e4m3, e5m2 or int8.

What is meant is `values * scale`, with one scale for the weight, one per row, or one per block of 128 x 128 values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
BLOCK = 128
CHUNK = 2**24
"""Most weights expanded at once: bounds the temporaries."""


class Scaled(NamedTuple):
    """Values (out, in) of eight bits and their scale, float32: (1, 1), (out, 1), or (out / 128, in / 128) rounded up.

    `products`: inputs may be rounded to 8-bit floats too, for a faster product.
    """

    values: Tensor
    scale: Tensor
    products: bool = False

    @property
    def blockwise(self) -> bool:
        """Whether every block of 128 x 128 values has a scale."""
        return self.scale.shape[1] > 1 or self.scale.shape[0] not in (1, self.values.shape[0])


def quantize(weight: Tensor) -> Scaled:
    """Round a weight (out, in) to e4m3 with one scale, the largest absolute value over 448."""
    least, most = torch.aminmax(weight.detach())
    largest = torch.maximum(-least, most).float()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)).view(1, 1)
    values = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
    for rows in _steps(weight):
        exact = weight[rows].detach().float() / scale
        values[rows] = exact.clamp(-LARGEST, LARGEST).to(FLOAT8)
    return Scaled(values, scale, products=True)


def dequantize(weight: Scaled, *, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> Tensor:
    """Return the weights (out, in), or some of their rows, computed in float32."""
    first, last, _ = (rows or slice(None)).indices(weight.values.shape[0])
    count = max(last - first, 0)
    out = torch.empty(count, *weight.values.shape[1:], dtype=dtype, device=weight.values.device)
    for part in _steps(out):
        begin, end = first + part.start, min(first + part.stop, last)
        out[part] = weight.values[begin:end].float() * scale_of(weight, begin, end)
    return out


def scale_of(weight: Scaled, first: int, last: int) -> Tensor:
    """Return the scales that rows `first` to `last` are multiplied by, of a shape that broadcasts against them."""
    scale = weight.scale
    if weight.blockwise:
        lines = torch.arange(first, last, device=scale.device) // BLOCK
        columns = torch.arange(weight.values.shape[1], device=scale.device) // BLOCK
        return scale[lines][:, columns]
    return scale if scale.shape[0] == 1 else scale[first:last]


def is_finite(weight: Scaled) -> Tensor:
    """Return, as a boolean on its device, whether values, scales and their greatest product are not NaN or infinite."""
    dtype = weight.values.dtype
    greatest = 128 if dtype == torch.int8 else torch.finfo(dtype).max
    fine = (weight.scale.float() * greatest).isfinite().all()
    if dtype == torch.int8:
        return fine
    bits = weight.values.view(torch.uint8) & 0x7F
    limit = 0x7E if weight.values.dtype == FLOAT8 else 0x7B  # the largest finite pattern; e5m2 has infinities
    return fine & (bits <= limit).all()


def _steps(weight: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(weight[0].numel() if weight.shape[0] else 1, 1))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]
