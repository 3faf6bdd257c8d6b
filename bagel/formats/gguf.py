"""The blocks of GGUF files in plain torch: bytes to weights on any device, weights to bytes for the simple types.

A type packs `elements` neighbouring weights of a row into `bytes`; a matrix (rows, columns) is stored as uint8
(rows, columns / elements * bytes). The layouts are those of ggml (ggml-common.h), numbers little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**24
"""Most weights expanded at once: bounds the temporaries."""


class Block(NamedTuple):
    """How many weights stand in a block, in how many bytes, and where in it the float16 scales lie (byte offsets)."""

    elements: int
    bytes: int
    scales: tuple[int, ...] = ()


BLOCKS = {
    "F16": Block(1, 2),
    "BF16": Block(1, 2),
    "Q4_0": Block(32, 18, (0,)),
    "Q4_1": Block(32, 20, (0, 2)),
    "Q5_0": Block(32, 22, (0,)),
    "Q5_1": Block(32, 24, (0, 2)),
    "Q8_0": Block(32, 34, (0,)),
    "Q2_K": Block(256, 84, (80, 82)),
    "Q3_K": Block(256, 110, (108,)),
    "Q4_K": Block(256, 144, (0, 2)),
    "Q5_K": Block(256, 176, (0, 2)),
    "Q6_K": Block(256, 210, (208,)),
    "IQ4_NL": Block(32, 18, (0,)),
    "IQ4_XS": Block(256, 136, (0,)),
}
"""The types that `dequantize` takes."""
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen values of the IQ4 types."""


def packed_columns(kind: str, columns: int) -> int:
    """Return the bytes of a row; raises ValueError where a row is no whole number of blocks."""
    block = BLOCKS[kind]
    if columns % block.elements:
        raise ValueError(f"{kind} packs {block.elements} weights at a time, and a row of {columns} is no multiple")
    return columns // block.elements * block.bytes


# Bytes to weights -----------------------------------------------------------------------------------------------------


def dequantize(packed: Tensor, kind: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights (rows, columns) of uint8 (rows, bytes per row), computed in float32.

    Raises:
        ValueError: a row that is no whole number of blocks.
        KeyError: a type that is not in `BLOCKS`.
    """
    block = BLOCKS[kind]
    rows, width = packed.shape
    if width % block.bytes:
        raise ValueError(f"{kind} rows are made of blocks of {block.bytes} bytes, and {width} is no multiple")
    columns = width // block.bytes * block.elements
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = packed[first : first + step].contiguous()
        out[first : first + step] = _DECODERS[kind](part.view(-1, block.bytes)).view(part.shape[0], columns)
    return out


def _half(blocks: Tensor, offset: int) -> Tensor:
    """Return the float16 at a byte offset of every block as float32 (n, 1)."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(values: Tensor) -> Tensor:
    """Return the low nibbles, then the high ones: (..., n) to (..., 2n)."""
    return torch.cat([values & 15, values >> 4], dim=-1)


def _bits(values: Tensor, *, width: int) -> Tensor:
    """Return the fields of `width` bits of each byte, lowest first: (..., n) to (..., 8 / width, n)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    return values.unsqueeze(-2) >> shifts[:, None] & (1 << width) - 1


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _fifth(blocks: Tensor) -> Tensor:
    """Return the fifth bits (n, 32), worth 16, of four bytes."""
    return _bits(blocks, width=1).transpose(1, 2).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6])
    return _half(blocks, 0) * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])
    return _half(blocks, 0) * q.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _two_bits(packed: Tensor) -> Tensor:
    """Return 256 two-bit values (n, 16, 16) of 64 bytes: halves of 128, of which each field of the bytes fills 32."""
    return _bits(packed.reshape(-1, 2, 32), width=2).reshape(-1, 16, 16)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q = blocks[:, :16], _two_bits(blocks[:, 16:80]).float()
    scale, least = _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float()
    return (scale[..., None] * q - least[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high = _bits(blocks[:, :32], width=1).reshape(-1, 16, 16)  # a bit that is not set subtracts 4
    low, packed = _two_bits(blocks[:, 32:96]), blocks[:, 96:108]
    tops = _bits(packed[:, 8:], width=2).flatten(1)
    scales = (_nibbles(packed[:, :8]) | tops << 4).float() - 32
    q = low.float() - 4 + 4 * high.float()
    return ((_half(blocks, 108) * scales)[..., None] * q).flatten(1)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minima (n, 8) float32 of twelve bytes."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, last & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, last >> 4 | second >> 6 << 4], dim=1)
    return scales.float(), minima.float()


def _with_minima(blocks: Tensor, q: Tensor) -> Tensor:
    """Return what eight groups of 32 values (n, 8, 32) mean, with scales and minima at bytes 4 to 15."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scale, least = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale[..., None] * q.float() - least[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _with_minima(blocks, low | _bits(blocks[:, 16:48], width=1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), width=2)  # (n, 2, 4, 32)
    q = (low | high << 4).float() - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * q.view(-1, 16, 16)).flatten(1)


def _nonlinear(packed: Tensor) -> Tensor:
    """Return the values (..., 2n) that the nibbles of (..., n) bytes stand for."""
    table = torch.tensor(NONLINEAR, dtype=torch.float32, device=packed.device)
    return table[_nibbles(packed).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nonlinear(blocks[:, 2:])


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = _bits(blocks[:, 2:4], width=2).transpose(1, 2).flatten(1)
    low = _bits(blocks[:, 4:8], width=4).transpose(1, 2).flatten(1)
    scale = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return (scale[..., None] * _nonlinear(blocks[:, 8:].reshape(-1, 8, 16))).flatten(1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def is_finite(packed: Tensor, kind: str) -> Tensor:
    """Return, as a boolean on its device, whether no scale of the blocks (rows, bytes) is NaN or infinite."""
    block = BLOCKS[kind]
    if not block.scales:
        return dequantize(packed, kind).isfinite().all()
    blocks = packed.reshape(-1, block.bytes)
    return torch.stack([_half(blocks, offset).isfinite().all() for offset in block.scales]).all()


# Weights to bytes -----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, kind: str) -> Tensor:
    """Return the bytes (rows, bytes per row) of a weight (rows, columns), as ggml's own quantiser rounds.

    Raises:
        ValueError: a type that is only read, a row that is no whole number of blocks.
    """
    encode = _ENCODERS.get(kind)
    if encode is None:
        raise ValueError(f"{kind} cannot be written; choose one of {', '.join(_ENCODERS)}")
    width = packed_columns(kind, weight.shape[1])
    out = torch.empty(weight.shape[0], width, dtype=torch.uint8, device=weight.device)
    for rows in _steps(weight):
        part = weight[rows].detach().float().reshape(-1, BLOCKS[kind].elements)
        out[rows] = encode(part).view(-1, width)
    return out


def _steps(weight: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(weight.shape[1], 1))
    return (slice(first, first + step) for first in range(0, weight.shape[0], step))


def _bytes(scale: Tensor) -> Tensor:
    """Return scales (n, 1) as float16, two bytes each."""
    return scale.half().view(torch.uint8)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale by ggml's way, which multiplies by the reciprocal; zero where the scale is."""
    return x * torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())


def _to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().view(torch.uint8)


def _to_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    exact = _scaled(x, scale)
    q = exact.sign() * (exact.abs() + 0.5).floor()  # halves away from zero
    return torch.cat([_bytes(scale), q.to(torch.int8).view(torch.uint8)], dim=1)


def _signed(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the scale that puts the largest weight of a block, with its sign, at -levels, and values 0 to 2 levels."""
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = largest / -levels
    q = (_scaled(x, scale) + (levels + 0.5)).trunc().clamp(0, 2 * levels - 1)
    return scale, q.to(torch.uint8)


def _paired(q: Tensor) -> Tensor:
    return q[:, :16] & 15 | (q[:, 16:] & 15) << 4


def _to_q4_0(x: Tensor) -> Tensor:
    scale, q = _signed(x, 8)
    return torch.cat([_bytes(scale), _paired(q)], dim=1)


def _to_q5_0(x: Tensor) -> Tensor:
    scale, q = _signed(x, 16)
    places = (1 << torch.arange(8, device=x.device)).to(torch.uint8)
    fifth = ((q >> 4).view(-1, 4, 8) * places).sum(-1, dtype=torch.uint8)
    return torch.cat([_bytes(scale), fifth, _paired(q)], dim=1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
    "Q5_0": _to_q5_0,
    "BF16": _to_bf16,
}
