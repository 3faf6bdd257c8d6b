"""What an expert does to each token between its matrix products."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalCall=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for GPUs of other makers, where nothing starts early
    gdc_launch_dependents = gdc_wait = None

from bagel.kernels.functions import HOPPER
from bagel.kernels.triton_rounding import rounded, store_rounded, store_unit, turned

VALUES_A_WARP = 1024
"""Values of a row that the threads of a warp hold, 32 each, until there are sixteen warps."""


def early() -> dict[str, bool]:
    """Return the options with which a kernel starts while the one before it ends, where the current GPU can."""
    return _early(torch.cuda.current_device()) if torch.version.cuda else {"EARLY": False}


@functools.cache
def _early(gpu: int) -> dict[str, bool]:
    able = torch.cuda.get_device_capability(gpu)[0] >= HOPPER
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Let the next kernel start, and wait for all that the one before has written: first of all in a kernel."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return x (..., n) normed over its last axis, rounded to its type, and weighted by (n,) of the same type."""
    return _normed(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, plus: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + plus (T, n), and what `rms_norm` returns of it."""
    return _normed(x, plus, weight, eps)[:2]


def rms_norm_round(
    x: Tensor, weight: Tensor, *, eps: float, largest: float, tiny: float, dtype: torch.dtype, turn: int
) -> tuple[Tensor, Tensor]:
    """Return what `round_rows` returns of the `rms_norm` of x (T, n)."""
    return _normed(x, None, weight, eps, dtype, largest=largest, tiny=tiny, turn=turn)[1:]


def add_rms_norm_round(
    x: Tensor, plus: Tensor, weight: Tensor, *, eps: float, largest: float, tiny: float, dtype: torch.dtype, turn: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + plus (T, n), and what `rms_norm_round` returns of it."""
    return _normed(x, plus, weight, eps, dtype, largest=largest, tiny=tiny, turn=turn)


def _normed(
    x: Tensor,
    plus: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    largest: float = 0.0,
    tiny: float = 0.0,
    turn: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + plus, the norm, and the scales of its rows if it is rounded to 8 bits, to `dtype` (else nothing)."""
    x, plus = x.contiguous(), None if plus is None else plus.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    rows, block = x.numel() // max(width, 1), triton.next_power_of_2(width)
    rounds = largest > 0
    total = x if plus is None else torch.empty_like(x)
    scale = x.new_empty(rows if rounds else 0, 1, dtype=torch.float32)
    if rows:
        _rms_norm[(rows,)](
            x,
            plus,
            weight,
            total,
            out,
            scale,
            width,
            eps,
            largest,
            tiny,
            BLOCK=block,
            TURN=turn,
            ADDS=plus is not None,
            ROUNDS=rounds,
            num_warps=_warps(block),
            **early(),
        )
    return total, out, scale


@triton.jit
def _rms_norm(
    x, plus, weight, total, out, scale, width, eps, largest, tiny,
    BLOCK: tl.constexpr, TURN: tl.constexpr, ADDS: tl.constexpr, ROUNDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * width + column, column < width
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        added = values.to(tl.float32) + tl.load(plus + at, mask=inside, other=0.0).to(tl.float32)
        values = added.to(values.dtype)
        tl.store(total + at, values, mask=inside)
    exact = values.to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, axis=0) / width + eps)
    weighted = normed.to(values.dtype).to(tl.float32) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weighted = weighted.to(values.dtype)
    if ROUNDS:
        store_rounded(weighted.to(tl.float32), out + at, scale + row, inside, largest, tiny, BLOCK, TURN)
    else:
        tl.store(out + at, weighted, mask=inside)


def norm_rotate(
    qk: Tensor, weights: tuple[Tensor, Tensor] | None, rotary: tuple[Tensor, Tensor], *, q_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries (T, Hq, D) and keys (T, Hkv, D), normed and rotated in float32 and rounded once, in their type.

    Args:
        qk: both, (T, Hq + Hkv, D), of rows that may lie apart, as slices of a wider projection do.
        weights: of the norms of queries and keys, each (D,); None leaves the norm out.
        rotary: see `bagel.kernels.Rotary`.
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
            **early(),
        )
    return q, k


@triton.jit
def _norm_rotate(
    x, q, k, q_weight, k_weight, cos, sin, stride, heads, q_heads, half, eps,
    HEADS: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
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
        _silu_mul[(tokens, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block, **early())
    return out


@triton.jit
def _silu_mul(x, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = _gated(x + row * 2 * width, column, width)
    tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=column < width)


def add_product(plus: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x (T, in) times the rows of a weight (out, in) to plus (T, out) in place, where the product is stored."""
    plus.addmm_(x, weight.t())


def round_rows(x: Tensor, *, largest: float, tiny: float, dtype: torch.dtype, turn: int) -> tuple[Tensor, Tensor]:
    """Return x (T, n) in 8 bits and float32 scales (T, 1) of its rows; see `bagel.kernels.round_rows`."""
    x = x.contiguous()
    tokens, width = x.shape
    out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(tokens, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    if tokens:
        _round_rows[(tokens,)](x, out, scale, width, largest, tiny, BLOCK=block, TURN=turn, num_warps=_warps(block))
    return out, scale


@triton.jit
def _round_rows(x, out, scale, width, largest, tiny, BLOCK: tl.constexpr, TURN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    store_rounded(values, out + row * width + column, scale + row, inside, largest, tiny, BLOCK, TURN)


def silu_mul_round(
    gate_up: Tensor, *, largest: float, tiny: float, dtype: torch.dtype, turn: int
) -> tuple[Tensor, Tensor]:
    """Return what `round_rows` returns of `silu_mul`, whose result need not pass through memory."""
    gate_up = gate_up.contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width, dtype=dtype)
    scale = gate_up.new_empty(tokens, 1, dtype=torch.float32)
    first = 1 << (width.bit_length() - 1)  # a row is held in two pieces: one alone would be half empty
    rest = triton.next_power_of_2(max(1, width - first))
    if tokens:
        _silu_mul_round[(tokens,)](
            gate_up,
            out,
            scale,
            width,
            largest,
            tiny,
            FIRST=first,
            REST=rest,
            TURN=turn,
            TURN_REST=min(turn, rest),
            num_warps=16,
        )
    return out, scale


@triton.jit
def _silu_mul_round(
    x, out, scale, width, largest, tiny,
    FIRST: tl.constexpr, REST: tl.constexpr, TURN: tl.constexpr, TURN_REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, rest = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    a = turned(_gated(x + row * 2 * width, first, width), FIRST, TURN)
    b = turned(_gated(x + row * 2 * width, rest, width), REST, TURN_REST)
    most = tl.maximum(tl.max(tl.abs(a), axis=0), tl.max(tl.abs(b), axis=0))
    by, to = store_unit(most, scale + row, largest, tiny), out + row * width
    tl.store(to + first, rounded(a * by, out.dtype.element_ty))
    tl.store(to + rest, rounded(b * by, out.dtype.element_ty), mask=rest < width)


@triton.jit
def _gated(x, column, width):
    gate = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(x + width + column, mask=column < width, other=0.0)
    # Rounded as a product that is stored is.
    return (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(up.dtype).to(tl.float32)


def _warps(block: int) -> int:
    return min(16, max(1, block // VALUES_A_WARP))
