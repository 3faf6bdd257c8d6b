"""Weights of bfloat16 kept in 11 bits without loss (DFloat11, arXiv 2504.11651), and expanded when they are used."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.formats.dfloat11 import Piece, cut, encode, limits_of
from bagel.kernels import Rounding, Rows, expand_dfloat11
from bagel.modeling.stored.expanded import multiply_expanded


class _Compressed(nn.Module):
    """A matrix kept as a piece of DFloat11, whose tensors are buffers."""

    stream: Tensor
    sign_mantissa: Tensor
    luts: Tensor
    positions: Tensor
    gaps: Tensor
    lookup: Tensor

    def __init__(self, piece: Piece, rows: int) -> None:
        super().__init__()
        if piece.sign_mantissa.numel() % rows:
            raise ValueError(f"{piece.sign_mantissa.numel()} weights of DFloat11 are no matrix of {rows} rows")
        self.shape = (rows, piece.sign_mantissa.numel() // rows)
        # Asked here, where the host knows them, so that a GPU is never waited for.
        self.limits = limits_of(piece)
        for name, tensor in piece._asdict().items():
            self.register_buffer(name, tensor.clone())  # of its own, so that the unit it is a view of can go

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (rows, columns), or some of its rows; bfloat16, exactly what was stored, by default."""
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        width = self.shape[1]
        piece = Piece(*(getattr(self, name) for name in Piece._fields))
        weight = expand_dfloat11(piece, self.limits, start=first * width, stop=max(first, last) * width)
        return weight.view(-1, width).to(dtype or torch.bfloat16)


class DFloat11Linear(_Compressed):
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

    def __init__(self, piece: Piece, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__(piece, out_features)
        self.out_features, self.in_features = self.shape
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> DFloat11Linear:
        """Compress a dense layer, on the CPU; raises ValueError for other types, and see `encode`."""
        piece = cut(encode([linear.weight]))
        return cls(piece, linear.out_features, linear.bias).to(linear.weight.device)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`, which may be written into."""
        return multiply_expanded(self, x, add=add)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


DFloat11Linear.contract = DFloat11Linear


class DFloat11Embedding(_Compressed):
    """A table of learned vectors, looked up by id, of about 11 bits a number.

    A GPU expands the table for each look-up, which no id has to be read for; a CPU expands the rows that are asked for.

    Args:
        piece: the table, row by row; its tensors are copied.
        num_embeddings: rows of the table.
    """

    format: ClassVar[str] = "dfloat11"
    exact: ClassVar[bool] = True

    def __init__(self, piece: Piece, num_embeddings: int) -> None:
        super().__init__(piece, num_embeddings)
        self.num_embeddings, self.embedding_dim = self.shape

    @classmethod
    def of(cls, embedding: nn.Embedding) -> DFloat11Embedding:
        """Compress a dense table, on the CPU."""
        piece = cut(encode([embedding.weight]))
        return cls(piece, embedding.num_embeddings).to(embedding.weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (...), (..., columns) bfloat16."""
        if ids.is_cuda or not ids.numel():
            return F.embedding(ids, self.dense())
        different, places = ids.unique(return_inverse=True)
        rows = [self.dense(rows=slice(row, row + 1)) for row in different.tolist()]
        return F.embedding(places, torch.cat(rows))

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
