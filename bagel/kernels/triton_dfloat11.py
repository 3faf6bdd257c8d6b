"""Expanding DFloat11 in Triton, where CUDA C++ cannot be built: every code is decoded twice, and stored by itself."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel.formats.dfloat11 import LOOKUP_BITS, WINDOWS, Limits, Piece


def expand_dfloat11(piece: Piece, limits: Limits, *, start: int, stop: int) -> Tensor:
    """Return the weights start to stop of a piece, (stop - start,) bfloat16; `limits` are for other kernels."""
    out = torch.empty(stop - start, dtype=torch.bfloat16, device=piece.stream.device)
    _expand[(piece.positions.numel() - 1,)](
        piece.stream.view(torch.int32),
        piece.sign_mantissa,
        piece.luts,
        piece.positions,
        piece.gaps,
        piece.lookup,
        out.view(torch.int16),
        piece.luts.shape[0] - 1,
        start,
        stop,
        BITS=LOOKUP_BITS,
        WINDOWS=WINDOWS,
        num_warps=WINDOWS // 32,
    )
    return out


@triton.jit
def _expand(
    stream, signs, luts, positions, gaps, lookup, out, tables, start, stop,
    BITS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    begin, end = tl.load(positions + chunk), tl.load(positions + chunk + 1)
    if (begin < stop) & (end > start):
        window = tl.arange(0, WINDOWS)
        index = (chunk * WINDOWS + window) * 2
        a, b, c = _word(stream + index), _word(stream + index + 1), _word(stream + index + 2)
        bit = window * 5
        five = gaps + chunk * (WINDOWS * 5 // 8) + (bit >> 3)
        high, low = tl.load(five).to(tl.int32), tl.load(five + 1, mask=(bit & 7) > 3, other=0).to(tl.int32)
        first = ((high << 8 | low) >> (11 - (bit & 7))) & 31
        at, count = first, tl.zeros((WINDOWS,), tl.int32)
        while tl.min(at, axis=0) < 64:
            some, length, _ = _look_up(a, b, c, at, luts, lookup, tables, BITS)
            count += some
            at += length
        place = begin + tl.cumsum(count, axis=0) - count
        at = first
        while tl.min(at, axis=0) < 64:
            some, length, exponents = _look_up(a, b, c, at, luts, lookup, tables, BITS)
            for code in tl.static_range(4):
                weight = place + code
                here = (code < some) & (weight >= start) & (weight < stop) & (weight < end)
                sign = tl.load(signs + weight, mask=here, other=0).to(tl.int32)
                exponent = (exponents >> (8 * code)) & 255
                pattern = (sign & 128) << 8 | exponent << 7 | (sign & 127)
                tl.store(out + (weight - start), pattern.to(tl.int16), mask=here)
            place += some
            at += length


@triton.jit
def _word(pointer):
    """Load 32 bits, the first of them the highest."""
    x = tl.load(pointer).to(tl.uint32, bitcast=True)
    return x << 24 | (x & 0xFF00) << 8 | (x >> 8) & 0xFF00 | x >> 24


@triton.jit
def _look_up(a, b, c, at, luts, lookup, tables, BITS: tl.constexpr):
    """Return how many codes come next in each window, their length, and their exponents; none where it is done."""
    left = at < 64
    late = at >= 32
    high, low, shift = tl.where(late, b, a), tl.where(late, c, b), (at & 31).to(tl.uint32)
    ahead = high << shift | low >> 1 >> (31 - shift)
    entry = lookup + (ahead >> (32 - BITS)).to(tl.int32) * 2
    exponents, starts = tl.load(entry, mask=left, other=0), tl.load(entry + 1, mask=left, other=0)
    length = starts & 15
    some = tl.zeros_like(at)
    for bit in tl.static_range(BITS):
        some += ((starts >> (31 - bit)) & 1) * (at + bit < 64).to(tl.int32)
    long = left & (length == 0)
    symbol = tl.load(luts + (ahead >> 24).to(tl.int32), mask=long, other=0).to(tl.int32)
    for byte in tl.static_range(3):
        jump = long & (symbol >= 240)
        table = tl.minimum(256 - symbol, tables - 1)
        column = ((ahead >> (16 - 8 * byte)) & 255).to(tl.int32)
        symbol = tl.where(jump, tl.load(luts + table * 256 + column, mask=jump, other=0).to(tl.int32), symbol)
    bits = tl.load(luts + tables * 256 + symbol, mask=long, other=0).to(tl.int32)
    some = tl.where(long, (bits > 0).to(tl.int32), some)
    length = tl.where(long, tl.where(bits > 0, bits, 128), length)
    return some, length, tl.where(long, symbol, exponents)
