"""The files of a checkpoint folder: which ones hold the weights, and what their headers say. No tensor is read here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bagel.checkpoint.errors import CheckpointError

WEIGHT_NAMES = ("ema.safetensors", "model.safetensors", "model_bf16.safetensors")
AUTOENCODER_NAMES = ("ae.safetensors", "vae/ae.safetensors")
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READABLE = (".safetensors", ".gguf")
JOURNAL = ".bagel-convert.json"
"""What `bagel convert` keeps in a folder until it is done there."""
UNITS_FIELD = "dfloat11_config"
"""What `config.json` has where the weights are DFloat11 units."""
UNIT_KEY = ".encoded_exponent"
"""How the first tensor of a DFloat11 unit is called."""
ESSENTIAL = ("language_model.model.embed_tokens", "language_model.model.norm.weight")
"""What keys of every whole model hold."""
OFFICIAL = "ByteDance-Seed/BAGEL-7B-MoT"

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


def json_object(text: str | bytes, label: str, *, way_out: str = "") -> dict[str, Any]:
    """Return what a text of JSON holds; raises CheckpointError, naming it by its label, unless that is an object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label} is not valid JSON ({error}){way_out}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{label} must hold a JSON object, got {type(values).__name__}{way_out}")
    return values


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it; `dtype` in the names of safetensors (`BF16`).

    A compressed one has the shape and dtype that are meant, says in `kind` how it is stored, and in `size` in how many
    bytes.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    kind: str = ""
    size: int | None = None

    @property
    def numel(self) -> int:
        """Values held."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 1) if self.size is None else self.size

    @property
    def stored_as(self) -> str:
        """How it is stored."""
        return self.kind or self.dtype


@dataclass(frozen=True)
class TensorFiles:
    """One set of tensors in one safetensors file or several; `stamps` tell whether a file changed since."""

    label: str
    entries: dict[str, TensorEntry]
    stamps: dict[Path, tuple[int, int]]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, in order."""
        return tuple(self.stamps)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def check_unchanged(self, file: Path) -> None:
        """Raise CheckpointError if `file` is not the one whose header was read."""
        if stamp(file) != self.stamps[file]:
            raise CheckpointError(f"{file} changed since it was opened; load again once it is written")


def stamp(file: Path) -> tuple[int, int]:
    """Return size and modification time of a file, or raise CheckpointError naming it."""
    try:
        stat = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def open_tensors(file: Path) -> Any:
    """Open a safetensors file memory-mapped, or raise one CheckpointError that names it and says what is wrong."""
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; fetch it again") from error
    except PermissionError as error:
        raise CheckpointError(f"{file} may not be read by this user; change its permissions") from error
    except (SafetensorError, OSError, ValueError) as error:
        size = stamp(file)[0]
        raise CheckpointError(
            f"{file} ({size} bytes) is no whole safetensors file ({error}): truncated or damaged, fetch it again"
        ) from error


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return every tensor's shape and dtype from the header of one file, and its metadata."""
    with open_tensors(file) as handle:
        entries = {}
        for key in handle.keys():  # noqa: SIM118 (the handle is no dict)
            tensor = handle.get_slice(key)
            entries[key] = TensorEntry(file, tuple(tensor.get_shape()), str(tensor.get_dtype()))
        return entries, handle.metadata() or {}


def read_single(file: Path) -> TensorFiles:
    """Read the header of one safetensors file."""
    mark = stamp(file)
    entries, metadata = read_header(file)
    return TensorFiles(file.name, entries, {file: mark}, metadata)


def read_several(files: list[Path]) -> TensorFiles:
    """Read the headers of files that hold one model between them; raises CheckpointError for a key that two hold."""
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, tuple[int, int]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found = read_single(file)
        twice = [key for key in found.entries if key in entries]
        if twice:
            raise CheckpointError(f"{file} and {entries[twice[0]].file} both hold {quoted(twice)}; remove one of them")
        entries, stamps, metadata = entries | found.entries, stamps | found.stamps, metadata | found.metadata
    return TensorFiles(f"{len(files)} files", entries, stamps, metadata)


def read_sharded(index: Path) -> TensorFiles:
    """Read the headers of the shards that an index names; all must be there and hold just what the index says."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}); fetch it again") from error
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, tuple[int, int]] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(listed.values())):
        file = index.parent / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file of the same folder")
        if not file.is_file():
            count = sum(shard == name for shard in listed.values())
            raise CheckpointError(
                f"the shard {file} is missing; {index.name} puts {count} tensors there; fetch it again"
            )
        stamps[file] = stamp(file)
        header, more = read_header(file)
        metadata |= more
        for key, entry in header.items():
            if listed.get(key) != name:
                raise CheckpointError(f"{file} holds {key}, but {index.name} has it in {listed.get(key, 'no shard')}")
            entries[key] = entry
    absent = [key for key in listed if key not in entries]
    if absent:
        raise CheckpointError(f"{index.parent / listed[absent[0]]} lacks {quoted(absent)} that {index.name} puts there")
    return TensorFiles(index.name, entries, stamps, metadata)


def quoted(names: list[str], limit: int = 5) -> str:
    """Return the first names joined by commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def path_of(name: object, what: str) -> Path:
    """Return a path that a user gave; raises TypeError for what is none, CheckpointError for an empty one."""
    if not isinstance(name, str | Path):
        raise TypeError(f"{what} must be a path, got {type(name).__name__} {name!r}")
    if not str(name):
        raise CheckpointError(f"{what} is empty; give the path of a folder")
    return Path(name).expanduser()


def choose_weights(folder: Path, name: str | None = None) -> list[Path]:
    """Return the file of the model's weights in a folder, or its index, or the several that hold DFloat11 units.

    Without a name: `ema.safetensors`, `model.safetensors`, `model_bf16.safetensors`, then an index with its shards,
    then the only file there is. Raises CheckpointError for pickles, a choice to be made, and folders without weights.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"weights must be the name of a file, got {type(name).__name__} {name!r}")
    file = folder / name if name else _choose(folder)
    if isinstance(file, list):
        return file
    refuse_pickle(file)
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; {folder} holds {_listing(folder)}")
    if file.suffix not in (*READABLE, ".json"):
        raise CheckpointError(
            f"{file} is neither a safetensors nor a GGUF file; only *.safetensors, its index, or *.gguf can be read"
        )
    return [file]


def _choose(folder: Path) -> Path | list[Path]:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return _with_units(folder / name)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} holds several indices ({quoted([i.name for i in indices])}); name one as weights"
        )
    if indices:
        return indices[0]
    there = weight_files([file.name for file in sorted(folder.iterdir()) if file.is_file()])
    if len(there) == 1:
        return folder / there[0]
    if there:
        found = _with_units(folder / there[0])
        if isinstance(found, list):
            return found
        raise CheckpointError(f"{folder} holds several files of weights ({quoted(there)}); name one as weights")
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise CheckpointError(
        f"{folder} holds no weights: wanted one of {', '.join(WEIGHT_NAMES)}, *.safetensors.index.json or one "
        f"*.safetensors or *.gguf, found {_listing(folder)}"
    )


def weight_files(names: Sequence[str]) -> list[str]:
    """Return which files of a folder may hold weights of the model, by their names' endings."""
    return [name for name in names if name.endswith(READABLE) and name not in AUTOENCODER_NAMES and "/" not in name]


def _with_units(file: Path) -> Path | list[Path]:
    """Return a file of weights, with all its neighbours where it is not whole and one of them holds units.

    A DFloat11 release keeps every unit of its weights in a file of its own, whose name says nothing.
    """
    if file.suffix != ".safetensors":
        return file
    keys = read_header(file)[0]
    if all(any(part in key for key in keys) for part in ESSENTIAL):
        return file
    names = weight_files([other.name for other in sorted(file.parent.iterdir())])
    several = [file.parent / name for name in names if name.endswith(".safetensors")]
    has_units = any(key.endswith(UNIT_KEY) for other in several for key in read_header(other)[0])
    return several if has_units and len(several) > 1 else file


def instead_of_file(file: Path) -> str:
    """Say how a checkpoint is named by whoever named its file of weights."""
    if file.name.endswith(READABLE):
        return (
            f"name the folder that holds it, {file.parent}, and the file with weights={file.name!r} (--weights "
            f"{file.name}); what that folder lacks of configuration, tokenizer and autoencoder comes from base=..."
        )
    return "name the folder that holds it"


def refuse_pickle(file: Path) -> None:
    """Raise CheckpointError if a file's name is that of a pickle."""
    if file.name.lower().endswith(PICKLES):
        raise CheckpointError(
            f"{file} is a pickle, which can run any code when it is read; only safetensors and GGUF are read: "
            "convert it with safetensors.torch.save_file where you trust it"
        )


def _listing(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return quoted(names, 8) or "nothing"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer, of any kind."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.model"))


def find_autoencoder(*folders: Path) -> Path | None:
    """Return the autoencoder's file in the first folder that has one."""
    for folder in folders:
        for name in AUTOENCODER_NAMES:
            if (folder / name).is_file():
                return folder / name
    return None
