"""How rows are turned and rounded to 8 bits at the end of the kernels that compute them."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_rounded(values, out, scale, inside, largest, tiny, BLOCK: tl.constexpr, TURN: tl.constexpr):
    """Turn a row of BLOCK values in float32, zeros where not `inside`, and store it in 8 bits with its scale."""
    values = turned(values, BLOCK, TURN)
    by = store_unit(tl.max(tl.abs(values), axis=0), scale, largest, tiny)
    tl.store(out, rounded(values * by, out.dtype.element_ty), mask=inside)


@triton.jit
def store_unit(most, scale, largest, tiny):
    """Store the scale of a row whose greatest magnitude is `most`, and return its reciprocal."""
    unit = tl.maximum(most / largest, tiny)
    tl.store(scale, unit)
    return 1 / unit


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Return values in a type of 8 bits; integers are rounded to nearest, where a cast alone would cut."""
    if dtype == tl.int8:
        return ((values + 12582912.0) - 12582912.0).to(dtype)  # 1.5 * 2^23, whose last bit is worth 1
    return values.to(dtype)


@triton.jit
def turned(values, BLOCK: tl.constexpr, TURN: tl.constexpr):
    """Return each TURN of BLOCK values times the Hadamard matrix of that size: the product of those of 16 and the rest.

    In TensorFloat-32, which holds 16-bit values as they are, and is finer than 8 bits by far.
    """
    if TURN > 1:
        INNER: tl.constexpr = TURN // 16
        OUTER: tl.constexpr = BLOCK // TURN
        x = tl.reshape(values * TURN**-0.5, (BLOCK // INNER, INNER))
        x = tl.dot(x, _hadamard(INNER), input_precision="tf32")
        x = tl.reshape(tl.permute(tl.reshape(x, (OUTER, 16, INNER)), (0, 2, 1)), (BLOCK // 16, 16))
        x = tl.dot(x, _hadamard(16), input_precision="tf32")
        values = tl.reshape(tl.permute(tl.reshape(x, (OUTER, INNER, 16)), (0, 2, 1)), (BLOCK,))
    return values


@triton.jit
def _hadamard(SIZE: tl.constexpr):
    common = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float32)
