"""Products with weights in 4 bits, and their expansion: `bagel.formats.nf4` says what the bits mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bagel.formats import nf4
from bagel.formats.nf4 import BLOCK, Blocks, Nested
from bagel.kernels.functions import find, linear

FEW = 8
"""Tokens up to which a product reads the weight as it is; for more it is expanded."""


def expand_blocks(blocks: Blocks, dtype: torch.dtype, *, rows: slice | None = None) -> Tensor:
    """Return a weight (out, in) in 4 bits, or some of its rows, in a type; see `bagel.formats.nf4.dequantize`."""
    width = math.prod(blocks.shape[1:])
    kernel = find("expand_blocks", blocks.codes) if dtype != torch.float64 and width % 2 == 0 else None
    if kernel is None:
        return nf4.dequantize(blocks, dtype, rows=rows)
    first, stop, _ = (rows or slice(None)).indices(blocks.shape[0])
    count = max(stop - first, 0) * width
    return kernel(*_tensors(blocks), first=first * width, count=count, dtype=dtype).view(-1, *blocks.shape[1:])


def blocks_times_vectors(
    x: Tensor,
    blocks: Blocks,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x (T, in) times the rows of a weight (out, in) in 4 bits, plus a bias (out,), plus `add` (T, out).

    The result is of type `dtype`, by default that of x; `add` may be written into.
    """
    out = dtype or x.dtype
    plus = add if add is not None and add.dtype == out else None
    few = x.shape[0] <= FEW and x.shape[1] % BLOCK == 0
    if few and x.shape[0] and (kernel := find("blocks_times_vectors", x)):
        y = kernel(x.contiguous(), *_tensors(blocks), bias=bias, plus=plus, dtype=out)
        return y if add is None or plus is not None else add + y
    weight = expand_blocks(blocks, x.dtype)
    if out == x.dtype:
        return linear(x, weight, bias, add=add)
    y = linear(x, weight).to(out)
    y = y if bias is None else y + bias
    return y if add is None else add + y


def _tensors(blocks: Blocks) -> tuple[Tensor | None, ...]:
    if isinstance(nested := blocks.absmax, Nested):
        return blocks.codes, nested.codes, blocks.codebook, nested.absmax, nested.table, nested.offset
    return blocks.codes, nested, blocks.codebook, None, None, None
