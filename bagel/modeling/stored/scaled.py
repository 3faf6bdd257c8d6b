"""Weights of eight bits with scales as single-file checkpoints hold them, expanded for products of many tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bagel.formats import fp8
from bagel.kernels import Rounding, Rows, find
from bagel.modeling.float8 import can_multiply
from bagel.modeling.stored.expanded import multiply_expanded, multiply_one


class ScaledLinear(nn.Module):
    """What a linear layer computes, its weight stored in eight bits; inputs are not rounded.

    Args:
        weight: values (out, in) and their scale, see `bagel.formats.fp8.Scaled`.
        bias: (out,), or None.
    """

    contract: ClassVar[type]
    takes: Rounding | None = None
    exact: ClassVar[bool] = False
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: fp8.Scaled, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.format = "int8" if weight.values.dtype == torch.int8 else "float8"
        self.register_buffer("weight", weight.values)
        scale = weight.scale
        if not weight.blockwise:  # one for each row, as kernels take it
            scale = scale.expand(self.out_features, 1).contiguous()
        self.register_buffer("scale", scale)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> ScaledLinear:
        """Round a dense layer's weight to e4m3 with one scale, on its device."""
        return cls(fp8.quantize(linear.weight), linear.bias)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`, which may be written into."""
        if not isinstance(x, Tensor) or x.shape[0] > 1 or self.scale.shape != (self.out_features, 1):
            return multiply_expanded(self, x, add=add)
        kernel = find("matrix_times_vector", x, narrow=True)
        if kernel is None or not _kernels_take(self.weight):
            return multiply_expanded(self, x, add=add)
        return multiply_one(kernel, self, x, add=add)

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows, that the layer multiplies by; float32 by default."""
        return fp8.dequantize(fp8.Scaled(self.weight, self.scale), dtype=dtype or torch.float32, rows=rows)

    def extra_repr(self) -> str:
        """Sizes and type, for printing."""
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={kind}"


ScaledLinear.contract = ScaledLinear


def _kernels_take(weight: Tensor) -> bool:
    """Whether kernels on this GPU convert values of this type."""
    return weight.dtype == torch.int8 or can_multiply(weight.device)
