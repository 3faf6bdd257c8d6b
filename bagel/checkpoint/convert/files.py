"""Files of tensors whose headers come first: written piece by piece at known places, in any order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bagel.checkpoint.export import DTYPE_NAMES
from bagel.checkpoint.load import STEP_BYTES

NAMES = {
    **DTYPE_NAMES,
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}
GGUF_VERSION, ALIGNMENT, STRING = 3, 32, 8
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "BF16": 30}
"""ggml's numbers of the types that are written."""


class Place(NamedTuple):
    """A tensor of a file: its type in the file's own words, its shape and its bytes."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int


class Piece(NamedTuple):
    """Some values of the tensor `name`, to be written from byte `offset` of it."""

    name: str
    offset: int
    values: Tensor


Layout = dict[str, Place]


def place_of(tensor: Tensor) -> Place:
    """Return how safetensors describes a tensor, which may be on the meta device."""
    return Place(NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def write_file(path: Path, layout: Layout, pieces: Iterable[Piece], *, gguf: bool = False) -> None:
    """Write a safetensors or GGUF file and wait until the disk has it."""
    header, offsets = (gguf_header if gguf else safetensors_header)(layout)
    written = dict.fromkeys(layout, 0)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max((offsets[name] + place.nbytes for name, place in layout.items()), default=len(header)))
        for name, offset, values in pieces:
            file.seek(offsets[name] + offset)
            for part in _bytes(values):
                file.write(part)
                written[name] += len(part)
        file.flush()
        os.fsync(file.fileno())
    wrong = [name for name, place in layout.items() if written[name] != place.nbytes]
    assert not wrong, f"{wrong[0]} has {layout[wrong[0]].nbytes} bytes, of which {written[wrong[0]]} were written"


def safetensors_header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file and where in the file each tensor begins: widest types first."""
    values = {"F64": 8, "F32": 4, "I64": 8, "BF16": 2, "F16": 2}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, place in sorted(layout.items(), key=lambda item: (-values.get(item[1].kind, 1), item[0])):
        starts[name], end = end, end + place.nbytes
        header[name] = {"dtype": place.kind, "shape": list(place.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def gguf_header(layout: Layout, *, fields: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Return the header of a GGUF file (version 3) and where in the file each tensor begins."""
    said = {"general.architecture": "bagel"} | dict(fields or {})
    out = b"GGUF" + _number(GGUF_VERSION, 4) + _number(len(layout), 8) + _number(len(said), 8)
    for field, value in said.items():
        out += _string(field) + _number(STRING, 4) + _string(value)
    starts, end = {}, 0
    for name, place in layout.items():
        starts[name] = end
        sides = b"".join(_number(side, 8) for side in reversed(place.shape))  # the innermost first
        out += _string(name) + _number(len(place.shape), 4) + sides
        out += _number(GGUF_TYPES[place.kind], 4) + _number(end, 8)
        end += place.nbytes + -place.nbytes % ALIGNMENT
    out += bytes(-len(out) % ALIGNMENT)
    return out, {name: len(out) + start for name, start in starts.items()}


def _number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def _string(text: str) -> bytes:
    return _number(len(text.encode()), 8) + text.encode()


def _bytes(values: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, a part at a time."""
    if values.numel() == 0:
        return
    flat = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    for part in flat.split(STEP_BYTES):
        yield part.numpy().data.cast("B")
