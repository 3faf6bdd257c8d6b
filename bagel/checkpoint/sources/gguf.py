"""GGUF files: the header is read by the `gguf` package, tensors by offset, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry, stamp
from bagel.formats import gguf

MAGIC = b"GGUF"
PLAIN = {
    "F64": ("F64", torch.float64),
    "F32": ("F32", torch.float32),
    "F16": ("F16", torch.float16),
    "BF16": ("BF16", torch.bfloat16),
}
"""Types that are no blocks: their names in safetensors, and torch's."""
SHAPE_FIELD = "comfy.gguf.orig_shape."
"""Before the name of a tensor that is stored in another shape: the field that holds its own."""


class Blocks(NamedTuple):
    """A matrix as GGUF blocks, uint8 (rows, bytes per row), and their type."""

    packed: Tensor
    kind: str


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file: bytes from `offset`, in `rows` of `width` bytes each."""

    offset: int
    rows: int
    width: int
    kind: str
    reshaped: bool


class GGUFSource:
    """A model in one GGUF file.

    Args:
        file: the file; its tensors have the official names, perhaps behind one of the prefixes.
        prefixes: what may stand before all names.

    Raises:
        CheckpointError: a damaged file, big-endian numbers, the package is not installed.
    """

    format = "gguf"

    def __init__(self, file: Path, *, prefixes: tuple[str, ...] = ()) -> None:
        self.file, self.label, self.mark = file, file.name, stamp(file)
        reader = _open(file)
        _check_layout(reader, file)
        prefix = next((p for p in prefixes if any(t.name.startswith(p) for t in reader.tensors)), "")
        self.entries: dict[str, TensorEntry] = {}
        self.places: dict[str, _Place] = {}
        for tensor in reader.tensors:
            key = tensor.name.removeprefix(prefix)
            if key in self.entries:
                raise CheckpointError(f"{file} holds {key} twice, with the prefix {prefix} and without; remove one")
            shape = _shape(reader, tensor)
            kind, size = tensor.tensor_type.name, int(tensor.n_bytes)
            dtype = PLAIN[kind][0] if kind in PLAIN else "BF16"
            self.entries[key] = TensorEntry(file, shape, dtype, "" if kind in PLAIN else kind, size)
            stored = _stored(tensor)
            rows = math.prod(stored[:-1]) if len(stored) > 1 else math.prod(stored) if kind in PLAIN else 1
            width = size // max(rows, 1)
            self.places[key] = _Place(int(tensor.data_offset), rows, width, kind, reshaped=stored != shape)
        self._last: tuple[str, Tensor | None] = ("", None)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.file,)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Return keys as they lie in the file."""
        return sorted(keys, key=lambda key: self.places[key].offset)

    def read(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor on the host, decoded."""
        place, shape = self.places[key], self.entries[key].shape
        if place.reshaped or (len(shape) != 2 and place.kind not in PLAIN):
            if self._last[0] != key:
                self._last = (key, _decoded(self._bytes(key, 0, place.rows), place.kind).reshape(shape))
            whole = self._last[1]
            assert whole is not None
            return whole[first:last]
        lines = place.rows // max(shape[0], 1)  # of the file for each of ours; more than one beyond two axes
        part = _decoded(self._bytes(key, first * lines, last * lines), place.kind)
        return part.reshape(last - first, *shape[1:])

    def keeps(self, key: str) -> bool:
        """Whether a tensor is a matrix of blocks by which a linear layer can multiply."""
        place = self.places[key]
        blocks = place.kind in gguf.BLOCKS and place.kind not in PLAIN
        return blocks and not place.reshaped and len(self.entries[key].shape) == 2

    def stored(self, key: str) -> Blocks:
        """Return the blocks of a matrix."""
        place = self.places[key]
        return Blocks(self._bytes(key, 0, place.rows), place.kind)

    def close(self) -> None:
        """Let go of what was read last."""
        self._last = ("", None)

    def _bytes(self, key: str, first: int, last: int) -> Tensor:
        place = self.places[key]
        if stamp(self.file) != self.mark:
            raise CheckpointError(f"{self.file} changed since it was opened; load again once it is written")
        count = (last - first) * place.width
        with self.file.open("rb") as file:
            file.seek(place.offset + first * place.width)
            data = np.fromfile(file, np.uint8, count)
        if data.size != count:
            raise CheckpointError(f"{self.file} ends before {key} does; fetch it again")
        return torch.from_numpy(data).view(last - first, place.width)


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"{file} is read by the package gguf: pip install gguf") from error
    try:
        with np.errstate(all="ignore"):
            reader = GGUFReader(file)
        if reader.byte_order == "S":
            raise CheckpointError(f"{file} holds big-endian numbers; convert it to little-endian, as almost all are")
        return reader
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged header makes the package do
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        size = stamp(file)[0]
        raise CheckpointError(
            f"{file} ({size} bytes) is no whole GGUF file ({reason}): truncated, damaged or of an unknown type; fetch "
            "it again"
        ) from error


def _check_layout(reader: Any, file: Path) -> None:
    """Raise CheckpointError unless tensors follow each other without holes, as ggml too demands.

    A damaged header would otherwise make one tensor of the bytes of another.
    """
    end, size = int(reader.data_offset), stamp(file)[0]
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        if start != end or start + int(tensor.n_bytes) > size:
            raise CheckpointError(
                f"{file} says {tensor.name} has {int(tensor.n_bytes)} bytes from {start} on, where {end} was to be "
                f"expected, of {size}: its header is damaged, fetch it again"
            )
        end = start + -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment


def _stored(tensor: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in reversed(tensor.shape.tolist()))  # files name the innermost side first


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    field = reader.fields.get(SHAPE_FIELD + tensor.name)
    stored = _stored(tensor)
    if field is None:
        return stored
    shape = tuple(int(field.parts[index][0]) for index in field.data)
    if math.prod(shape) != math.prod(stored):
        raise CheckpointError(f"{reader.data.filename} says {tensor.name} has shape {shape}, but stores {stored}")
    return shape


def _decoded(packed: Tensor, kind: str) -> Tensor:
    """Return the weights (rows, columns) of uint8 (rows, bytes per row)."""
    if kind in PLAIN:
        return packed.reshape(-1).view(PLAIN[kind][1]).view(packed.shape[0], -1)
    if kind in gguf.BLOCKS:
        return gguf.dequantize(packed, kind)
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(np.ascontiguousarray(quants.dequantize(packed.numpy(), GGMLQuantizationType[kind])))
