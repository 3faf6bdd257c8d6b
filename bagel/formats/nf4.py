"""Weights of 4 bits in blocks of 64 values: NF4 (arXiv 2305.14314) and FP4, laid out as bitsandbytes stores them.

A weight is flattened row by row. Each block of 64 values keeps its greatest magnitude and, for each value, the index of
the nearest of 16 fixed values; two indices share a byte, the first in its high half. With double quantisation the
magnitudes are stored in 8 bits themselves, in blocks of 256. Letters: N values of a weight.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
"""Values that share a magnitude, and magnitudes that share a greater one."""
CHUNK = 1 << 22
"""Values that are quantised or expanded at a time: bounds the temporary memory to some 80 MiB."""
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204),
        -0.25,
    ),
}
"""What the 16 indices stand for, as parts of the greatest magnitude of a block."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Nested(NamedTuple):
    """Magnitudes in 8 bits: magnitude i is `table[codes[i]] * absmax[i // 256] + offset`, in float32."""

    codes: Tensor  # (n,) uint8
    absmax: Tensor  # (ceil(n / 256),) float32
    table: Tensor  # (256,) float32
    offset: Tensor  # () float32


class Blocks(NamedTuple):
    """A weight in 4 bits."""

    codes: Tensor  # (ceil(N / 2),) uint8
    absmax: Tensor | Nested  # (ceil(N / 64),) float32
    codebook: Tensor  # (16,) float32
    kind: str  # the codebook's name
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before


def quantize(weight: Tensor, kind: str = "nf4", *, double: bool = False) -> Blocks:
    """Quantise a weight of any shape on its device, to the bits that bitsandbytes gives.

    Args:
        weight: float32, bfloat16 or float16.
        kind: a key of `CODEBOOKS`.
        double: quantise the magnitudes of the blocks too: 4.13 bits per value in place of 4.5.

    Raises:
        ValueError: an unknown kind, another type, or values that are NaN or infinite.
    """
    if kind not in CODEBOOKS:
        raise ValueError(f"there is no 4-bit format named {kind!r}; there are {', '.join(CODEBOOKS)}")
    if weight.dtype not in DTYPES.values():
        raise ValueError(f"a weight to quantise must be {', '.join(DTYPES)}, got {weight.dtype}")
    flat = weight.detach().reshape(-1)
    codes = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(math.ceil(flat.numel() / BLOCK), dtype=torch.float32)
    order, thresholds = _nearest(CODEBOOKS[kind], flat.device)
    for first in range(0, flat.numel(), CHUNK):
        blocks = _padded(flat[first : first + CHUNK].float(), BLOCK)
        most = blocks.abs().amax(dim=1)
        indices = order[torch.bucketize(_parts(blocks, most), thresholds, out_int32=True)].view(-1, 2)
        bytes_ = indices[:, 0] << 4 | indices[:, 1]
        absmax[first // BLOCK : first // BLOCK + len(most)] = most
        codes[first // 2 : (first + CHUNK) // 2] = bytes_[: (min(CHUNK, flat.numel() - first) + 1) // 2]
    if not absmax.isfinite().all():
        raise ValueError("a weight with values that are NaN or infinite cannot be quantised; fetch the file again")
    codebook = torch.tensor(CODEBOOKS[kind], dtype=torch.float32, device=weight.device)
    magnitudes = quantize_absmax(absmax) if double else absmax
    return Blocks(codes, magnitudes, codebook, kind, tuple(weight.shape), weight.dtype)


def dequantize(blocks: Blocks, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
    """Return the weight, or some rows of it, in a type, by default that of the weight before.

    Each value is one product in float32, rounded once to the type.
    """
    dtype, width = dtype or blocks.dtype, math.prod(blocks.shape[1:])
    first, stop, _ = (rows or slice(None)).indices(blocks.shape[0])
    out = torch.empty(max(stop - first, 0) * width, dtype=dtype, device=blocks.codes.device)
    book = blocks.codebook
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)  # of each byte, both values
    start, end = first * width, stop * width
    for at in range(start // BLOCK * BLOCK, end, CHUNK):
        last = min(at + CHUNK, end)
        codes = blocks.codes[at // 2 : (last + 1) // 2].int()
        absmax = dequantize_absmax(blocks.absmax, at // BLOCK, math.ceil(last / BLOCK))
        values = _padded(pairs[codes].view(-1), BLOCK) * absmax[:, None]
        begin = max(at, start)
        out[begin - start : last - start] = values.view(-1)[begin - at : last - at]
    return out.view(-1, *blocks.shape[1:])


def join(parts: Sequence[Blocks]) -> Blocks | None:
    """Return weights one above the other as one; None where a block would span two, or magnitudes have other scales."""
    first, whole = parts[0], all(math.prod(part.shape) % BLOCK == 0 for part in parts[:-1])
    absmax = [part.absmax for part in parts if isinstance(part.absmax, Tensor)]
    alike = all((part.kind, part.shape[1:], part.dtype) == (first.kind, first.shape[1:], first.dtype) for part in parts)
    if not whole or not alike or len(absmax) < len(parts):
        return None
    codes, shape = torch.cat([part.codes for part in parts]), (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first._replace(codes=codes, absmax=torch.cat(absmax), shape=shape)


def quantize_absmax(absmax: Tensor) -> Nested:
    """Return magnitudes (n,) in 8 bits, by the distance to their mean."""
    table, offset = dynamic_table().to(absmax.device), absmax.mean()
    _, thresholds = _nearest(tuple(table.tolist()), absmax.device)
    blocks = _padded(absmax - offset, NESTED_BLOCK)
    most = blocks.abs().amax(dim=1)
    codes = torch.bucketize(_parts(blocks, most), thresholds, out_int32=True).to(torch.uint8)
    return Nested(codes.view(-1)[: len(absmax)].contiguous(), most, table, offset)


def dequantize_absmax(absmax: Tensor | Nested, first: int = 0, last: int | None = None) -> Tensor:
    """Return the magnitudes from `first` to before `last` in float32."""
    if isinstance(absmax, Tensor):
        return absmax[first:last]
    codes = absmax.codes[first:last]
    block = torch.arange(first, first + len(codes), device=codes.device) // NESTED_BLOCK
    return absmax.table[codes.int()] * absmax.absmax[block] + absmax.offset


@functools.cache
def dynamic_table() -> Tensor:
    """Return the 256 values (256,) float32 of the 8-bit magnitudes: finer towards zero (arXiv 1511.04561)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


# Files ----------------------------------------------------------------------------------------------------------------


def to_file(name: str, blocks: Blocks) -> dict[str, Tensor]:
    """Return the tensors under which a checkpoint holds the weight `name` ("....weight")."""
    state: dict[str, Any] = {"quant_type": blocks.kind, "blocksize": BLOCK}
    state |= {"dtype": str(blocks.dtype).removeprefix("torch."), "shape": list(blocks.shape)}
    found = {name: blocks.codes.view(-1, 1), f"{name}.quant_map": blocks.codebook}
    if isinstance(nested := blocks.absmax, Nested):
        found |= {f"{name}.absmax": nested.codes, f"{name}.nested_absmax": nested.absmax}
        found |= {f"{name}.nested_quant_map": nested.table}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
    else:
        found[f"{name}.absmax"] = nested
    text = json.dumps(state).encode()
    return found | {f"{name}.quant_state.bitsandbytes__{blocks.kind}": torch.tensor(list(text), dtype=torch.uint8)}


def from_file(name: str, tensors: Mapping[str, Tensor]) -> Blocks:
    """Return the weight `name` of a checkpoint in 4 bits.

    Raises:
        ValueError: the tensors of a weight are not all there, or do not fit each other.
    """
    state, kind = _state(name, tensors)
    shape, codes = tuple(state["shape"]), _tensor(tensors, name, torch.uint8).reshape(-1)
    count = math.prod(shape)
    magnitudes = math.ceil(count / BLOCK)
    book = _tensor(tensors, f"{name}.quant_map", torch.float32)
    nested = "nested_offset" in state
    absmax: Any = _tensor(tensors, f"{name}.absmax", torch.uint8 if nested else torch.float32)
    sizes = {name: (codes, (count + 1) // 2), f"{name}.absmax": (absmax, magnitudes), f"{name}.quant_map": (book, 16)}
    if nested:
        greater = _tensor(tensors, f"{name}.nested_absmax", torch.float32)
        table = _tensor(tensors, f"{name}.nested_quant_map", torch.float32)
        sizes |= {f"{name}.nested_absmax": (greater, math.ceil(magnitudes / NESTED_BLOCK))}
        sizes |= {f"{name}.nested_quant_map": (table, 256)}
        absmax = Nested(absmax, greater, table, torch.tensor(state["nested_offset"], dtype=torch.float32))
    for key, (tensor, size) in sizes.items():
        if tensor.numel() != size:
            raise ValueError(f"{key} has {tensor.numel()} elements where a weight of shape {shape} has {size}")
    if not torch.allclose(book, torch.tensor(CODEBOOKS[kind]), rtol=0, atol=1e-4):
        raise ValueError(f"{name}.quant_map does not hold the 16 values of {kind}; fetch the file again")
    if isinstance(absmax, Tensor) and bool((absmax < 0).any()):
        raise ValueError(f"{name}.absmax has magnitudes that are negative; fetch the file again")
    return Blocks(codes, absmax, book, kind, shape, DTYPES[state["dtype"]])


def _state(name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    for kind in CODEBOOKS:
        if (text := tensors.get(f"{name}.quant_state.bitsandbytes__{kind}")) is not None:
            try:
                state = json.loads(bytes(text.tolist()))
                sizes = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK)
                known = all(isinstance(side, int) for side in state["shape"]) and state["dtype"] in DTYPES
                known &= isinstance(state.get("nested_offset", 0.0), float | int)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"the description of {name} in 4 bits cannot be read ({error!r})") from error
            if sizes != (BLOCK, NESTED_BLOCK) or not known:
                raise ValueError(f"{name} is stored as {state}; only blocks of {BLOCK} and {NESTED_BLOCK} can be read")
            return state, kind
    raise ValueError(f"{name} has no description of its 4 bits ({name}.quant_state.bitsandbytes__nf4 or __fp4)")


def _tensor(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    if (tensor := tensors.get(key)) is None or tensor.dtype != dtype:
        raise ValueError(f"{key} should be {dtype}, and is {'missing' if tensor is None else tensor.dtype}")
    return tensor.flatten()


# ----------------------------------------------------------------------------------------------------------------------


def _nearest(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return indices in ascending order of their values, and the float32 midpoints between neighbours."""
    ascending, order = torch.tensor(values, dtype=torch.float32).sort(stable=True)
    middle = (ascending[1:].double() + ascending[:-1].double()) / 2
    return order.to(device, torch.uint8), middle.float().to(device)


def _padded(flat: Tensor, size: int) -> Tensor:
    """Return values (n,) in blocks (ceil(n / size), size), the last filled with zeros."""
    rest = -flat.numel() % size
    return (torch.nn.functional.pad(flat, (0, rest)) if rest else flat).view(-1, size)


def _parts(blocks: Tensor, most: Tensor) -> Tensor:
    """Return blocks as parts of their greatest magnitude; a block of zeros stays one.

    By a reciprocal, as bitsandbytes does: a quotient falls on the other side of a midpoint now and then.
    """
    return blocks * torch.where(most > 0, most, 1).reciprocal()[:, None]
