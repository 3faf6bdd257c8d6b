"""DFloat11 (arXiv 2504.11651): bfloat16 without loss in about 11 bits; units of the format, and ranges of them.

The exponents of a unit are Huffman-coded in one bit stream, signs and mantissas kept as a byte per weight. The stream
is cut into windows of 8 bytes, 512 to a chunk; a window owns the codes that start in it, and where its first one does
is stored, as is the index of every chunk's first weight: so windows decode side by side, and a range of weights needs
its own chunks only.

Letters in shapes: n weights, B bytes of the stream, C chunks, P prefix tables.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WINDOW_BITS, WINDOWS = 64, 512
CHUNK_BYTES = WINDOW_BITS // 8 * WINDOWS
GAP_BITS = 5
LONGEST_CODE = 32
JUMP = 240
"""Entries of a prefix table from here on name another table, so larger exponents cannot be stored."""
LOOKUP_BITS, LOOKUP_CODES = 11, 4
"""Bits that are decoded at once, and codes of them at most."""
Array = np.ndarray[Any, Any]


class Unit(NamedTuple):
    """The tensors of a unit, as files hold them.

    Attributes:
        encoded_exponent: the bit stream (B,) uint8, the first bit of a byte its highest.
        sign_mantissa: (n,) uint8: the sign at the highest bit, seven bits of mantissa.
        luts: (P + 1, 256) uint8: tables of the next eight bits, and last the lengths of the codes in bits.
        output_positions: uint32 (C + 1) as bytes: the index of the first weight whose code starts in a chunk; last n.
        gaps: five bits for each window of whole chunks, as bytes: where in the window the first code starts.
        split_positions: int64: the indices at which all matrices but the first start.
    """

    encoded_exponent: Tensor
    sign_mantissa: Tensor
    luts: Tensor
    output_positions: Tensor
    gaps: Tensor
    split_positions: Tensor

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.sign_mantissa.numel()

    @property
    def starts(self) -> list[int]:
        """Indices at which the matrices start, and last the number of weights."""
        return [0, *self.split_positions.tolist(), self.numel]


class Piece(NamedTuple):
    """A range of a unit's weights, which decodes by itself.

    Attributes:
        stream: the range's chunks and the window behind them, (4096 C + 8,) uint8.
        sign_mantissa: (n,) uint8.
        luts: as in `Unit`.
        positions: (C + 1,) int32: as `output_positions`, counted from the range's first weight, so the first may be
            negative and the last beyond n.
        gaps: (320 C,) uint8.
        lookup: see `lookup_of`.
    """

    stream: Tensor
    sign_mantissa: Tensor
    luts: Tensor
    positions: Tensor
    gaps: Tensor
    lookup: Tensor


class Limits(NamedTuple):
    """The most codes that a chunk and a window of a piece have: so much room do kernels need."""

    chunk: int
    window: int


# Checks ---------------------------------------------------------------------------------------------------------------


def check(unit: Unit, name: str = "the unit") -> Unit:
    """Return a unit whose parts fit together, as far as can be told without decoding it.

    Raises:
        ValueError: one sentence that names the tensor at fault.
    """
    for part, tensor in unit._asdict().items():
        wanted = torch.int64 if part == "split_positions" else torch.uint8
        if tensor.dtype != wanted or tensor.ndim != (2 if part == "luts" else 1):
            raise _fault(name, part, f"is {_kind(tensor)}, not {_kind_name(wanted)} of {_axes(part)}")
    _check_sizes(unit, name)
    _check_tables(unit.luts.cpu().numpy(), name)
    _check_positions(unit, name)
    return unit


def _check_sizes(unit: Unit, name: str) -> None:
    length, count = unit.encoded_exponent.numel(), unit.numel
    for part, size in (("encoded_exponent", length), ("sign_mantissa", count)):
        if not 0 < size < 2**31:
            raise _fault(name, part, f"has {size} bytes, not between 1 and 2**31 - 1")
    chunks = -(-length // CHUNK_BYTES)
    for part, size in (("gaps", chunks * WINDOWS * GAP_BITS // 8), ("output_positions", 4 * (chunks + 1))):
        found = getattr(unit, part).numel()
        if found != size:
            raise _fault(name, part, f"has {found} bytes, but {length} bytes of encoded_exponent need {size}")
    starts = unit.starts
    if any(a >= b for a, b in itertools.pairwise(starts)):
        raise _fault(name, "split_positions", f"does not rise between 0 and {count}")


def _check_tables(luts: Array, name: str) -> None:
    if luts.shape[1] != 256 or not 2 <= luts.shape[0] <= 258 - JUMP:
        raise _fault(name, "luts", f"has shape {luts.shape}, not 2 to {258 - JUMP} rows of 256")
    tables, lengths = luts[:-1].astype(int), luts[-1]
    if not lengths.any() or lengths.max() > LONGEST_CODE or lengths[JUMP:].any():
        raise _fault(
            name, "luts", f"gives lengths other than 1 to {LONGEST_CODE} bits, or codes of exponents of {JUMP}"
        )
    if (256 - tables[tables >= JUMP] >= len(tables)).any():
        raise _fault(name, "luts", f"points to more than the {len(tables)} tables that it has")


def _check_positions(unit: Unit, name: str) -> None:
    positions, count = positions_of(unit), unit.numel
    counts = np.diff(positions)
    if positions[0] != 0 or positions[-1] != count or (counts < 0).any():
        raise _fault(name, "output_positions", f"does not rise from 0 to the {count} weights of sign_mantissa")
    lengths = unit.luts[-1][unit.luts[-1] > 0]
    bits = 8 * CHUNK_BYTES
    most, least = -(-bits // int(lengths.min())), (bits - LONGEST_CODE) // int(lengths.max())
    wrong = np.flatnonzero((counts > most) | (counts < least))
    if len(wrong) and (wrong[0] < len(counts) - 1 or counts[-1] > most):
        chunk = int(wrong[0])
        raise _fault(name, "output_positions", f"gives chunk {chunk} {counts[chunk]} codes, which no chunk can have")


def _fault(name: str, part: str, what: str) -> ValueError:
    return ValueError(f"{name} is no DFloat11 unit: {part} {what}; fetch or convert it again")


def _kind(tensor: Tensor) -> str:
    return f"{_kind_name(tensor.dtype)} {tuple(tensor.shape)}"


def _kind_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _axes(part: str) -> str:
    return "two axes" if part == "luts" else "one axis"


def positions_of(unit: Unit) -> Array:
    """Return `output_positions` as numbers (C + 1,) int64."""
    return np.frombuffer(unit.output_positions.cpu().numpy().tobytes(), "<u4").astype(np.int64)


# Ranges and tables ----------------------------------------------------------------------------------------------------


def cut(unit: Unit, start: int = 0, stop: int | None = None) -> Piece:
    """Return the range of weights start to stop (the last by default): views of the unit wherever possible.

    Raises:
        IndexError: a range that is empty or leaves the unit.
    """
    stop = unit.numel if stop is None else stop
    if not 0 <= start < stop <= unit.numel:
        raise IndexError(f"weights {start} to {stop} were asked for of a unit of {unit.numel}")
    positions = positions_of(unit)
    first = int(np.searchsorted(positions, start, "right")) - 1
    last = int(np.searchsorted(positions, stop, "left"))  # of the chunks that follow
    stream = unit.encoded_exponent[first * CHUNK_BYTES : last * CHUNK_BYTES + WINDOW_BITS // 8]
    missing = (last - first) * CHUNK_BYTES + WINDOW_BITS // 8 - stream.numel()
    if missing:
        stream = torch.cat([stream, stream.new_zeros(missing)])
    size = WINDOWS * GAP_BITS // 8
    return Piece(
        stream,
        unit.sign_mantissa[start:stop],
        unit.luts,
        torch.from_numpy((positions[first : last + 1] - start).astype(np.int32)),
        unit.gaps[first * size : last * size],
        lookup_of(unit.luts),
    )


def limits_of(piece: Piece) -> Limits:
    """Return how many codes the chunks and windows of a piece have at most."""
    lengths = piece.luts[-1]
    return Limits(int(piece.positions.diff().max()), -(-WINDOW_BITS // int(lengths[lengths > 0].min())))


def lookup_of(luts: Tensor) -> Tensor:
    """Return what the next 11 bits of a stream stand for, (2048, 2) int32.

    The first number holds the exponents of up to four codes that lie within the bits, the first in its lowest byte; the
    second the bits at which they start, the first at its highest, and their length together in its lowest four bits: 0
    where the first code is longer, or none.
    """
    tables, lengths = luts[:-1].cpu().numpy(), luts[-1].cpu().numpy().astype(np.int64)
    bits = np.arange(1 << LOOKUP_BITS, dtype=np.int64)
    exponents, starts = np.zeros_like(bits), np.zeros_like(bits)
    at, going = np.zeros_like(bits), np.ones(len(bits), dtype=bool)
    for code in range(LOOKUP_CODES):
        ahead = bits << at << (32 - LOOKUP_BITS) & 0xFFFFFFFF
        symbol, length = first_code(ahead, tables, lengths)
        # A code that fits is the same whatever follows; tables give the code of the stream's end to its neighbour.
        other, _ = first_code(ahead | (1 << (32 - LOOKUP_BITS + at)) - 1, tables, lengths)
        going = going & (symbol == other) & (length > 0) & (at + length <= LOOKUP_BITS)
        exponents |= np.where(going, symbol << 8 * code, 0)
        starts |= np.where(going, 1 << (31 - at), 0)
        at = np.where(going, at + length, at)
    both = np.stack([exponents, starts | at], axis=1).astype(np.uint32)
    return torch.from_numpy(both.view(np.int32))


def first_code(ahead: Array, tables: Array, lengths: Array) -> tuple[Array, Array]:
    """Return the exponent and the length of the first code of 32 bits each; length 0 where there is none."""
    symbol = tables[0][ahead >> 24].astype(np.int64)
    for shift in (16, 8, 0):
        jumps = np.flatnonzero(symbol >= JUMP)
        if not len(jumps):
            break
        symbol[jumps] = tables[np.minimum(256 - symbol[jumps], len(tables) - 1), ahead[jumps] >> shift & 255]
    return symbol, lengths[symbol]
