"""One linear layer of several that are stacked by rows: for weights whose parts are stored in ways of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bagel.kernels import Rounding, Rows
from bagel.modeling.linear import apply, takes


class StackedLinear(nn.Module):
    """What one linear layer computes whose weight is that of its parts, one above the other.

    Queries, keys and values are one product in this model; where their weights are stored in different formats, or
    in blocks that cannot be put together, they remain three. What all parts want rounded alike is rounded once.

    Args:
        parts: linear layers or what stands in their place, of the same `in_features`, without biases.
        bias: (out,) of the whole, or None.
    """

    contract: ClassVar[type]
    format: ClassVar[str] = "stacked"

    def __init__(self, parts: Sequence[nn.Module], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.rows = [int(part.out_features) for part in parts]  # pyright: ignore[reportArgumentType]
        self.in_features = int(parts[0].in_features)  # pyright: ignore[reportArgumentType]
        self.out_features = sum(self.rows)
        self.bias = bias

    @property
    def takes(self) -> Rounding | None:
        """How the input would best be rounded: as all parts agree, else not at all."""
        wishes = {takes(part) for part in self.parts}
        return wishes.pop() if len(wishes) == 1 else None

    @property
    def exact(self) -> bool:
        """Whether every part's weight is what was loaded."""
        return all(getattr(part, "exact", True) for part in self.parts)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`."""
        y = torch.cat([apply(part, x) for part in self.parts], dim=-1)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if add is None else add + y

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some of its rows, that the layer multiplies by; float32 by default."""
        parts: list[Any] = list(self.parts)
        first, last, _ = (rows or slice(None)).indices(self.out_features)
        found, start = [], 0
        for part, count in zip(parts, self.rows, strict=True):
            wanted = slice(max(first - start, 0), min(last - start, count))
            if wanted.start < wanted.stop:
                found.append(_rows(part, dtype or torch.float32, wanted))
            start += count
        return torch.cat(found) if found else _rows(parts[0], dtype or torch.float32, slice(0, 0))


StackedLinear.contract = StackedLinear


def _rows(part: Any, dtype: torch.dtype, rows: slice) -> Tensor:
    if isinstance(part, nn.Linear):
        return part.weight[rows].to(dtype)
    return part.dense(dtype, rows=rows)
