"""The formats in which the weights of a model lie on disk, recognised by what the files hold."""

from __future__ import annotations

from pathlib import Path

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorFiles, choose_weights, read_several, read_sharded, read_single
from bagel.checkpoint.sources import bitsandbytes, dfloat11, float8
from bagel.checkpoint.sources.base import Packed, Source, TensorReader
from bagel.checkpoint.sources.gguf import MAGIC, GGUFSource
from bagel.checkpoint.sources.tensors import TensorSource

PREFIXES = ("model.diffusion_model.", "model.")
"""What tools put before the official keys, the longest first."""

__all__ = ["Packed", "Source", "TensorReader", "TensorSource", "open_source", "source_of"]


def open_source(folder: Path, name: str | None = None) -> Source:
    """Choose and open the weights of the model in a folder; nothing but headers is read.

    Args:
        folder: a checkpoint.
        name: the file, or the index, where a folder holds several.

    Raises:
        CheckpointError: no weights, a choice to be made, pickles, damaged files, formats that are not read.
    """
    files = choose_weights(folder, name)
    if len(files) > 1:
        return source_of(read_several(files))
    if files[0].suffix == ".json":
        return source_of(read_sharded(files[0]))
    with files[0].open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if is_gguf or files[0].suffix == ".gguf":
        return GGUFSource(files[0], prefixes=PREFIXES)
    return source_of(read_single(files[0]))


def source_of(tensors: TensorFiles) -> TensorSource:
    """Return the model that safetensors files hold, each weight in the format in which it is stored."""
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in tensors.entries)), "")
    names = {key.removeprefix(prefix): key for key in tensors.entries}
    if len(names) < len(tensors.entries):
        twice = next(key for key in names if {key, prefix + key} <= tensors.entries.keys())
        raise CheckpointError(f"{tensors.label} holds {twice} with and without the prefix {prefix}; remove one of them")
    entries = {key: tensors.entries[name] for key, name in names.items()}
    reader = TensorReader(tensors, names)
    packed = bitsandbytes.find(entries, reader) | dfloat11.find(entries, reader)
    packed |= float8.find({k: e for k, e in entries.items() if k not in packed}, tensors.metadata, reader)
    unread = [key for key in entries if float8.is_companion(key, packed)]
    return TensorSource(tensors, reader, packed, unread)
