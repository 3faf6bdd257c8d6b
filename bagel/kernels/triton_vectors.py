"""What decoding does to a single token of each text, bound by reading weights, keys and values."""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel.kernels.triton_rows import early, wait

NARROW = 8192
"""Columns of a weight up to which all of a row's loads are begun before any is waited for."""
KEYS, MOST_PARTS = (64, 512), 64
"""Keys that one program attends to, at least and at most; between them, so many that a cache has so many parts."""


def matrix_times_vector(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Return x (1, in) times the rows of a weight (out, in), plus a bias, in the type of x; x and weight contiguous.

    Bound by reading the weight, so x stays as it is beside one of 8-bit floats: nothing is lost to rounding it.

    Args:
        x: a single token.
        weight: of any type.
        scale: of each row of the weight, (out, 1) float32.
        bias: (out,).
        plus: (1, out), added to the rounded sum.
    """
    (rows, width), out = weight.shape, x.new_empty(1, weight.shape[0])
    narrow = width <= NARROW
    some, block, warps = (4, 512, 1) if narrow else (2, 1024, 2)  # as was fastest
    _matrix_times_vector[(triton.cdiv(rows, some),)](
        x,
        weight,
        scale,
        bias,
        plus,
        out,
        rows,
        WIDTH=width,
        SOME=some,
        BLOCK=block,
        NARROW=narrow,
        BYTES=weight.dtype == torch.int8 and x.is_cuda and torch.version.cuda is not None,
        SCALED=scale is not None,
        BIASED=bias is not None,
        ADDS=plus is not None,
        num_warps=warps,
        **early(),
    )
    return out


@triton.jit
def _matrix_times_vector(
    x, weight, scale, bias, plus, out, rows, WIDTH: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
    NARROW: tl.constexpr, BYTES: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, ADDS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * SOME + tl.arange(0, SOME)).to(tl.int64)
    sums = tl.zeros((SOME, BLOCK), dtype=tl.float32)
    wait(EARLY)
    if NARROW:
        for part in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
            sums += _products(x, weight, row, rows, part * BLOCK + tl.arange(0, BLOCK), WIDTH, BYTES)
    else:
        for start in range(0, WIDTH, BLOCK):
            sums += _products(x, weight, row, rows, start + tl.arange(0, BLOCK), WIDTH, BYTES)
    total = tl.sum(sums, axis=1)
    if SCALED:
        total *= tl.load(scale + row, mask=row < rows, other=0.0)
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    if ADDS:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(plus + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _products(x, weight, row, rows, column, WIDTH: tl.constexpr, BYTES: tl.constexpr):
    inside = column < WIDTH
    here = (row < rows)[:, None] & inside[None, :]
    some = _in_float32(tl.load(weight + row[:, None] * WIDTH + column[None, :], mask=here, other=0.0), BYTES)
    return some * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _in_float32(some, BYTES: tl.constexpr):
    """Return values in float32; GPUs convert few integers at once, so an int8 n becomes the float 2^23 + 128 + n."""
    if not BYTES:
        return some.to(tl.float32)
    floats = tl.inline_asm_elementwise(
        "{ .reg .b32 raised; xor.b32 raised, $4, 0x80808080; prmt.b32 $0, raised, 0x4B000000, 0x7440; "
        "prmt.b32 $1, raised, 0x4B000000, 0x7441; prmt.b32 $2, raised, 0x4B000000, 0x7442; "
        "prmt.b32 $3, raised, 0x4B000000, 0x7443; }",
        "=f,=f,=f,=f,r",
        [some],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )
    return floats - 8388736.0


def attend_appended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Append one token to each text and attend from it; arguments and result as `bagel.kernels.attend_appended`."""
    (texts, heads, size), (_, capacity, kv_heads, _) = q.shape, keys.shape
    group = heads // kv_heads
    own = min(max(KEYS[0], triton.next_power_of_2(triton.cdiv(capacity, MOST_PARTS))), KEYS[1])
    parts = triton.cdiv(capacity, own)
    sums = q.new_empty(texts, heads, parts, size, dtype=torch.float32)
    logs = q.new_empty(texts, heads, parts, 2, dtype=torch.float32)
    _attend_part[(parts, kv_heads, texts)](
        q,
        k,
        v,
        keys,
        values,
        lengths,
        sums,
        logs,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        capacity,
        parts,
        kv_heads,
        group,
        size**-0.5,
        SIZE=size,
        ROWS=max(16, triton.next_power_of_2(group)),
        KEYS=own,
        BLOCK=64,
        **early(),
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    most = triton.next_power_of_2(parts)
    _join_parts[(heads, texts)](sums, logs, lengths, out, heads, parts, SIZE=size, KEYS=own, MOST=most, **early())
    return out


@triton.jit
def _attend_part(
    q, k, v, keys, values, lengths, sums, logs, q_stride, k_stride, v_stride,
    capacity, parts, kv_heads, group, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    part, head, text = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + text)
    if part * KEYS > length:
        return
    row, lane = tl.arange(0, ROWS), tl.arange(0, SIZE)
    here = (row < group)[:, None]
    queries = tl.load(q + text * q_stride + (head * group + row)[:, None] * SIZE + lane[None, :], mask=here, other=0.0)
    new_key = tl.load(k + text * k_stride + head * SIZE + lane)[None, :]
    new_value = tl.load(v + text * v_stride + head * SIZE + lane)[None, :]
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS, SIZE), tl.float32)
    for start in range(part * KEYS, min((part + 1) * KEYS, length + 1), BLOCK):
        index = start + tl.arange(0, BLOCK)
        old, new = (index < length)[:, None], (index == length)[:, None]
        at = ((text * capacity + index)[:, None] * kv_heads + head) * SIZE + lane[None, :]
        key = tl.where(new, new_key, tl.load(keys + at, mask=old, other=0.0))
        value = tl.where(new, new_value, tl.load(values + at, mask=old, other=0.0))
        tl.store(keys + at, key, mask=new)
        tl.store(values + at, value, mask=new)
        scores = tl.where((index <= length)[None, :], tl.dot(queries, tl.trans(key)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        less = tl.exp(most - higher)
        total = total * less + tl.sum(weights, axis=1)
        seen = seen * less[:, None] + tl.dot(weights.to(value.dtype), value)
        most = higher
    place = (text * kv_heads * group + head * group + row) * parts + part
    tl.store(sums + place[:, None] * SIZE + lane[None, :], seen, mask=here)
    tl.store(logs + place * 2, most, mask=row < group)
    tl.store(logs + place * 2 + 1, total, mask=row < group)


@triton.jit
def _join_parts(
    sums, logs, lengths, out, heads, parts,
    SIZE: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    head, text = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, lane = tl.arange(0, MOST), tl.arange(0, SIZE)
    done = part * KEYS <= tl.load(lengths + text)
    place = (text * heads + head) * parts + part
    most = tl.load(logs + place * 2, mask=done, other=float("-inf"))
    weight = tl.exp(most - tl.max(most, axis=0))
    total = tl.sum(weight * tl.load(logs + place * 2 + 1, mask=done, other=0.0), axis=0)
    seen = tl.load(sums + place[:, None] * SIZE + lane[None, :], mask=done[:, None], other=0.0)
    seen = tl.sum(seen * weight[:, None], axis=0) / total
    tl.store(out + (text * heads + head) * SIZE + lane, seen.to(out.dtype.element_ty))
