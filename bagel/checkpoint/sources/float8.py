"""Single files of 8-bit weights as ComfyUI's tools write them, three generations.

Plain: a weight cast to e4m3 or e5m2, without a scale. `scaled_fp8`: a marker of that name, and `X.scale_weight`. Then
`X.weight_scale`, with the format named in `X.comfy_quant` or in the file's metadata; those may be int8 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry, json_object
from bagel.checkpoint.sources.base import Packed, TensorReader
from bagel.formats.fp8 import BLOCK, Scaled, scale_of

MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
DESCRIPTION = ".comfy_quant"
FLOATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FORMATS = {**{name: dtype for dtype, name in FLOATS.items()}, "int8_tensorwise": "I8", "int8_blockwise": "I8"}
"""The formats that can be read, and how their values are stored."""
SCALES = (".weight_scale", ".scale_weight")
IGNORED = (".input_scale", ".scale_input", DESCRIPTION)
"""Scales of activations (ours are measured at every product), and descriptions."""
FETCH = "; fetch the file again"


@dataclass(frozen=True)
class EightBitTensor:
    """A tensor of eight bits and, for weights, its scale."""

    keys: tuple[str, ...]
    entry: TensorEntry
    keeps: bool
    products: bool = False

    @property
    def format(self) -> str:
        """Of which kind its values are."""
        return "int8" if self.entry.kind.startswith("int8") else "float8"

    def rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Return rows, decoded."""
        values = reader.rows(self.keys[0], first, last)
        if len(self.keys) == 1:
            return values.float()
        return values.float() * scale_of(Scaled(values.new_empty(self.entry.shape), self._scale(reader)), first, last)

    def stored(self, reader: TensorReader) -> Scaled:
        """Return values and scale."""
        return Scaled(reader.tensor(self.keys[0]), self._scale(reader), self.products)

    def _scale(self, reader: TensorReader) -> Tensor:
        if len(self.keys) == 1:
            return torch.ones(1, 1)
        scale = reader.tensor(self.keys[1]).float()
        if bool((scale < 0).any()):
            raise CheckpointError(f"{self.entry.file} has a negative scale, {self.keys[1]}; fetch it again")
        return scale.view(-1, 1) if scale.ndim < 2 else scale


def find(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], reader: TensorReader) -> dict[str, Packed]:
    """Return the tensors of eight bits by key; raises CheckpointError for formats that are not read, by name."""
    described = _descriptions(entries, metadata, reader)
    full = MARKER in entries and entries[MARKER].numel == 2
    found: dict[str, Packed] = {}
    for key, entry in entries.items():
        name = key.removesuffix(".weight")
        scale = next((name + end for end in SCALES if name != key and name + end in entries), None)
        kind = described.get(name, {}).get("format", FLOATS.get(entry.dtype))
        if kind is not None and not isinstance(kind, str):
            raise CheckpointError(f"{entry.file} describes {key} in a damaged way (format {kind!r}); fetch it again")
        if key == MARKER or kind is None or (entry.dtype not in FLOATS and name not in described):
            continue
        _check(key, entry, described.get(name, {}), kind, entries.get(scale or ""))
        exact = full if name not in described else bool(described[name].get("full_precision_matrix_mult"))
        found[key] = EightBitTensor(
            keys=(key, scale) if scale else (key,),
            entry=_meant(entry, kind, entries.get(scale or "")),
            keeps=len(entry.shape) == 2,
            products=scale is not None and not exact,
        )
    return found


def is_companion(key: str, packed: Mapping[str, Packed]) -> bool:
    """Whether a tensor that is none of the model's belongs to this format."""
    return key == MARKER or any(f"{key.removesuffix(end)}.weight" in packed for end in IGNORED if key.endswith(end))


def _descriptions(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], reader: TensorReader
) -> dict[str, dict[str, Any]]:
    """Return what is said of each layer; a layer's own tensor before the file's metadata."""
    found: dict[str, Any] = {}
    if METADATA in metadata:
        layers = json_object(metadata[METADATA], f"the metadata {METADATA}", way_out=FETCH).get("layers", {})
        found |= layers if isinstance(layers, dict) else {}
    for key, entry in entries.items():
        if key.endswith(DESCRIPTION):
            text = bytes(reader.tensor(key).flatten().tolist()) if entry.dtype == "U8" else b""
            found[key.removesuffix(DESCRIPTION)] = json_object(text, key, way_out=FETCH)
    return {name: values if isinstance(values, dict) else {} for name, values in found.items()}


def _check(key: str, entry: TensorEntry, description: Mapping[str, Any], kind: str, scale: TensorEntry | None) -> None:
    rotated = [field for field, value in description.items() if "rot" in field and value]
    if rotated:
        raise CheckpointError(f"{entry.file} holds {key} rotated ({rotated[0]}), which is not read; use another file")
    if kind not in FORMATS:
        raise CheckpointError(
            f"{entry.file} holds {key} in the format {kind}, which is not read; there are {', '.join(FORMATS)}"
        )
    if entry.dtype != FORMATS[kind]:
        raise CheckpointError(f"{entry.file} says {key} is {kind}, but stores {entry.dtype}; fetch the file again")
    if scale is None:
        if entry.dtype == "I8":
            raise CheckpointError(f"{entry.file} has no scale for {key} ({SCALES[0]}); fetch the file again")
        return
    whole = {(), (1,), (1, 1)}
    rows = {entry.shape[:1], (*entry.shape[:1], 1)}
    blocks = {tuple(math.ceil(side / BLOCK) for side in entry.shape)}
    fits = blocks if kind == "int8_blockwise" else whole | rows
    if scale.shape not in fits or scale.dtype not in ("F32", "BF16", "F16"):
        shape = "x".join(map(str, scale.shape))
        raise CheckpointError(
            f"{entry.file} has a scale of shape {shape} ({scale.dtype}) for {key} {'x'.join(map(str, entry.shape))} in "
            f"{kind}, which does not fit"
        )


def _meant(entry: TensorEntry, kind: str, scale: TensorEntry | None) -> TensorEntry:
    size = entry.nbytes + (scale.nbytes if scale else 0)
    return TensorEntry(entry.file, entry.shape, "BF16", entry.dtype if kind in FLOATS.values() else kind, size)
