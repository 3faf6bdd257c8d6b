"""Writing units of DFloat11: a Huffman code for the exponents of some matrices, and the stream of their codes.

Where the released encoder's choices are known, units are the same as its byte for byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bagel.formats.dfloat11.unit import CHUNK_BYTES, GAP_BITS, JUMP, LONGEST_CODE, WINDOW_BITS, WINDOWS, Array, Unit

END = -1
"""The symbol behind the last weight, which counts as smaller than all; only the first bits of its code are written."""
STEP = 2**16
"""Weights encoded at a time: what is in between stays in a processor's cache, which was fastest."""


class Code(NamedTuple):
    """The code of a symbol: its lowest `length` bits."""

    length: int
    bits: int


def encode(matrices: Sequence[Tensor]) -> Unit:
    """Return the unit that holds some bfloat16 matrices, one behind the other.

    It is made on the CPU, and needs about twice the memory of what it returns.

    Raises:
        ValueError: of another type, empty, 2**31 weights and more, or a magnitude of 2**113 and more, infinite or NaN.
    """
    counts = _counts(matrices)
    numel = int(counts.sum())
    codes = huffman({int(exponent): int(counts[exponent]) for exponent in np.flatnonzero(counts)})
    stream = _Stream(codes, counts)
    signs = np.empty(numel, dtype=np.uint8)
    for first, weights in _steps(matrices):
        stream.append((weights >> 7).astype(np.uint8))
        some = signs[first : first + len(weights)]
        np.right_shift(weights, 8, out=some, casting="unsafe")
        some &= 0x80
        some |= (weights & 0x7F).astype(np.uint8)
    sizes = np.cumsum([matrix.numel() for matrix in matrices])[:-1]
    return Unit(
        torch.from_numpy(stream.written()),
        torch.from_numpy(signs),
        torch.from_numpy(luts_of(codes)),
        torch.from_numpy(stream.positions.astype("<u4").view(np.uint8)),
        torch.from_numpy(_packed(stream.gaps)),
        torch.from_numpy(sizes.astype(np.int64)),
    )


def _counts(matrices: Sequence[Tensor]) -> Array:
    """Return how often each exponent occurs, (256,)."""
    if not matrices or any(matrix.numel() == 0 for matrix in matrices):
        raise ValueError("a DFloat11 unit needs at least one matrix, and no empty one")
    wrong = [matrix.dtype for matrix in matrices if matrix.dtype != torch.bfloat16]
    if wrong:
        raise ValueError(f"DFloat11 holds bfloat16 weights, got {wrong[0]}; convert them to bfloat16 first")
    if sum(matrix.numel() for matrix in matrices) >= 2**31:
        raise ValueError("a DFloat11 unit holds fewer than 2**31 weights; give it fewer matrices")
    counts = np.zeros(256, dtype=np.int64)
    for _, weights in _steps(matrices):
        counts += np.bincount((weights >> 7).astype(np.uint8), minlength=256)
    if counts[JUMP:].any():
        raise ValueError(
            f"{counts[JUMP:].sum()} weights are NaN, infinite or of magnitude 2**113 and more, which DFloat11 cannot "
            "hold; mend them or keep this matrix in bfloat16"
        )
    return counts


def _steps(matrices: Sequence[Tensor]) -> Iterator[tuple[int, Array]]:
    """Yield the patterns of all weights, some at a time, with the index of the first."""
    done = 0
    for matrix in matrices:
        flat = matrix.detach().reshape(-1).view(torch.int16)
        for first in range(0, len(flat), STEP):
            part = flat[first : first + STEP].cpu().numpy().view(np.uint16)
            yield done + first, part
        done += len(flat)


# The code -------------------------------------------------------------------------------------------------------------


def huffman(counts: dict[int, int]) -> dict[int, Code]:
    """Return an optimal code for symbols that occur so often, and for `END`, of 32 bits at most, in order of the bits.

    Should it get longer codes, the rarest symbols count as occurring once: two of them, or as many as it takes.
    """
    codes = _huffman(counts)
    rare = sorted(counts, key=lambda symbol: (counts[symbol], symbol))
    for some in range(2, len(rare) + 1):
        if max(code.length for code in codes.values()) <= LONGEST_CODE:
            break
        codes = _huffman(counts | dict.fromkeys(rare[:some], 1))
    return codes


def _huffman(counts: dict[int, int]) -> dict[int, Code]:
    heap = [(count, symbol, {symbol: Code(0, 0)}) for symbol, count in (counts | {END: 1}).items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (one, first, zeros), (other, _, ones) = heapq.heappop(heap), heapq.heappop(heap)
        merged = {symbol: Code(length + 1, bits) for symbol, (length, bits) in zeros.items()}
        merged |= {symbol: Code(length + 1, bits | 1 << length) for symbol, (length, bits) in ones.items()}
        heapq.heappush(heap, (one + other, first, merged))
    return heap[0][2]


def luts_of(codes: dict[int, Code]) -> Array:
    """Return the tables that decode a code, and last the lengths, as in `Unit`."""
    prefixes: dict[tuple[int, int], None] = {(0, 0): None}  # (bytes, bits), the root first
    for symbol, (length, bits) in codes.items():
        if symbol != END:
            prefixes |= dict.fromkeys((size, bits >> length - 8 * size) for size in range(1, (length - 1) // 8 + 1))
    tables = {prefix: index for index, prefix in enumerate(sorted(prefixes, key=lambda prefix: prefix[0]))}
    luts = np.zeros((len(tables) + 1, 256), dtype=np.uint8)
    entry = 0  # the released encoder, too, lets it run on into the next table, up to that one's first code
    for (size, bits), index in tables.items():
        named = {
            longer & 255: 256 - other
            for (longer_size, longer), other in tables.items()
            if longer_size == size + 1 and longer >> 8 == bits
        }
        for symbol, code in codes.items():
            if symbol != END and (code.length - 1) // 8 == size and code.bits >> code.length - 8 * size == bits:
                named[code.bits << 8 * (size + 1) >> code.length & 255] = symbol
        for column in range(256):
            entry = named.get(column, entry)
            luts[index, column] = entry
    for symbol, code in codes.items():
        if symbol != END:
            luts[-1, symbol] = code.length
    return luts


# The stream -----------------------------------------------------------------------------------------------------------


class _Stream:
    """Codes one behind the other, and where windows and chunks begin."""

    def __init__(self, codes: dict[int, Code], counts: Array) -> None:
        self.lengths, self.aligned = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.uint64)
        for symbol, (length, bits) in codes.items():
            if symbol != END:
                self.lengths[symbol], self.aligned[symbol] = length, bits << WINDOW_BITS - length
        self.end = codes[END]
        self.bits = int((counts * self.lengths).sum())
        chunks = -(-self.bits // (8 * CHUNK_BYTES))
        self.words = np.zeros(chunks * WINDOWS + 1, dtype=np.uint64)
        self.gaps = np.zeros(chunks * WINDOWS, dtype=np.uint8)
        self.positions = np.full(chunks + 1, counts.sum(), dtype=np.int64)
        self.done, self.at, self.window = 0, 0, -1  # codes, bits, and the last window that a code starts in

    def append(self, exponents: Array) -> None:
        """Write the codes of some exponents."""
        lengths = self.lengths[exponents]
        starts = np.cumsum(lengths)
        end = self.at + int(starts[-1])
        starts += self.at - lengths
        windows, aligned = starts >> 6, self.aligned[exponents]
        offsets = (starts & (WINDOW_BITS - 1)).astype(np.uint64)
        first = np.concatenate([[0], np.flatnonzero(windows[1:] != windows[:-1]) + 1])  # codes of windows
        last, own = np.append(first[1:], len(windows)) - 1, windows[first]
        self.words[own] |= np.bitwise_or.reduceat(aligned >> offsets, first)
        self.words[own + 1] |= aligned[last] << np.uint64(1) << np.uint64(WINDOW_BITS - 1) - offsets[last]
        new = slice(int(own[0] == self.window), None)
        self.gaps[own[new]] = offsets[first[new]]
        chunks = own[new] // WINDOWS
        begun = np.flatnonzero(np.diff(chunks, prepend=self.window // WINDOWS))
        self.positions[chunks[begun]] = self.done + first[new][begun]
        self.done, self.at, self.window = self.done + len(exponents), end, int(own[-1])

    def written(self) -> Array:
        """Return the stream in bytes, the last one filled up with what the end's code begins with."""
        free = -self.bits % 8
        filling = (self.end.bits << free >> self.end.length) & (1 << free) - 1
        self.words[self.bits >> 6] |= np.uint64(filling << (-(self.bits + free) % WINDOW_BITS))
        return self.words.byteswap(inplace=True).view(np.uint8)[: -(-self.bits // 8)]


def _packed(gaps: Array) -> Array:
    """Return numbers below 32 with five bits each, eight in five bytes."""
    word = np.zeros(len(gaps) // 8, dtype=np.uint64)
    for index in range(8):
        word |= gaps[index::8].astype(np.uint64) << np.uint64(GAP_BITS * (7 - index))
    return word.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - GAP_BITS :].flatten()
