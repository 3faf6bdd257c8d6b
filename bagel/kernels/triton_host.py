"""Reads of page-locked host memory by a GPU: a few rows of a table that is not worth its place on the card."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rows_from_host(ids: Tensor, table: Tensor) -> Tensor:
    """Return the rows (T, n) of a page-locked table (N, n), contiguous, for ids (T,) on a GPU."""
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype, device=ids.device)
    if ids.shape[0]:
        grid = (ids.shape[0], triton.cdiv(table.shape[1], 1024))
        _rows_from_host[grid](ids, table, out, table.shape[1], BLOCK=1024)
    return out


@triton.jit
def _rows_from_host(ids, table, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < width
    values = tl.load(table + tl.load(ids + row) * width + columns, mask=there)
    tl.store(out + row * width + columns, values, mask=there)
