"""Products of rows and weights in 8-bit integers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bagel.kernels.functions import Rows, find, has_matrix_units

EXACT = 1024
"""Columns whose products float32 adds up exactly: 127 * 127 * 1024 is less than 2^24."""


def integer_product(
    x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, add: Tensor | None = None
) -> Tensor:
    """Return x (T, in) times the rows of a weight (out, in), both int8, plus a bias (out,), plus `add` (T, out).

    The sums of products are exact: what is lost was lost in rounding. The result is of the type that x names.

    Args:
        x: rows and their scales.
        weight: int8.
        scale: of each row of the weight, (out, 1) float32.
        bias: added before the sum is rounded to its type, `add` after.
        add: may be of another type.
    """
    if has_matrix_units(x.scale) and (kernel := find("integer_product", x.scale)):
        plus = add.contiguous() if add is not None and add.dtype == x.dtype else None
        y = kernel(x.values, x.scale, weight, scale, bias, plus, dtype=x.dtype)
        return y if add is None or plus is not None else add + y
    y = _exact(x.values, weight).float() * x.scale * scale.t()
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y if add is None else add + y


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product (T, out) int32 of integers (T, in) and (out, in)."""
    if x.device.type == "cpu":
        return torch.ops.aten._int_mm(x, weight.t())
    if x.is_cuda and all(side % 8 == 0 for side in weight.shape) and _multiplies_integers(x.device):
        padded = torch.nn.functional.pad(x, (0, 0, 0, max(0, 32 - x.shape[0])))  # it takes no fewer than 17 rows
        return torch.ops.aten._int_mm(padded, weight.t())[: x.shape[0]]
    return _in_floats(x, weight)


@functools.cache
def _multiplies_integers(gpu: torch.device) -> bool:
    """Whether torch's integer product runs on a GPU: NVIDIA's from Turing on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu) >= (7, 5)


def _in_floats(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for first in range(0, x.shape[1], EXACT):
        part = slice(first, first + EXACT)
        total += (x[:, part].float() @ weight[:, part].float().t()).int()
    return total
