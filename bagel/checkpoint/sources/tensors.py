"""Safetensors files: plain tensors, and those that a compressed format packs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bagel.checkpoint.files import TensorEntry, TensorFiles
from bagel.checkpoint.sources.base import Packed, TensorReader


class TensorSource:
    """A model in safetensors files.

    Args:
        tensors: the files' headers.
        reader: of these files; its names are the official ones.
        packed: tensors that are stored in a format of their own.
        unread: names of tensors that are none of the model's.
    """

    def __init__(
        self,
        tensors: TensorFiles,
        reader: TensorReader | None = None,
        packed: Mapping[str, Packed] | None = None,
        unread: Iterable[str] = (),
    ) -> None:
        self.tensors, self.label = tensors, tensors.label
        self.reader = reader or TensorReader(tensors)
        self.packed = dict(packed or {})
        self.format = "+".join(sorted({packed.format for packed in self.packed.values()})) or "safetensors"
        taken = {key for packed in self.packed.values() for key in packed.keys} | set(unread)
        names = self.reader.names
        self.entries: dict[str, TensorEntry] = {
            key: tensors.entries[name] for key, name in names.items() if key not in taken
        }
        self.entries |= {key: packed.entry for key, packed in self.packed.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, in order."""
        return self.tensors.files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Return keys as they lie in the files."""

        def place(key: str) -> tuple[int, int]:
            return self.reader.place(self.packed[key].keys[0] if key in self.packed else key)

        return sorted(keys, key=place)

    def read(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor on the host, decoded."""
        if key in self.packed:
            return self.packed[key].rows(self.reader, first, last)
        return self.reader.rows(key, first, last)

    def keeps(self, key: str) -> bool:
        """Whether a tensor is packed in a form by which a linear layer can multiply."""
        return key in self.packed and self.packed[key].keeps

    def stored(self, key: str) -> Any:
        """Return the packed form."""
        return self.packed[key].stored(self.reader)

    def close(self) -> None:
        """Let go of the open file."""
        self.reader.close()
