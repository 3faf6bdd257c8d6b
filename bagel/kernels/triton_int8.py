"""Products of 8-bit integers, which are exact until the scales of rows and columns."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel.kernels.triton_rounding import turned
from bagel.kernels.triton_rows import early, wait

GROUP = 8
"""Tiles of tokens that share the tiles of a weight, while these are in the cache."""


class Tiles(NamedTuple):
    """Sizes of what one program computes, and how."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int


def tiles(tokens: int, capability: int) -> Tiles:
    """Return the sizes for that many tokens on a GPU of this major compute capability, 8 or more."""
    if tokens <= 16:  # bound by reading the weight: many programs, each with much of it on the way
        return Tiles(16, 32, 256, 4, 5)
    if tokens <= 64:
        return Tiles(64, 64, 128, 4, 4)
    return Tiles(128, 256, 128, 8, 3) if capability == 9 else Tiles(128, 128, 128, 8, 3)


def integer_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    plus: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return x (T, in) times the rows of a weight (out, in), both int8 and contiguous, with their scales (..., 1).

    Args:
        x: tokens.
        x_scale: of each token, float32.
        weight: see above.
        scale: of each row of the weight, float32.
        bias: (out,).
        plus: (T, out), contiguous, added to the rounded sum.
        dtype: of the result.
    """
    (tokens, width), rows = x.shape, weight.shape[0]
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    size = tiles(tokens, _capability(x.device.index) if x.is_cuda else 8)
    if tokens:
        _integer_product[(triton.cdiv(tokens, size.tokens) * triton.cdiv(rows, size.rows),)](
            x,
            x_scale,
            weight,
            scale,
            bias,
            plus,
            out,
            tokens,
            rows,
            width,
            TOKENS=size.tokens,
            ROWS=size.rows,
            WIDTH=size.width,
            GROUP=GROUP,
            WHOLE=width % size.width == 0,
            BIASED=bias is not None,
            ADDS=plus is not None,
            num_warps=size.warps,
            num_stages=size.stages,
        )
    return out


@functools.cache
def _capability(gpu: int) -> int:
    return torch.cuda.get_device_capability(gpu)[0] if torch.version.cuda else 8


@triton.jit
def _integer_product(
    x, x_scale, weight, scale, bias, plus, out, tokens, rows, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    BIASED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    # Programs that run together share tiles of both factors: they go down GROUP tiles of tokens, then to the next rows.
    program, across = tl.program_id(0), tl.cdiv(rows, ROWS)
    first = program // (GROUP * across) * GROUP
    high = min(tl.cdiv(tokens, TOKENS) - first, GROUP)
    token = (first + program % (GROUP * across) % high) * TOKENS + tl.arange(0, TOKENS)
    row = program % (GROUP * across) // high * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    # Beyond the last one they begin again: what is read there is not stored, and needs no mask.
    a = x + (token % tokens).to(tl.int64)[:, None] * width + column[None, :]
    b = weight + (row % rows).to(tl.int64)[None, :] * width + column[:, None]
    total = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for start in range(0, width, WIDTH):
        if WHOLE:
            total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=tl.int32)
        else:
            left = tl.load(a, mask=(column < width - start)[None, :], other=0)
            right = tl.load(b, mask=(column < width - start)[:, None], other=0)
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        a += WIDTH
        b += WIDTH
    here, is_row = (token < tokens)[:, None] & (row < rows)[None, :], row < rows
    y = total.to(tl.float32) * tl.load(x_scale + token, mask=token < tokens, other=0.0)[:, None]
    y *= tl.load(scale + row, mask=is_row, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    if ADDS:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(plus + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=here)


def turn_rows(x: Tensor, size: int) -> Tensor:
    """Return x (T, n) with each `size` columns turned; see `bagel.kernels.turn`. Few rows: a program has one group."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _turn_rows[(x.numel() // size,)](x, out, TURN=size, num_warps=1, **early())
    return out


@triton.jit
def _turn_rows(x, out, TURN: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    at = tl.program_id(0).to(tl.int64) * TURN + tl.arange(0, TURN)
    tl.store(out + at, turned(tl.load(x + at).to(tl.float32), TURN, TURN).to(out.dtype.element_ty))
