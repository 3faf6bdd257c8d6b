"""The files of a checkpoint folder: which ones hold the weights, and what their headers say. No tensor is read here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bagel.checkpoint.errors import CheckpointError

WEIGHT_NAMES = ("ema.safetensors", "model.safetensors", "model_bf16.safetensors")
AUTOENCODER_NAMES = ("ae.safetensors", "vae/ae.safetensors")
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
COMPRESSED_NAMES = ("df11", "int8", "fp8", "nf4", "int4")
COMPRESSED_KEYS = (".encoded_exponent", ".sign_mantissa", ".output_positions", ".luts")
OFFICIAL = "ByteDance-Seed/BAGEL-7B-MoT"

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it; `dtype` in the names of safetensors (`BF16`)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Values held."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class TensorFiles:
    """One set of tensors in one safetensors file or several shards; `stamps` tell whether a file changed since."""

    label: str
    entries: dict[str, TensorEntry]
    stamps: dict[Path, tuple[int, int]]

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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return every tensor's shape and dtype from the header of one file."""
    with open_tensors(file) as handle:
        entries = {}
        for key in handle.keys():  # noqa: SIM118 (the handle is no dict)
            tensor = handle.get_slice(key)
            entries[key] = TensorEntry(file, tuple(tensor.get_shape()), str(tensor.get_dtype()))
    return entries


def read_single(file: Path) -> TensorFiles:
    """Read the header of one safetensors file."""
    mark = stamp(file)
    return TensorFiles(file.name, read_header(file), {file: mark})


def read_sharded(index: Path) -> TensorFiles:
    """Read the headers of the shards that an index names; all must be there and hold just what the index says."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}); fetch it again") from error
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, tuple[int, int]] = {}
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
        for key, entry in read_header(file).items():
            if listed.get(key) != name:
                raise CheckpointError(f"{file} holds {key}, but {index.name} has it in {listed.get(key, 'no shard')}")
            entries[key] = entry
    absent = [key for key in listed if key not in entries]
    if absent:
        raise CheckpointError(f"{index.parent / listed[absent[0]]} lacks {quoted(absent)} that {index.name} puts there")
    return TensorFiles(index.name, entries, stamps)


def quoted(names: list[str], limit: int = 5) -> str:
    """Return the first names joined by commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_weights(folder: Path, name: str | None = None) -> TensorFiles:
    """Choose and read the headers of the model's weights in a folder.

    Without a name: `ema.safetensors`, `model.safetensors`, `model_bf16.safetensors`, then an index with its shards.
    Raises CheckpointError for pickles, compressed layouts, several indices, and folders without weights.
    """
    file = folder / name if name else _choose(folder)
    refuse_name(file)
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; {folder} holds {_listing(folder)}")
    if file.suffix not in (".safetensors", ".json"):
        raise CheckpointError(f"{file} is not a safetensors file; only *.safetensors or its index can be read")
    weights = read_sharded(file) if file.suffix == ".json" else read_single(file)
    compressed = [key for key in weights.entries if key.endswith(COMPRESSED_KEYS)]
    if compressed:
        raise CheckpointError(
            f"{file} holds compressed DF11 tensors (such as {compressed[0]}), a layout that is not supported; "
            f"use the weights of {OFFICIAL}"
        )
    return weights


def _choose(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} holds several indices ({quoted([i.name for i in indices])}); name one as weights"
        )
    if indices:
        return indices[0]
    for file in sorted(folder.iterdir()):
        if file.name not in AUTOENCODER_NAMES:
            refuse_name(file)
    raise CheckpointError(
        f"{folder} holds no weights: wanted one of {', '.join(WEIGHT_NAMES)} or *.safetensors.index.json, "
        f"found {_listing(folder)}"
    )


def refuse_name(file: Path) -> None:
    """Raise CheckpointError if a file's name is that of a pickle or of a layout that is not supported."""
    name = file.name.lower()
    if name.endswith(PICKLES):
        raise CheckpointError(
            f"{file} is a pickle, which can run any code when it is read; only safetensors are read: "
            "convert it with safetensors.torch.save_file where you trust it"
        )
    if name.endswith(".gguf"):
        raise CheckpointError(f"{file} is in the GGUF layout, which is not supported; use the weights of {OFFICIAL}")
    layout = next((word for word in COMPRESSED_NAMES if word in name), None)
    if layout and name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{file} is in the {layout.upper()} layout, which is not supported; use the weights of {OFFICIAL}"
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
