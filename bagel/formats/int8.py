"""Weights of 8-bit integers with a scale per output channel, and how files of LLM.int8() (arXiv 2208.07339) hold them.

Such a file has the integers under the weight's own name, and beside it the greatest magnitude of each row as `SCB`: a
weight is `integer * SCB / 127`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
"""The greatest integer: the least is its negative, so that a weight and its negative are stored alike."""
CHUNK = 1 << 24
"""Values that are quantised at a time: bounds the temporary memory to some 200 MiB."""


class Integers(NamedTuple):
    """A weight: `values * scale`."""

    values: Tensor  # (out, in) int8
    scale: Tensor  # (out, 1) float32


def quantize(weight: Tensor) -> Integers:
    """Quantise a weight (out, in) on its device, each row by its greatest magnitude.

    Given in float16 it becomes what a file of LLM.int8() holds.

    Raises:
        ValueError: a weight that is no matrix of floats, or has values that are NaN or infinite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight to quantise must be a matrix of floats, got {tuple(weight.shape)} {weight.dtype}")
    weight = weight.detach()
    values, most = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], 1, dtype=torch.float32)
    step = max(1, CHUNK // max(weight.shape[1], 1))
    for first in range(0, weight.shape[0], step):
        rows = weight[first : first + step].float()
        most[first : first + step] = greatest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows * (LARGEST / torch.where(greatest > 0, greatest, 1))
        values[first : first + step] = rows.round_().clamp_(-LARGEST, LARGEST)
    if not most.isfinite().all():
        raise ValueError("a weight with values that are NaN or infinite cannot be quantised; fetch the file again")
    return Integers(values, most / LARGEST)


def dequantize(weight: Integers, dtype: torch.dtype = torch.float32, *, rows: slice | None = None) -> Tensor:
    """Return the weight (out, in), or some rows of it: each value one product in float32, rounded once to the type."""
    values, scale = (part[rows or slice(None)] for part in weight)
    out = torch.empty_like(values, dtype=dtype)
    step = max(1, CHUNK // max(values.shape[1], 1))
    for first in range(0, values.shape[0], step):
        out[first : first + step] = values[first : first + step].float() * scale[first : first + step]
    return out


def to_file(name: str, weight: Integers) -> dict[str, Tensor]:
    """Return the tensors under which a checkpoint of LLM.int8() holds the weight `name` ("....weight")."""
    module = name.removesuffix(".weight")
    greatest = (weight.scale * LARGEST).reshape(-1)
    row_by_row = torch.zeros((), dtype=torch.uint8)
    return {name: weight.values, f"{module}.SCB": greatest, f"{module}.weight_format": row_by_row}


def from_file(name: str, tensors: Mapping[str, Tensor]) -> Integers:
    """Return the weight `name` of a checkpoint of LLM.int8().

    Raises:
        ValueError: the scales are missing or do not fit, or the weight is laid out in tiles for one GPU.
    """
    module, values = name.removesuffix(".weight"), tensors[name]
    greatest, layout = tensors.get(f"{module}.SCB"), tensors.get(f"{module}.weight_format")
    if layout is not None and bool((layout != 0).any()):
        raise ValueError(f"{name} is stored in tiles for one kind of GPU; only rows (weight_format 0) can be read")
    if greatest is None:
        raise ValueError(f"{name} has 8-bit integers without their scales ({module}.SCB)")
    if values.dtype != torch.int8 or values.ndim != 2 or greatest.shape != values.shape[:1]:
        raise ValueError(
            f"{name} should be a matrix of int8 with a scale per row, got {tuple(values.shape)} {values.dtype} and "
            f"{tuple(greatest.shape)} scales"
        )
    if bool((greatest < 0).any()):
        raise ValueError(f"{module}.SCB has magnitudes that are negative; fetch the file again")
    return Integers(values, greatest.float()[:, None] / LARGEST)
