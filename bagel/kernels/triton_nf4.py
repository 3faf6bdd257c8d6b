"""Weights of 4 bits in blocks of 64 values: expanded, and multiplied by a few tokens as they are.

A weight (out, in) lies flat: byte i holds the indices of the values 2i (high half) and 2i + 1 of a table of 16, block j
the magnitude of the values 64j and after. See `bagel.formats.nf4`. Where CUDA C++ can be built, and takes the sizes,
`bagel.kernels.cuda_nf4` does the same in less time.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel.kernels import cuda_nf4
from bagel.kernels.triton_rows import early, wait

ROWS, BYTES = 4, 4
"""Rows of the weight of one program, and bytes of each that a thread loads at once: as many as words of x, which keeps
tiles as they are laid out."""
STEPS = 40
"""Words that a thread has begun to load before it waits for any, for a token of 16 bits per value."""
EXPANDED = 512
"""Groups of bytes that one program expands."""
WIDE = 8192
"""Columns of a weight from which four warps share a row, in place of two."""


def blocks_times_vectors(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None = None,
    nested_table: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    plus: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x (T, in) times the rows of a weight (out, in) in 4 bits, plus a bias; bound by reading the weight.

    Args:
        x: up to 8 tokens, contiguous; `in` a multiple of 64.
        codes: (out * in / 2,) uint8.
        absmax: (out * in / 64,) float32, or uint8 where the next three are given.
        codebook: the 16 values, float32.
        nested_absmax: (ceil(out * in / 64 / 256),) float32.
        nested_table: the 256 values of magnitudes, float32.
        offset: of all magnitudes, () float32.
        bias: (out,).
        plus: (T, out), added to the rounded sum.
        dtype: of the result; by default that of x.
    """
    tokens, width = x.shape
    rows = 2 * codes.numel() // width
    if x.is_cuda:
        given = x, codes, absmax, codebook, nested_absmax, nested_table, offset, bias, plus
        if (product := cuda_nf4.multiply(*given, dtype=dtype or x.dtype)) is not None:
            return product
    out = x.new_empty(tokens, rows, dtype=dtype)
    most, warps = triton.next_power_of_2(tokens), 4 if width > WIDE else 2
    parts = triton.cdiv(width, 2 * BYTES * 32 * warps)
    rounds = triton.cdiv(parts, max(1, 2 * STEPS // (ROWS * most * x.element_size())))
    _blocks_times_vectors[(triton.cdiv(rows, ROWS),)](
        x.view(torch.int64 if x.element_size() == 4 else torch.int32),  # two values in each
        codes,
        absmax,
        codebook,
        nested_absmax,
        nested_table,
        offset,
        bias,
        plus,
        out,
        rows,
        tokens,
        HALF=width // 2,
        TOKENS=most,
        ROWS=ROWS,
        LANES=32 * warps,
        BYTES=BYTES,
        PARTS=parts,
        STEPS=triton.cdiv(parts, rounds),
        BITS=8 * x.element_size(),
        BRAIN=x.dtype == torch.bfloat16,
        NESTED=nested_absmax is not None,
        BIASED=bias is not None,
        ADDS=plus is not None,
        SHUFFLES=_shuffles(x),
        num_warps=warps,
        **early(),
    )
    return out


@triton.jit
def _blocks_times_vectors(
    x, codes, absmax, codebook, nested_absmax, nested_table, offset, bias, plus, out, rows, tokens,
    HALF: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BYTES: tl.constexpr,
    PARTS: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr, NESTED: tl.constexpr,
    BIASED: tl.constexpr, ADDS: tl.constexpr, SHUFFLES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, ROWS, LANES), dtype=tl.float32)
    for part in range(0, PARTS, STEPS):
        for step in tl.static_range(STEPS):
            start = ((part + step) * LANES + tl.arange(0, LANES)) * BYTES
            column, inside = start[:, None] + tl.arange(0, BYTES)[None, :], start < HALF
            known = (token < tokens)[:, None, None, None] & inside[None, None, :, None]
            two = tl.load(x + token[:, None, None, None] * HALF + column[None, None, :, :], mask=known, other=0)
            even, odd = _both(two, BITS, BRAIN)
            here = (row < rows)[:, None] & inside[None, :]
            byte = tl.load(codes + row[:, None, None] * HALF + column[None, :, :], mask=here[:, :, None], other=0)
            scale = _magnitudes(
                absmax, nested_absmax, nested_table, offset, row[:, None] * (HALF // 32) + (start // 32)[None, :], here,
                NESTED,
            )  # fmt: skip
            first, second = _looked_up(byte, codebook, SHUFFLES)
            sums += tl.sum(first[None] * even + second[None] * odd, axis=3) * scale[None]
    total = tl.sum(sums, axis=2)
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    at, here = token[:, None] * rows + row[None, :], (token < tokens)[:, None] & (row < rows)[None, :]
    if ADDS:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(plus + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here)


def expand_blocks(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None = None,
    nested_table: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return `count` values of a weight in 4 bits from value `first` on, (count,); both even. See above."""
    if codes.is_cuda:
        tensors = codes, absmax, codebook, nested_absmax, nested_table, offset
        if (values := cuda_nf4.expand(*tensors, first=first, count=count, dtype=dtype)) is not None:
            return values
    out = torch.empty(count, dtype=dtype, device=codes.device)
    if count:
        _expand_blocks[(triton.cdiv(count, 2 * EXPANDED * BYTES),)](
            codes,
            absmax,
            codebook,
            nested_absmax,
            nested_table,
            offset,
            out,
            first // 2,
            count // 2,
            GROUPS=EXPANDED,
            BYTES=BYTES,
            ALIGNED=first % (2 * BYTES) == 0,
            NESTED=nested_absmax is not None,
            SHUFFLES=_shuffles(codes),
        )
    return out


@triton.jit
def _expand_blocks(
    codes, absmax, codebook, nested_absmax, nested_table, offset, out, first, count,
    GROUPS: tl.constexpr, BYTES: tl.constexpr, ALIGNED: tl.constexpr, NESTED: tl.constexpr, SHUFFLES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (GROUPS * BYTES)
    group = start + tl.arange(0, GROUPS) * BYTES
    place = group[:, None] + tl.arange(0, BYTES)[None, :]
    byte = tl.load(codes + first + place, mask=place < count, other=0)
    if ALIGNED:  # then the bytes of a group are of one block
        scale = _magnitudes(
            absmax, nested_absmax, nested_table, offset, (first + group) // 32, group < count, NESTED
        )[:, None]  # fmt: skip
    else:
        scale = _magnitudes(
            absmax, nested_absmax, nested_table, offset, (first + place) // 32, place < count, NESTED
        )  # fmt: skip
    one, other = _looked_up(byte, codebook, SHUFFLES)
    values = tl.join(one * scale, other * scale).to(out.dtype.element_ty)
    at = start * 2 + tl.arange(0, GROUPS * BYTES * 2)
    tl.store(out + at, tl.reshape(values, (GROUPS * BYTES * 2,)), mask=at < 2 * count)


# Parts of both --------------------------------------------------------------------------------------------------------


@triton.jit
def _magnitudes(absmax, nested_absmax, nested_table, offset, block, here, NESTED: tl.constexpr):
    found = tl.load(absmax + block, mask=here, other=0)
    if NESTED:
        greater = tl.load(nested_absmax + block // 256, mask=here, other=0.0)
        found = tl.load(nested_table + found.to(tl.int32)) * greater + tl.load(offset)
    return found


@triton.jit
def _looked_up(byte, codebook, SHUFFLES: tl.constexpr):
    """Return the values of both halves of each byte."""
    index = byte.to(tl.int32)
    if SHUFFLES:
        own = _of_lane(index, codebook)
        return _from_lane(own, index >> 4), _from_lane(own, index)
    return tl.load(codebook + (index >> 4)), tl.load(codebook + (index & 15))


@triton.jit
def _of_lane(like, codebook):
    """Give each thread of a warp one value of the table, twice over: the 16 fit into its 32 registers."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .u64 at; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 at, lane, 4; "
        "add.u64 at, at, $1; ld.global.nc.b32 $0, [at]; }",
        "=r,l",
        [codebook.to(tl.int64) + like * 0],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _from_lane(own, index):
    """Return what thread `index` holds, of which the last 5 bits count: less work than to load from a table."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        "=r,r,r",
        [own, index],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _both(two, BITS: tl.constexpr, BRAIN: tl.constexpr):
    """Return the values of even and of odd columns, which lie side by side in one word, in float32."""
    if BITS == 32:
        even, odd = two.to(tl.int32).to(tl.float32, bitcast=True), (two >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif BRAIN:  # bfloat16 is the first half of a float32
        even, odd = (two << 16).to(tl.float32, bitcast=True), (two & -65536).to(tl.float32, bitcast=True)
    else:
        even = two.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (two >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


def _shuffles(x: Tensor) -> bool:
    """Whether threads of a warp can read each other's registers in NVIDIA's assembly: not in an interpreter."""
    return x.is_cuda and torch.version.cuda is not None
