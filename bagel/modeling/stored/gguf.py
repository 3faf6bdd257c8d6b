"""Weights kept as the blocks of a GGUF file, and expanded for every product."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bagel.formats import gguf
from bagel.kernels import Rounding, Rows
from bagel.modeling.stored.expanded import multiply_expanded


class GGUFLinear(nn.Module):
    """What a linear layer computes, its weight stored as blocks of a GGUF type.

    Args:
        blocks: uint8 (out, bytes per row).
        kind: the type in ggml's name, one of `bagel.formats.gguf.BLOCKS`.
        bias: (out,), or None.
    """

    contract: ClassVar[type]
    format: ClassVar[str] = "gguf"
    takes: Rounding | None = None
    exact: ClassVar[bool] = False
    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: str, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        block = gguf.BLOCKS[kind]
        self.kind, self.out_features = kind, blocks.shape[0]
        self.in_features = blocks.shape[1] // block.bytes * block.elements
        self.register_buffer("blocks", blocks)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear, kind: str = "Q8_0") -> GGUFLinear:
        """Quantise a dense layer on its device; raises ValueError for types and sides that cannot be written."""
        return cls(gguf.quantize(linear.weight, kind), kind, linear.bias)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`, which may be written into."""
        return multiply_expanded(self, x, add=add)

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows, that the layer multiplies by; float32 by default."""
        blocks = self.blocks if rows is None else self.blocks[rows]
        return gguf.dequantize(blocks, self.kind, dtype=dtype or torch.float32)

    def extra_repr(self) -> str:
        """Sizes and type, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


GGUFLinear.contract = GGUFLinear
