"""DFloat11 releases: units of Huffman-coded bfloat16 weights, each holding several matrices; see `bagel.formats`.

A unit says how many weights each of its matrices has, but not their shapes: those follow from the plain tensors beside.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import UNIT_KEY, UNITS_FIELD, TensorEntry
from bagel.checkpoint.keys import find_row
from bagel.checkpoint.measure import measure
from bagel.checkpoint.sources.base import Packed, TensorReader
from bagel.formats import dfloat11
from bagel.formats.dfloat11.files import LAYER as MATRICES

PARTS = tuple(f".{part}" for part in dfloat11.Unit._fields)
LAYER = "language_model.model.layers."
TABLES = ("embed_tokens.weight",)
"""What is looked up and not multiplied by; it becomes dense, as expanding it for every look-up would cost too much."""
VIT_LAYERS = "vit_model.vision_model.encoder.layers."


class UnitRange(NamedTuple):
    """Matrices that follow each other in a unit: together a weight (rows, columns)."""

    opened: dfloat11.Opened
    names: tuple[str, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class UnitMatrix:
    """One matrix of a unit."""

    keys: tuple[str, ...]
    prefix: str
    name: str
    names: tuple[str, ...]
    entry: TensorEntry
    keeps: bool
    format: str = "dfloat11"

    def rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Return rows, decoded."""
        opened = self._opened(reader)
        start, columns = opened.ranges[self.name][0], math.prod(self.entry.shape[1:])
        if first == last:
            return torch.empty(0, *self.entry.shape[1:], dtype=torch.bfloat16)
        try:
            weights = dfloat11.decode(opened.unit, start + first * columns, start + last * columns)
        except ValueError as error:
            raise CheckpointError(f"{self.entry.file} cannot be read at {self.name}: {error}") from error
        return weights.view(last - first, *self.entry.shape[1:])

    def stored(self, reader: TensorReader) -> UnitRange:
        """Return its place in the unit."""
        rows, columns = self.entry.shape
        return UnitRange(self._opened(reader), (self.name,), (rows, columns))

    def _opened(self, reader: TensorReader) -> dfloat11.Opened:
        def open_unit() -> dfloat11.Opened:
            try:
                return dfloat11.open_unit(reader.tensor, self.prefix, self.names)
            except ValueError as error:
                raise CheckpointError(f"{self.entry.file}: {error}") from error

        return reader.remembered(self.prefix, open_unit)


def join(parts: Sequence[UnitRange]) -> UnitRange | None:
    """Return matrices as one range, if they follow each other in one unit."""
    ranges = [(part.opened.ranges[part.names[0]][0], part.opened.ranges[part.names[-1]][1]) for part in parts]
    apart = any(one[1] != other[0] for one, other in itertools.pairwise(ranges))
    if apart or any(part.opened is not parts[0].opened for part in parts):
        return None
    names = tuple(name for part in parts for name in part.names)
    return UnitRange(parts[0].opened, names, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def find(entries: Mapping[str, TensorEntry], reader: TensorReader) -> dict[str, Packed]:
    """Return the matrices of all units, by key; raises CheckpointError for units that cannot be understood."""
    prefixes = [key.removesuffix(UNIT_KEY) for key in entries if key.endswith(UNIT_KEY)]
    if not prefixes:
        return {}
    folder = entries[prefixes[0] + UNIT_KEY].file.parent
    try:
        units = dfloat11.units_of(entries, _patterns(folder, entries))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    counts: dict[str, int] = {}
    for prefix, names in units.items():
        counts |= dict(zip(names, _counts(prefix, names, entries, reader), strict=True))
    shapes = _shapes(counts, {key: entry.shape for key, entry in entries.items() if not key.endswith(PARTS)})
    found: dict[str, Packed] = {}
    for prefix, names in units.items():
        keys = tuple(prefix + part for part in PARTS)
        size, total = sum(entries[key].nbytes for key in keys), sum(counts[name] for name in names)
        for name in names:
            share = round(size * counts[name] / total)
            entry = TensorEntry(entries[keys[0]].file, shapes[name], "BF16", "DF11", share)
            found[name] = UnitMatrix(keys, prefix, name, names, entry, keeps=not name.endswith(TABLES))
    return found


def _patterns(folder: Path, entries: Mapping[str, TensorEntry]) -> Mapping[str, Sequence[str]]:
    """Return what units hold: as the configuration says, else as in BAGEL's release."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):  # which `bagel.checkpoint.stated` tells about
        config = None
    if isinstance(config, dict) and UNITS_FIELD in config:
        return dfloat11.read_config(config)
    return dfloat11.patterns_for(_released(entries))


def _released(entries: Mapping[str, TensorEntry]) -> Iterable[str]:
    """Return the official keys that BAGEL's release would hold in these units."""
    for key, entry in entries.items():
        prefix = key.removesuffix(".split_positions")
        if key == prefix:
            if key.startswith(VIT_LAYERS) and key.endswith(".bias"):
                yield f"{key.removesuffix('.bias')}.weight"
            continue
        count = entry.numel + 1
        if prefix.startswith(LAYER):  # 14 matrices; 10 where the experts share their attention, 7 of one expert
            names = [name for name in MATRICES if "_moe_gen" not in name or count == 14]
            names += [name for name in MATRICES if "mlp_moe_gen" in name and count == 10]
            yield from (f"{prefix}.{name}.weight" for name in names)
        elif prefix == "vit_model":
            yield "vit_model.vision_model.embeddings.patch_embedding.weight"
        else:
            yield f"{prefix}.weight"


def _counts(
    prefix: str, names: Sequence[str], entries: Mapping[str, TensorEntry], reader: TensorReader
) -> Iterable[int]:
    """Return how many weights each matrix of a unit has."""
    splits, whole = entries[f"{prefix}.split_positions"], entries[f"{prefix}.sign_mantissa"].numel
    if splits.dtype != "I64" or splits.numel != len(names) - 1:
        raise CheckpointError(
            f"{splits.file} holds {splits.numel + 1} matrices in the DFloat11 unit {prefix}, wanted {len(names)}; "
            "fetch it and config.json again"
        )
    starts = [0, *(reader.tensor(f"{prefix}.split_positions").tolist() if splits.numel else []), whole]
    return [stop - start for start, stop in itertools.pairwise(starts)]


def _shapes(counts: Mapping[str, int], plain: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each matrix, from its number of weights and the sizes that plain tensors tell."""
    measured = measure(plain)
    sizes: dict[str, int] = {}

    def side(name: str | int) -> int | None:
        return name if isinstance(name, int) else measured.size(name) or sizes.get(name)

    shapes: dict[str, tuple[int, ...]] = {}
    for key, count in counts.items():
        found = find_row(key)
        if found is None or len(found[0].shape) != 2:
            shapes[key] = (count,)  # no weight of the model: it is named as such by whoever checks keys
            continue
        names = found[0].shape
        rows, columns = side(names[0]), side(names[1])
        if columns is None and rows:
            columns = count // rows
        rows = count // columns if columns else count
        shapes[key] = (rows, columns or 1)
        if rows * (columns or 1) != count:
            raise CheckpointError(
                f"the DFloat11 unit of {key} gives it {count} weights, which is no matrix with rows of {columns}"
            )
        sizes |= {name: size for name, size in zip(names, shapes[key], strict=True) if isinstance(name, str)}
    return shapes
