"""Steps of a layer as single GPU kernels, written in Triton: torch's own operations pass over the memory several times.

Each computes what the plain code beside its call says, which a CPU, gradients and compiling use: `fused` tells where.
Letters in shapes: T tokens, B texts, Hq query heads, Hkv key/value heads, D channels a head.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_A_WARP = 1024
"""Values of a row that the threads of a warp hold, 32 each, until there are sixteen warps."""


LARGE = 2**25
"""Values of a weight from which four of its rows are multiplied by a vector at a time, not two: as was fastest."""
KEYS_A_PROGRAM = 256
"""Keys that one program attends to, so that long texts keep many processors busy."""
TILE = 4096
"""Values of a picture that a program holds at once, in all channels of some pixels."""
CHUNKS = 512
"""Parts of a picture that are summed by themselves, at most: a few for each processor of a large GPU."""


def try_some() -> None:
    """Build and run a kernel of each sort, in the types that they are for; what Triton raises is not caught."""
    heads = torch.ones(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    rms_norm(heads, heads[0, 0], eps=1e-6)
    cache = heads.new_zeros(1, 64, 1, 128)
    attend_appended(heads, heads, heads, cache, cache.clone(), torch.zeros(1, device="cuda", dtype=torch.int32))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return x (..., n) normed over its last axis, rounded to its type, and weighted by (n,) of the same type."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        block = triton.next_power_of_2(width)
        _rms_norm[(x.numel() // width,)](x, weight, out, width, eps, BLOCK=block, num_warps=_warps(block))
    return out


@triton.jit
def _rms_norm(x, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    weighted = normed.to(out.dtype.element_ty) * tl.load(weight + column, mask=inside)
    tl.store(out + row * width + column, weighted, mask=inside)


def norm_rotate(
    qk: Tensor, weights: tuple[Tensor, Tensor] | None, rotary: tuple[Tensor, Tensor], *, q_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries (T, Hq, D) and keys (T, Hkv, D), normed and rotated in float32 and rounded once, in their type.

    Args:
        qk: both, (T, Hq + Hkv, D), of rows that may lie apart, as slices of a wider projection do.
        weights: of the norms of queries and keys, each (D,); None leaves the norm out.
        rotary: see `bagel.modeling.rope`.
        q_heads: Hq.
        eps: of the norms.
    """
    tokens, heads, size = qk.shape
    q, k = qk.new_empty(tokens, q_heads, size), qk.new_empty(tokens, heads - q_heads, size)
    q_weight, k_weight = weights or (qk, qk)
    if tokens:
        _norm_rotate[(tokens,)](
            qk,
            q,
            k,
            q_weight,
            k_weight,
            *rotary,
            qk.stride(0),
            heads,
            q_heads,
            size // 2,
            eps,
            HEADS=triton.next_power_of_2(heads),
            LANES=triton.next_power_of_2(size // 2),
            NORM=weights is not None,
        )
    return q, k


@triton.jit
def _norm_rotate(
    x, q, k, q_weight, k_weight, cos, sin, stride, heads, q_heads, half, eps,
    HEADS: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None, :]
    here, inside = (head < heads) & (lane < half), lane < half
    at = head * (2 * half) + lane
    a = tl.load(x + row * stride + at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + row * stride + at + half, mask=here, other=0.0).to(tl.float32)
    is_query = head < q_heads
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)[:, None]
        q_first, k_first = tl.load(q_weight + lane, mask=inside), tl.load(k_weight + lane, mask=inside)
        q_last, k_last = tl.load(q_weight + half + lane, mask=inside), tl.load(k_weight + half + lane, mask=inside)
        a = a * scale * tl.where(is_query, q_first, k_first).to(tl.float32)
        b = b * scale * tl.where(is_query, q_last, k_last).to(tl.float32)
    # Both halves have the same angles; the sines of the first have their sign changed.
    c = tl.load(cos + row * 2 * half + lane, mask=inside)
    s = tl.load(sin + row * 2 * half + half + lane, mask=inside)
    first, last = (a * c - b * s).to(q.dtype.element_ty), (b * c + a * s).to(q.dtype.element_ty)
    to_q, to_k = q + row * q_heads * 2 * half + at, k + (row * (heads - q_heads) - q_heads) * 2 * half + at
    tl.store(to_q, first, mask=here & is_query)
    tl.store(to_q + half, last, mask=here & is_query)
    tl.store(to_k, first, mask=here & (head >= q_heads))
    tl.store(to_k + half, last, mask=here & (head >= q_heads))


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (T, n) of gate and up side by side (T, 2n), computed in float32 and rounded once."""
    gate_up = gate_up.contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    if tokens:
        _silu_mul[(tokens, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


@triton.jit
def _silu_mul(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = _gated(x + row * 2 * width, column, width)
    tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=column < width)


def round_rows(x: Tensor, *, largest: float, tiny: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (T, n) in 8-bit floats and float32 scales (T, 1) of its rows; see `bagel.modeling.float8.rounded`."""
    x = x.contiguous()
    tokens, width = x.shape
    out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(tokens, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    if tokens:
        _round_rows[(tokens,)](x, out, scale, width, largest, tiny, BLOCK=block, num_warps=_warps(block))
    return out, scale


@triton.jit
def _round_rows(x, out, scale, width, largest, tiny, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(values), axis=0) / largest, tiny)
    tl.store(scale + row, unit)
    tl.store(out + row * width + column, (values / unit).to(out.dtype.element_ty), mask=inside)


def silu_mul_round(gate_up: Tensor, *, largest: float, tiny: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `round_rows` returns of `silu_mul`, whose result need not pass through memory."""
    gate_up = gate_up.contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width, dtype=dtype)
    scale = gate_up.new_empty(tokens, 1, dtype=torch.float32)
    if tokens:
        _silu_mul_round[(tokens,)](gate_up, out, scale, width, largest, tiny, BLOCK=4096, num_warps=16)
    return out, scale


@triton.jit
def _silu_mul_round(x, out, scale, width, largest, tiny, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        most = tl.maximum(most, tl.abs(_gated(x + row * 2 * width, start + lane, width)))
    unit = tl.maximum(tl.max(most, axis=0) / largest, tiny)
    tl.store(scale + row, unit)
    for start in range(0, width, BLOCK):  # the row is read again, but not from memory
        values = _gated(x + row * 2 * width, start + lane, width) / unit
        tl.store(out + row * width + start + lane, values.to(out.dtype.element_ty), mask=start + lane < width)


@triton.jit
def _gated(x, column, width):
    gate = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(x + width + column, mask=column < width, other=0.0)
    # Rounded as a product that is stored is.
    return (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(up.dtype).to(tl.float32)


def matrix_times_vector(
    x: Tensor, weight: Tensor, *, scale: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """Return x (1, in) times the rows of a weight (out, in), plus a bias, in the type of x; x and weight contiguous.

    Bound by reading the weight, so x stays as it is beside one of 8-bit floats: nothing is lost to rounding it.

    Args:
        x: a single token.
        weight: of any type.
        scale: of each row of the weight, (out, 1) float32.
        plus: added last.
    """
    (rows, width), out = weight.shape, x.new_empty(1, weight.shape[0])
    some = 4 if rows * width > LARGE else 2
    _matrix_times_vector[(triton.cdiv(rows, some),)](
        x,
        weight,
        scale,
        plus,
        out,
        rows,
        width,
        SOME=some,
        BLOCK=1024 if width > rows else 512,
        SCALED=scale is not None,
        ADDS=plus is not None,
        num_warps=2,
    )
    return out


@triton.jit
def _matrix_times_vector(
    x, weight, scale, plus, out, rows, width,
    SOME: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * SOME + tl.arange(0, SOME)).to(tl.int64)
    sums = tl.zeros((SOME, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        here = (row < rows)[:, None] & inside[None, :]
        part = tl.load(weight + row[:, None] * width + column[None, :], mask=here, other=0.0).to(tl.float32)
        sums += part * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if SCALED:
        total *= tl.load(scale + row, mask=row < rows, other=0.0)
    if ADDS:
        total += tl.load(plus + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


def can_attend(q: Tensor) -> bool:
    """Whether `attend_appended` has a kernel for such queries: half precision, channels as matrix units take them."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in (16, 32, 64, 128, 256)


def attend_appended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Append one token to each text and attend from it; arguments and result as `bagel.attention.attend_appended`."""
    (texts, heads, size), (_, capacity, kv_heads, _) = q.shape, keys.shape
    group, parts = heads // kv_heads, triton.cdiv(capacity, KEYS_A_PROGRAM)
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
        KEYS=KEYS_A_PROGRAM,
        BLOCK=64,
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    most = triton.next_power_of_2(parts)
    _join_parts[(heads, texts)](sums, logs, lengths, out, heads, parts, SIZE=size, KEYS=KEYS_A_PROGRAM, MOST=most)
    return out


@triton.jit
def _attend_part(
    q, k, v, keys, values, lengths, sums, logs, q_stride, k_stride, v_stride,
    capacity, parts, kv_heads, group, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    sums, logs, lengths, out, heads, parts, SIZE: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
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


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    """Return silu of the group norm of x (B, C, H, W), in the type of x, channels last in memory.

    Computed in float32; sums are added in one order, whatever the GPU does first, so results repeat bit for bit.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    pixels, wide = height * width, triton.next_power_of_2(channels)
    rows = max(1, TILE // wide)
    each = rows * triton.cdiv(triton.cdiv(pixels, rows), CHUNKS)  # pixels of a chunk
    chunks = triton.cdiv(pixels, each)
    partial = x.new_empty(batch, chunks, 2, channels, dtype=torch.float32)
    _sums[(chunks, batch)](x, partial, pixels, channels, each, WIDE=wide, ROWS=rows)
    # Of what differs from each channel's first pixel: a mean far larger than the spread would leave nothing of it.
    sums, squares = (partial.sum(1) / pixels).view(batch, 2, groups, -1).unbind(1)  # (B, groups, C / groups)
    means = x[:, :, 0, 0].float().view_as(sums) + sums
    mean = means.mean(-1, keepdim=True)
    variance = ((squares - sums**2).clamp(min=0) + (means - mean) ** 2).mean(-1, keepdim=True)
    scale = (variance + eps).rsqrt() * weight.view(groups, -1)
    shift = bias.view(groups, -1) - mean * scale
    scale, shift = scale.contiguous(), shift.contiguous()  # (B, C)
    out = torch.empty_like(x)
    _scaled[(triton.cdiv(pixels, rows), batch)](x, scale, shift, out, pixels, channels, WIDE=wide, ROWS=rows)
    return out


@triton.jit
def _sums(x, partial, pixels, channels, each, WIDE: tl.constexpr, ROWS: tl.constexpr):
    chunk, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < channels
    sums, squares = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32)
    first = tl.load(x + picture * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, each, ROWS):
        pixel = chunk * each + start + tl.arange(0, ROWS)
        at = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
        here = (pixel < pixels)[:, None] & inside[None, :]
        values = tl.where(here, tl.load(x + at, mask=here, other=0.0).to(tl.float32) - first, 0.0)
        sums += values
        squares += values * values
    to = partial + (picture * tl.num_programs(0) + chunk) * 2 * channels + channel
    tl.store(to, tl.sum(sums, axis=0), mask=inside)
    tl.store(to + channels, tl.sum(squares, axis=0), mask=inside)


@triton.jit
def _scaled(x, scale, shift, out, pixels, channels, WIDE: tl.constexpr, ROWS: tl.constexpr):
    picture = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = channel < channels
    here = (pixel < pixels)[:, None] & inside[None, :]
    at = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    values = values * tl.load(scale + picture * channels + channel, mask=inside)[None, :]
    values = values + tl.load(shift + picture * channels + channel, mask=inside)[None, :]
    values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=here)


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
    row, column = pixel // width, pixel % width  # rows of all pictures are counted on
    first = (4 * row * width + 2 * column)[:, None] * channels + channel[None, :]
    tl.store(out + first, values, mask=here)
    tl.store(out + first + channels, values, mask=here)
    tl.store(out + first + 2 * width * channels, values, mask=here)
    tl.store(out + first + (2 * width + 1) * channels, values, mask=here)


def _warps(block: int) -> int:
    return min(16, max(1, block // VALUES_A_WARP))
