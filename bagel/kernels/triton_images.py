"""What the autoencoder does between its convolutions."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Values of an image that a program holds at once, in all channels of some pixels."""
CHUNKS = 512
"""Parts of an image that are summed by themselves, at most: a few for each processor of a large GPU."""


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, plus: Tensor | None = None
) -> Tensor:
    """Return silu of the group norm of x (B, C, H, W) plus (C,), in the type of x, channels last in memory.

    What is added costs nothing: it moves the mean, and is not added to x at all. Computed in float32; sums are added in
    one order, whatever the GPU does first, so results repeat bit for bit.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    pixels, wide = height * width, triton.next_power_of_2(channels)
    rows = max(1, TILE // wide)
    each = rows * triton.cdiv(triton.cdiv(pixels, rows), CHUNKS)  # pixels of a chunk
    chunks = triton.cdiv(pixels, each)
    partial = x.new_empty(batch, chunks, 2, channels, dtype=torch.float32)
    _sums[(chunks, batch)](x, partial, pixels, channels, each, WIDE=wide, ROWS=rows)
    scale, shift = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
    _scales[(groups, batch)](
        x,
        plus,
        partial,
        weight,
        bias,
        scale,
        shift,
        pixels,
        channels,
        chunks,
        eps,
        EACH=channels // groups,
        WIDE=triton.next_power_of_2(channels // groups),
        BLOCK=64,
        ADDS=plus is not None,
    )
    out = torch.empty_like(x)
    _scaled[(triton.cdiv(pixels, rows), batch)](x, scale, shift, out, pixels, channels, WIDE=wide, ROWS=rows)
    return out


@triton.jit
def _sums(x, partial, pixels, channels, each, WIDE: tl.constexpr, ROWS: tl.constexpr):
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < channels
    sums, squares = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32)
    first = tl.load(x + image * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, each, ROWS):
        pixel = chunk * each + start + tl.arange(0, ROWS)
        at = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        here = (pixel < pixels)[:, None] & inside[None, :]
        values = tl.where(here, tl.load(x + at, mask=here, other=0.0).to(tl.float32) - first, 0.0)
        sums += values
        squares += values * values
    to = partial + (image * tl.num_programs(0) + chunk) * 2 * channels + channel
    tl.store(to, tl.sum(sums, axis=0), mask=inside)
    tl.store(to + channels, tl.sum(squares, axis=0), mask=inside)


@triton.jit
def _scales(
    x, plus, partial, weight, bias, scale, shift, pixels, channels, chunks, eps,
    EACH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    group, image, lane = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, WIDE)
    inside, channel = lane < EACH, group * EACH + lane
    sums, squares = tl.zeros((BLOCK, WIDE), tl.float32), tl.zeros((BLOCK, WIDE), tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        at = partial + (image * chunks + chunk)[:, None] * 2 * channels + channel[None, :]
        here = (chunk < chunks)[:, None] & inside[None, :]
        sums += tl.load(at, mask=here, other=0.0)
        squares += tl.load(at + channels, mask=here, other=0.0)
    # Of what differs from each channel's first pixel: a mean far larger than the spread would leave nothing of it.
    far, square = tl.sum(sums, axis=0) / pixels, tl.sum(squares, axis=0) / pixels
    means = tl.load(x + image * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32) + far
    added = tl.zeros((WIDE,), tl.float32)
    if ADDS:
        added = tl.load(plus + channel, mask=inside, other=0.0).to(tl.float32)
    means += added
    mean = tl.sum(means, axis=0) / EACH
    spread = tl.maximum(square - far * far, 0.0) + (means - mean) * (means - mean)
    variance = tl.sum(tl.where(inside, spread, 0.0), axis=0) / EACH
    to, by = image * channels + channel, tl.rsqrt(variance + eps)
    by = by * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + to, by, mask=inside)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(shift + to, offset + (added - mean) * by, mask=inside)


@triton.jit
def _scaled(x, scale, shift, out, pixels, channels, WIDE: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = channel < channels
    here = (pixel < pixels)[:, None] & inside[None, :]
    at = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    values = values * tl.load(scale + image * channels + channel, mask=inside)[None, :]
    values = values + tl.load(shift + image * channels + channel, mask=inside)[None, :]
    values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=here)


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Return x + y, both (B, C, H, W), plus a bias (C,), in the type of x, channels last in memory; rounded once."""
    x, y = (part.contiguous(memory_format=torch.channels_last) for part in (x, y))
    out, channels = torch.empty_like(x), x.shape[1]
    _add_biased[(triton.cdiv(x.numel(), TILE),)](x, y, bias, out, x.numel(), channels, BLOCK=TILE)
    return out


@triton.jit
def _add_biased(x, y, bias, out, values, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < values
    total = tl.load(x + at, mask=here, other=0.0).to(tl.float32) + tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    total += tl.load(bias + at % channels, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here)


def doubled(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) with each pixel four times, (B, C, 2H, 2W), channels last in memory."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    size = batch, channels, 2 * height, 2 * width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    wide = triton.next_power_of_2(channels)
    rows = max(1, TILE // wide)
    _doubled[(triton.cdiv(batch * height * width, rows),)](
        x, out, batch * height * width, width, channels, WIDE=wide, ROWS=rows
    )
    return out


@triton.jit
def _doubled(x, out, pixels, width, channels, WIDE: tl.constexpr, ROWS: tl.constexpr):
    pixel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, WIDE)
    here = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    values = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=here)
    row, column = pixel // width, pixel % width  # rows of all images are counted on
    first = (4 * row * width + 2 * column)[:, None] * channels + channel[None, :]
    tl.store(out + first, values, mask=here)
    tl.store(out + first + channels, values, mask=here)
    tl.store(out + first + 2 * width * channels, values, mask=here)
    tl.store(out + first + (2 * width + 1) * channels, values, mask=here)
