"""Weights of bfloat16 kept in 11 bits without loss (DFloat11, arXiv 2504.11651), and expanded when they are used."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bagel.formats.dfloat11 import Piece, cut, encode, limits_of
from bagel.kernels import Rounding, Rows, expand_dfloat11
from bagel.modeling.stored.expanded import multiply_expanded


class DFloat11Linear(nn.Module):
    """What a linear layer of bfloat16 computes, bit for bit, with a weight of about 11 bits.

    Args:
        piece: the weight, row by row; see `bagel.formats.dfloat11.cut`. Its tensors are copied.
        out_features: rows of the weight.
        bias: (out,), or None.
    """

    contract: ClassVar[type]
    format: ClassVar[str] = "dfloat11"
    takes: Rounding | None = None
    exact: ClassVar[bool] = True
    stream: Tensor
    sign_mantissa: Tensor
    luts: Tensor
    positions: Tensor
    gaps: Tensor
    lookup: Tensor

    def __init__(self, piece: Piece, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if piece.sign_mantissa.numel() % out_features:
            raise ValueError(f"{piece.sign_mantissa.numel()} weights of DFloat11 are no matrix of {out_features} rows")
        self.out_features, self.in_features = out_features, piece.sign_mantissa.numel() // out_features
        # Asked here, where the host knows them, so that a GPU is never waited for.
        self.limits = limits_of(piece)
        for name, tensor in piece._asdict().items():
            self.register_buffer(name, tensor.clone())  # of its own, so that the unit it is a view of can go
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> DFloat11Linear:
        """Compress a dense layer, on the CPU; raises ValueError for other types, and see `encode`."""
        piece = cut(encode([linear.weight]))
        return cls(piece, linear.out_features, linear.bias).to(linear.weight.device)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`, which may be written into."""
        return multiply_expanded(self, x, add=add)

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows; bfloat16, exactly what was stored, by default."""
        first, last, _ = (rows or slice(None)).indices(self.out_features)
        width = self.in_features
        piece = Piece(*(getattr(self, name) for name in Piece._fields))
        weight = expand_dfloat11(piece, self.limits, start=first * width, stop=max(first, last) * width)
        return weight.view(-1, width).to(dtype or torch.bfloat16)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


DFloat11Linear.contract = DFloat11Linear
