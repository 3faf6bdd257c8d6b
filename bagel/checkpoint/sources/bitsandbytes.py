"""Weights as bitsandbytes stores them: NF4 and FP4 in blocks of 64 values, LLM.int8() in rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry
from bagel.checkpoint.sources.base import Packed, TensorReader
from bagel.formats import int8, nf4

STATE = ".quant_state.bitsandbytes__"
NESTED = (".nested_absmax", ".nested_quant_map")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class FourBits:
    """A weight in 4 bits; see `bagel.formats.nf4`."""

    keys: tuple[str, ...]
    format: str
    entry: TensorEntry
    keeps: bool

    def rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Return rows, decoded."""
        blocks = reader.remembered(self.keys[0], lambda: self.stored(reader))
        return nf4.dequantize(blocks, torch.float32, rows=slice(first, last))

    def stored(self, reader: TensorReader) -> nf4.Blocks:
        """Return codes and magnitudes."""
        try:
            return nf4.from_file(self.keys[0], {key: reader.tensor(key) for key in self.keys})
        except ValueError as error:
            raise CheckpointError(f"{self.entry.file}: {error}") from error


@dataclass(frozen=True)
class EightBits:
    """A weight in 8-bit integers with a scale per row; see `bagel.formats.int8`."""

    keys: tuple[str, ...]
    entry: TensorEntry
    format: str = "int8"
    keeps: bool = True

    def rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Return rows, decoded."""
        return int8.dequantize(reader.remembered(self.keys[0], lambda: self.stored(reader)), rows=slice(first, last))

    def stored(self, reader: TensorReader) -> int8.Integers:
        """Return integers and scales."""
        try:
            return int8.from_file(self.keys[0], {key: reader.tensor(key) for key in self.keys})
        except ValueError as error:
            raise CheckpointError(f"{self.entry.file}: {error}") from error


def find(entries: Mapping[str, TensorEntry], reader: TensorReader) -> dict[str, Packed]:
    """Return the weights that bitsandbytes has quantised, by key; raises CheckpointError for damaged descriptions."""
    found: dict[str, Packed] = {}
    for key in entries:
        name, mark, kind = key.partition(STATE)
        if mark and name in entries:
            found[name] = _four_bits(name, key, kind, entries, reader)
        elif key.endswith(".SCB") and f"{key.removesuffix('SCB')}weight" in entries:
            name = f"{key.removesuffix('SCB')}weight"
            layout = [other for other in (f"{key.removesuffix('SCB')}weight_format",) if other in entries]
            keys, entry = (name, key, *layout), entries[name]
            meant = TensorEntry(entry.file, entry.shape, "BF16", "INT8", sum(entries[part].nbytes for part in keys))
            found[name] = EightBits(keys, meant)
    return found


def _four_bits(
    name: str, described: str, kind: str, entries: Mapping[str, TensorEntry], reader: TensorReader
) -> FourBits:
    entry = entries[name]
    try:
        state: Any = json.loads(bytes(reader.tensor(described).flatten().tolist()))
        shape, dtype = tuple(int(side) for side in state["shape"]), DTYPES[state["dtype"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{entry.file} describes {name} in a damaged way ({error!r}); fetch it again") from error
    parts = (f"{name}.absmax", f"{name}.quant_map", *(name + end for end in NESTED))
    keys = (name, described, *(part for part in parts if part in entries))
    size = sum(entries[part].nbytes for part in keys)
    return FourBits(keys, kind, TensorEntry(entry.file, shape, dtype, kind.upper(), size), keeps=len(shape) == 2)
