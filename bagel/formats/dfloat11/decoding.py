"""Decoding ranges of DFloat11's units on the CPU, all windows of some chunks side by side."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bagel.formats.dfloat11.unit import (
    CHUNK_BYTES,
    GAP_BITS,
    LOOKUP_BITS,
    LOOKUP_CODES,
    WINDOW_BITS,
    WINDOWS,
    Array,
    Piece,
    Unit,
    cut,
    first_code,
)

STEP_CHUNKS = 16
"""Chunks decoded at a time: what is in between stays in a processor's cache, which was fastest."""


def decode(unit: Unit, start: int = 0, stop: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the weights start to stop (the last by default) of a unit, (stop - start,) bfloat16, on the CPU.

    Args:
        unit: checked, see `check`.
        start: of the range.
        stop: behind the range.
        out: contiguous, where the result goes.

    Raises:
        IndexError: a range that is empty or leaves the unit.
        ValueError: the stream contradicts `gaps` or `output_positions`.
    """
    return decode_piece(cut(unit, start, stop), out=out)


def decode_piece(piece: Piece, start: int = 0, stop: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the weights start to stop of a piece, as `decode` does."""
    piece = Piece(*(part.cpu() for part in piece))
    stop = piece.sign_mantissa.numel() if stop is None else stop
    out = torch.empty(stop - start, dtype=torch.bfloat16) if out is None else out
    if start == stop:
        return out
    target = out.view(torch.int16).view(-1).numpy().view(np.uint16)
    positions, signs = piece.positions.numpy().astype(np.int64), piece.sign_mantissa.numpy()
    first = max(int(np.searchsorted(positions, start, "right")) - 1, 0)
    last = int(np.searchsorted(positions, stop, "left"))
    codes = _Codes(piece)
    for chunk in range(first, last, STEP_CHUNKS):
        behind = min(chunk + STEP_CHUNKS, last)
        low, high = max(int(positions[chunk]), start), min(int(positions[behind]), stop)
        exponents = codes.exponents(chunk, behind, positions)[low - positions[chunk] : high - positions[chunk]]
        raw = signs[low:high].astype(np.uint16)
        weights = target[low - start : high - start]
        np.left_shift(exponents, 7, out=weights, dtype=np.uint16)
        weights |= raw & 0x7F
        raw &= 0x80
        raw <<= 8
        weights |= raw
    return out


class _Codes:
    """The codes of a piece, decoded window beside window."""

    def __init__(self, piece: Piece) -> None:
        self.stream, self.gaps = piece.stream.numpy(), piece.gaps.numpy()
        self.tables, self.lengths = piece.luts[:-1].numpy(), piece.luts[-1].numpy().astype(np.int64)
        lookup = piece.lookup.numpy().view(np.uint32)
        self.four, starts = np.ascontiguousarray(lookup[:, 0]), lookup[:, 1]
        begins = (starts[:, None] >> np.arange(31, 31 - LOOKUP_BITS, -1)) & 1
        # Of the first so many of the bits: how many codes start in them, and where the next one does.
        count = np.zeros((LOOKUP_BITS + 1, len(starts)), dtype=np.uint8)
        count[1:] = begins.cumsum(axis=1).T
        ahead = np.empty_like(count)
        ahead[LOOKUP_BITS] = starts & 15
        for bit in range(LOOKUP_BITS - 1, -1, -1):
            ahead[bit] = np.where(begins[:, bit] > 0, bit, ahead[bit + 1])
        self.count, self.ahead = count.ravel(), ahead.ravel().astype(np.uint64)

    def exponents(self, first: int, last: int, positions: Array) -> Array:
        """Return the exponents of some chunks, and check that windows and chunks begin where they are said to."""
        counts, found, ends, gaps = self._windows(first, last)
        sums = counts.reshape(-1, WINDOWS).sum(axis=1, dtype=np.int64)
        wanted = np.diff(positions[first : last + 1])
        wrong = sums != wanted
        # Only in the stream's last chunk may there be more: its padding.
        if last == len(positions) - 1 and sums[-1] > wanted[-1]:
            wrong[-1] = False
        if wrong.any():
            chunk = int(np.flatnonzero(wrong)[0])
            raise _broken(f"chunk {first + chunk} holds {sums[chunk]} codes, but output_positions says {wanted[chunk]}")
        total = int(wanted.sum())
        inner = np.cumsum(counts, dtype=np.int64)[:-1] < total
        if (inner & (ends[:-1] - np.uint64(WINDOW_BITS) != gaps[1:])).any():
            raise _broken(f"in chunks {first} to {last - 1} a window does not end where the next begins in gaps")
        return found[:total]

    def _windows(self, first: int, last: int) -> tuple[Array, Array, Array, Array]:
        """Return the codes of each window (W,), their exponents in order, and where windows end and begin, in bits."""
        size = WINDOW_BITS // 8
        stream = self.stream[first * CHUNK_BYTES : last * CHUNK_BYTES + size]
        words = stream.view(">u8") if stream.ctypes.data % 8 == 0 else np.frombuffer(stream.tobytes(), ">u8")
        words = words.astype(np.uint64)
        gaps = _unpacked(self.gaps[first * WINDOWS * GAP_BITS // 8 : last * WINDOWS * GAP_BITS // 8])
        high, low, at = words[:-1], words[1:] >> np.uint64(1), gaps.copy()
        counts, fours = [], []
        while int(at.min()) < WINDOW_BITS:
            bits = (high << at | low >> (np.uint64(63) - at)) >> np.uint64(64 - LOOKUP_BITS)
            index = bits.astype(np.int64)
            left = np.clip(WINDOW_BITS - at.astype(np.int64), 0, LOOKUP_BITS)
            four, key = self.four[index], (left << LOOKUP_BITS) + index
            count, ahead = self.count[key], self.ahead[key]
            if not ahead.all():
                self._long_codes(high, low, at, count, four, ahead)
            at += ahead
            counts.append(count)
            fours.append(four)
        each, codes = np.stack(counts, axis=1), np.stack(fours, axis=1)
        codes = codes.view(np.uint8).reshape(*each.shape, LOOKUP_CODES)
        found = codes[np.arange(LOOKUP_CODES, dtype=np.uint8) < each[:, :, None]]
        return each.sum(axis=1, dtype=np.int64), found, at, gaps

    def _long_codes(self, high: Array, low: Array, at: Array, count: Array, four: Array, length: Array) -> None:
        """Fill in the codes longer than what is looked up; where there is none, the window ends."""
        some = np.flatnonzero((length == 0) & (at < WINDOW_BITS))
        ahead = (high[some] << at[some] | low[some] >> (np.uint64(63) - at[some])) >> np.uint64(32)
        symbol, bits = first_code(ahead.astype(np.int64), self.tables, self.lengths)
        four[some], count[some] = symbol, bits > 0
        length[some] = np.where(bits > 0, bits, 2 * WINDOW_BITS)


def _broken(what: str) -> ValueError:
    return ValueError(f"a DFloat11 stream is damaged: {what}; fetch it again")


def _unpacked(gaps: Array) -> Array:
    """Return numbers of five bits, eight in five bytes, as uint64."""
    five = gaps.reshape(-1, GAP_BITS).astype(np.uint64)
    word = np.zeros(len(five), dtype=np.uint64)
    for index in range(GAP_BITS):
        word |= five[:, index] << np.uint64(8 * (GAP_BITS - 1 - index))
    shifts = np.arange(8 - 1, -1, -1, dtype=np.uint64) * np.uint64(GAP_BITS)
    return (word[:, None] >> shifts & np.uint64(31)).ravel()
