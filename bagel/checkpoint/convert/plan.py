"""Which files a converted checkpoint will have, what stands in each, and how it is made and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bagel.checkpoint.convert.files import Layout, Piece, Place, place_of, write_file
from bagel.checkpoint.convert.formats import Format, is_packed, is_table, layout_of
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry, read_single
from bagel.checkpoint.load import DTYPES, STEP_BYTES
from bagel.checkpoint.sources import Source, TensorReader, source_of
from bagel.checkpoint.sources.gguf import GGUFSource
from bagel.formats import dfloat11, gguf


class Planned(Protocol):
    """A file to be written."""

    name: str

    @property
    def nbytes(self) -> int:
        """About how many bytes it will have."""
        ...

    def write(self, path: Path, source: Source) -> None:
        """Write it, whole."""
        ...

    def verify(self, path: Path, source: Source) -> None:
        """Read it back and compare every tensor; raise CheckpointError for one that is not what it should be."""
        ...

    def names(self) -> list[str]:
        """The tensors in it, for an index."""
        ...


def steps(shape: Sequence[int], itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of which one copy is small; each begins at a multiple of 64."""
    rows = shape[0] if shape else 1
    width = itemsize
    for side in shape[1:]:
        width *= side
    step = max(STEP_BYTES // max(width, 1) // 64 * 64, 64)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def whole(source: Source, key: str) -> Tensor:
    """Return a tensor on the host, in memory of its own."""
    entry = source.entries[key]
    out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    for first, last in steps(entry.shape):
        out[first:last] = source.read(key, first, last)
    return out


# Safetensors and GGUF -------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """Tensors of a format whose sizes are known beforehand."""

    name: str
    format: Format
    packed: dict[str, Layout]
    plain: dict[str, Place]

    @property
    def layout(self) -> Layout:
        """Every tensor of the file."""
        return {name: place for layout in self.packed.values() for name, place in layout.items()} | self.plain

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(place.nbytes for place in self.layout.values())

    def names(self) -> list[str]:
        """The tensors in it."""
        return list(self.layout)

    def write(self, path: Path, source: Source) -> None:
        """Write it, a tensor at a time."""
        write_file(path, self.layout, self._pieces(source), gguf=bool(self.format.kind))

    def _pieces(self, source: Source) -> Iterator[Piece]:
        for key in source.in_order([*self.packed, *self.plain]):
            if key in self.packed:
                try:
                    made = self.format.encode(key, whole(source, key))
                except ValueError as error:
                    raise CheckpointError(f"{key} cannot be stored as {self.format.name}: {error}") from error
                yield from (Piece(name, 0, tensor) for name, tensor in made.items())
            else:
                dtype, offset = DTYPES[self.plain[key].kind], 0
                for first, last in steps(self.plain[key].shape):
                    part = source.read(key, first, last).to(dtype)
                    yield Piece(key, offset, part)
                    offset += part.nbytes

    def verify(self, path: Path, source: Source) -> None:
        """Compare every tensor with its source: exactly, or within the format's own error."""
        written = GGUFSource(path) if self.format.kind else source_of(read_single(path))
        for key in written.in_order([*self.packed, *self.plain]):
            exact = self.format.bound is None or key in self.plain
            (_same if exact else self._near)(key, written, source, path)

    def _near(self, key: str, written: Source, source: Source, path: Path) -> None:
        assert self.format.bound is not None
        shape = source.entries[key].shape
        largest = max(float(source.read(key, *some).abs().max()) for some in steps(shape))
        for some in steps(shape):
            wanted = source.read(key, *some).float()
            off = (written.read(key, *some).float() - wanted).abs()
            if not bool((off <= self.format.bound(wanted, largest)).all()):
                raise _differs(path, key)


def _same(key: str, written: Source, source: Source, path: Path) -> None:
    for some in steps(source.entries[key].shape):
        found = written.read(key, *some).clone()
        if not torch.equal(found, source.read(key, *some).to(found.dtype)):
            raise _differs(path, key)


def _differs(path: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{key} reads back from {path.parent} differently than it was written: its memory or disk is at fault, or the "
        "source has changed; nothing of this file is kept"
    )


def shards(
    source: Source, keys: Sequence[str], fmt: Format, *, max_bytes: int, every_linear: bool = False
) -> list[Planned]:
    """Return the shards of a format, each of at most so many bytes of tensors if more than one weight is in it."""
    found: list[Shard] = [Shard("", fmt, {}, {})]
    total = 0
    for key in keys:
        entry = source.entries[key]
        layout = _packed(fmt, key, entry, every_linear=every_linear)
        place = None if layout else _plain(fmt, key, entry)
        nbytes = sum(p.nbytes for p in layout.values()) if layout else place.nbytes if place else 0
        if total and total + nbytes > max_bytes and not fmt.kind:
            found.append(Shard("", fmt, {}, {}))
            total = 0
        total += nbytes
        if layout:
            found[-1].packed[key] = layout
        elif place:
            found[-1].plain[key] = place
    for number, shard in enumerate(found, 1):
        single = f"bagel-{fmt.kind.lower()}.gguf" if fmt.kind else "model.safetensors"
        shard.name = single if len(found) == 1 else f"model-{number:05d}-of-{len(found):05d}.safetensors"
    return [*found]


def _packed(fmt: Format, key: str, entry: TensorEntry, *, every_linear: bool) -> Layout | None:
    if not is_packed(key, entry.shape, every_linear=every_linear):
        return None
    if fmt.kind and entry.shape[1] % gguf.BLOCKS[fmt.kind].elements:
        return None  # rows that are no whole blocks stay as they are
    return layout_of(fmt, key, entry.shape)


def _plain(fmt: Format, key: str, entry: TensorEntry) -> Place:
    kind = entry.dtype
    if fmt.kind and len(entry.shape) == 1:
        kind = "F32"  # as every reader of GGUF wants vectors
    elif fmt.name in ("bf16", "gguf-bf16") and not is_table(key):
        kind = "BF16"
    elif fmt.kind and kind == "F64":
        kind = "F32"
    return Place(kind, entry.shape, entry.numel * DTYPES[kind].itemsize)


# DFloat11 -------------------------------------------------------------------------------------------------------------


@dataclass
class UnitFile:
    """A DFloat11 unit and the plain tensors beside it; sizes are known once it is encoded."""

    name: str
    file: dfloat11.File
    nbytes: int

    def names(self) -> list[str]:
        """None: no index lists units."""
        return []

    def write(self, path: Path, source: Source) -> None:
        """Encode the unit, which is then in memory whole, and write it."""
        tensors = {key: whole(source, key) for key in self.file.plain}
        if self.file.prefix:
            try:
                unit = dfloat11.encode([whole(source, key) for key in self.file.weights])
            except ValueError as error:
                raise CheckpointError(f"{self.file.prefix} cannot be stored as DFloat11: {error}") from error
            tensors |= dfloat11.unit_tensors(self.file.prefix, unit)
        layout = {name: place_of(tensor) for name, tensor in tensors.items()}
        write_file(path, layout, (Piece(name, 0, tensor) for name, tensor in tensors.items()))

    def verify(self, path: Path, source: Source) -> None:
        """Decode the unit and compare every bit."""
        reader = TensorReader(read_single(path))
        for key in self.file.plain:
            if not torch.equal(reader.tensor(key), whole(source, key)):
                raise _differs(path, key)
        if not self.file.prefix:
            return
        try:
            opened = dfloat11.open_unit(reader.tensor, self.file.prefix, self.file.weights)
            for key in self.file.weights:
                wanted = whole(source, key).flatten().view(torch.int16)
                if not torch.equal(opened.dense(key).view(torch.int16), wanted):
                    raise _differs(path, key)
        except ValueError as error:
            raise CheckpointError(f"{path.parent}: {error}") from error


def unit_files(source: Source, keys: Sequence[str]) -> list[Planned]:
    """Return the files of a DFloat11 checkpoint; raises CheckpointError for weights that are not bfloat16."""
    files = dfloat11.files_for(keys)
    for file in files.values():
        other = [key for key in file.weights if source.entries[key].dtype != "BF16"]
        if other:
            raise CheckpointError(
                f"{source.label} holds {other[0]} as {source.entries[other[0]].dtype}, and DFloat11 holds bfloat16 "
                "weights: convert --to bf16 first"
            )
    share = 11 / 16
    return [
        UnitFile(
            name,
            file,
            round(
                sum(2 * source.entries[key].numel * share for key in file.weights)
                + sum(source.entries[key].numel * 4 for key in file.plain)
            ),
        )
        for name, file in files.items()
    ]
