"""Weights in 4 bits: a quarter of the memory of bfloat16, and the fastest products with one token; lossy.

See `bagel.formats.nf4`. A few tokens are multiplied by the weight as it is stored; for more it is expanded first, which
costs little beside their product.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from bagel.formats import nf4
from bagel.formats.nf4 import Blocks, Nested
from bagel.kernels import Rounding, Rows
from bagel.kernels.nf4 import blocks_times_vectors, expand_blocks


class NF4Linear(nn.Module):
    """What a linear layer computes, with its weight in 4 bits: NF4 (arXiv 2305.14314), in blocks of 64.

    Args:
        blocks: the weight (out, in).
        bias: (out,).
    """

    contract: ClassVar[type]
    format: ClassVar[str] = "nf4"
    kind: ClassVar[str] = "nf4"
    double: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    takes: Rounding | None = None
    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_table: Tensor | None
    offset: Tensor | None

    def __init__(self, blocks: Blocks, bias: nn.Parameter | None) -> None:
        super().__init__()
        if len(blocks.shape) != 2:
            raise ValueError(f"a layer needs a weight of two dimensions, got {blocks.shape}")
        self.out_features, self.in_features = blocks.shape
        self.dtype = blocks.dtype
        nested = blocks.absmax if isinstance(blocks.absmax, Nested) else None
        self.register_buffer("codes", blocks.codes)
        self.register_buffer("absmax", blocks.absmax if isinstance(blocks.absmax, Tensor) else blocks.absmax.codes)
        self.register_buffer("codebook", blocks.codebook)
        self.register_buffer("nested_absmax", nested and nested.absmax)
        self.register_buffer("nested_table", nested and nested.table)
        self.register_buffer("offset", nested and nested.offset)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Quantise a layer, on its device.

        Raises:
            ValueError: its weight has values that are NaN or infinite, or is no float of 16 or 32 bits.
        """
        return cls(nf4.quantize(linear.weight, cls.kind, double=cls.double), linear.bias)

    @property
    def blocks(self) -> Blocks:
        """The weight as it is stored."""
        absmax = self.absmax
        if self.nested_absmax is not None and self.nested_table is not None and self.offset is not None:
            absmax = Nested(absmax, self.nested_absmax, self.nested_table, self.offset)
        return Blocks(self.codes, absmax, self.codebook, self.kind, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add` (T, out), which may be written into."""
        if not isinstance(x, Rows):
            return blocks_times_vectors(x, self.blocks, self.bias, add=add)
        y = blocks_times_vectors(x.values, self.blocks, dtype=x.dtype) * x.scale
        y = y if self.bias is None else y + self.bias
        return y if add is None else add + y

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some rows of it, in a type; by default that of the weight before."""
        return expand_blocks(self.blocks, dtype or self.dtype, rows=rows)

    def extra_repr(self) -> str:
        """Return the sizes, as other layers print them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4DoubleLinear(NF4Linear):
    """As `NF4Linear`, with the magnitudes of the blocks quantised too: 4.13 bits per value in place of 4.5."""

    contract: ClassVar[type]
    format: ClassVar[str] = "nf4-double"
    double: ClassVar[bool] = True


class FP4Linear(NF4Linear):
    """As `NF4Linear`, with floats of 4 bits in place of NF4's values."""

    contract: ClassVar[type]
    format: ClassVar[str] = "fp4"
    kind: ClassVar[str] = "fp4"


NF4Linear.contract = NF4Linear
NF4DoubleLinear.contract = NF4DoubleLinear
FP4Linear.contract = FP4Linear


def layer_of(blocks: Blocks, bias: nn.Parameter | None) -> NF4Linear:
    """Return the layer of a weight (out, in) that is stored in 4 bits already, as files hold it, and its bias."""
    if blocks.kind == FP4Linear.kind:
        return FP4Linear(blocks, bias)
    return (NF4DoubleLinear if isinstance(blocks.absmax, Nested) else NF4Linear)(blocks, bias)
