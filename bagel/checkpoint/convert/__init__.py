"""A checkpoint into another format: streamed, resumable, verified, and never half a file.

Every file is written under a temporary name, read back, compared, and only then given its own. A journal beside them
says which are done, so that what was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bagel.checkpoint.checkpoint import Checkpoint
from bagel.checkpoint.convert.formats import FORMATS, NAMES
from bagel.checkpoint.convert.plan import Planned, shards, unit_files
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.export import AUTOENCODER_NAMES, CHECKSUMS, INDEX_NAME, config_files, write_content
from bagel.checkpoint.files import JOURNAL, UNITS_FIELD, path_of, quoted
from bagel.checkpoint.keys import targets
from bagel.formats import dfloat11
from bagel.tokenizer import Tokenizer

SHARD_BYTES = 4 * 10**9
"""Most bytes of tensors in a file, unless told: what is lost by an interruption."""
Report = Callable[[str, str], None]

__all__ = ["NAMES", "SHARD_BYTES", "convert_checkpoint"]


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    weights: str | None = None,
    max_shard_bytes: int | None = None,
    every_linear: bool = False,
    report: Report | None = None,
) -> list[str]:
    """Write a checkpoint in another format into a folder, and return the names of its files.

    Quantised are the matrices of the decoder's layers; embeddings, heads, the vision encoder and what lies around
    latents stay as they are. DFloat11, which loses nothing, takes all that its releases do. Memory: one matrix and its
    encoded form at a time, for DFloat11 one unit (a decoder layer, an embedding).

    Args:
        source: a checkpoint folder of any format that can be read.
        folder: made if it is not there; empty, or one in which the same conversion was interrupted: finished files
            are checked and kept.
        to: one of `NAMES`.
        base: see `Checkpoint.open`.
        weights: see `Checkpoint.open`.
        max_shard_bytes: most bytes of tensors in a file; 4 GB by default. DFloat11 has a file per unit, GGUF one.
        every_linear: quantise every linear layer.
        report: called with a file's name and what became of it.

    Raises:
        CheckpointError: what is wrong with the source, files in the way, too little room, a full disk, or a tensor
            that reads back wrongly.
    """
    place = path_of(folder, "the folder to write into")
    checkpoint = Checkpoint.open(source, base=base, weights=weights)
    _check(to, max_shard_bytes, every_linear=every_linear)
    tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    keys = list(targets(checkpoint.config))
    if to == "dfloat11":
        files = unit_files(checkpoint.weights, keys)
    else:
        most = max_shard_bytes or SHARD_BYTES
        files = shards(checkpoint.weights, keys, FORMATS[to], max_bytes=most, every_linear=every_linear)
    settings = {"to": to, "every_linear": every_linear, "files": {file.name: _marked(file.names()) for file in files}}
    try:
        with _alone(place):
            journal = _Journal.open(place, settings | {"source": _marks(checkpoint)})
            _check_room(place, files, journal)
            for file in files:
                _make(file, place, checkpoint, journal, report or (lambda name, what: None))
            return _finish(place, checkpoint, tokenizer, to, files, journal)
    except BrokenPipeError:  # of whoever is reported to
        raise
    except OSError as error:
        at = Path(error.filename or place)
        what = "written" if place in (at, *at.parents) else "read"
        raise CheckpointError(
            f"{at if what == 'read' else place} cannot be {what}: {error}; run the same again to go on"
        ) from error
    finally:
        checkpoint.weights.close()


def _check(to: str, max_shard_bytes: int | None, *, every_linear: bool) -> None:
    if to not in NAMES:
        raise CheckpointError(f"there is no format {to!r}; choose one of {', '.join(NAMES)}")
    if max_shard_bytes is not None and (to == "dfloat11" or to.startswith("gguf")):
        reason = "a file per unit" if to == "dfloat11" else "one file"
        raise CheckpointError(f"{to} has {reason}: leave the size of shards out")
    if max_shard_bytes is not None and (isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int)):
        raise TypeError(f"the size of shards must be a number of bytes, got {max_shard_bytes!r}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise CheckpointError(f"the size of shards must be at least 1 byte, got {max_shard_bytes}")
    if every_linear and to in ("dfloat11", "bf16"):
        raise CheckpointError(f"{to} takes every weight anyway: leave every_linear out")


def _marks(checkpoint: Checkpoint) -> list[list[object]]:
    """Return what tells one source from another: its files' names, sizes and times."""
    stats = [(file.name, file.stat()) for file in checkpoint.weights.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _marked(names: list[str]) -> str:
    """Return what tells one file's tensors from another's: how they are shared out hangs on the size of shards."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Make a folder and keep other processes from converting into it, where the system can: they would mix files."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is converting into {place}; wait until it is done") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


# What is done ---------------------------------------------------------------------------------------------------------


class _Journal:
    """What a conversion is, and the SHA-256 of every file that it has finished."""

    def __init__(self, place: Path, settings: dict[str, Any], done: dict[str, str]) -> None:
        self.place, self.settings, self.done = place, settings, done

    @classmethod
    def open(cls, place: Path, settings: dict[str, Any]) -> _Journal:
        """Begin in an empty folder, or go on in one where the same was interrupted."""
        there = sorted(path.name for path in place.iterdir() if path.name != f"{JOURNAL}.tmp")
        try:
            found = json.loads((place / JOURNAL).read_text(encoding="utf-8"))
            same, done = found["settings"] == settings, dict(found["done"])
            other = found["settings"]["to"]
        except FileNotFoundError:
            if there:
                raise CheckpointError(f"{place} already holds {quoted(there)}; choose another folder") from None
            fresh = cls(place, settings, {})
            fresh.save()
            return fresh
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{place / JOURNAL} is damaged ({error!r}); empty the folder and begin again"
            ) from error
        if not same:
            raise CheckpointError(
                f"{place} holds another conversion that was interrupted (--to {other}), or its source or --shard "
                "has changed; choose another folder, or empty this one"
            )
        for name in there:
            if name.endswith(".tmp"):
                (place / name).unlink()
        return cls(place, settings, done)

    def add(self, name: str, digest: str) -> None:
        """Note a finished file, at once."""
        self.done[name] = digest
        self.save()

    def save(self) -> None:
        """Write it, whole."""
        temporary = self.place / f"{JOURNAL}.tmp"
        write_content(temporary, json.dumps({"settings": self.settings, "done": self.done}), replace=True)
        os.replace(temporary, self.place / JOURNAL)


def _make(file: Planned, place: Path, checkpoint: Checkpoint, journal: _Journal, report: Report) -> None:
    path, temporary = place / file.name, place / f".{file.name}.tmp"
    if file.name in journal.done and path.is_file() and _digest(path) == journal.done[file.name]:
        report(file.name, "is there already, and whole")
        return
    try:
        file.write(temporary, checkpoint.weights)
        file.verify(temporary, checkpoint.weights)
        digest = _digest(temporary)
        os.replace(temporary, path)
        _sync(place)
    finally:
        temporary.unlink(missing_ok=True)
    journal.add(file.name, digest)
    report(file.name, "written and verified")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(place: Path) -> None:
    """Wait until the disk knows the names in a folder, where the system can say so."""
    with contextlib.suppress(OSError):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_room(place: Path, files: list[Planned], journal: _Journal) -> None:
    need = sum(file.nbytes for file in files if file.name not in journal.done)
    free = shutil.disk_usage(place).free
    if need > free:
        raise CheckpointError(
            f"{place} has {free / 2**30:.1f} GiB free, and {need / 2**30:.1f} GiB are still to be written; make room"
        )


def _finish(
    place: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, to: str, files: list[Planned], journal: _Journal
) -> list[str]:
    """Write everything that is not a weight of the model, check the whole, and say that it is done."""
    more: dict[str, dict[str, Any]] = {}
    if to == "dfloat11":
        more["config.json"] = {UNITS_FIELD: dfloat11.config_section(checkpoint.weights.entries)}
    elif FORMATS[to].config:
        more["config.json"] = {"quantization_config": FORMATS[to].config}
    contents: dict[str, Any] = config_files(checkpoint.config, more)
    contents |= {path.name: path for path in tokenizer.files}
    if checkpoint.vae_file is not None:
        contents[AUTOENCODER_NAMES[0]] = checkpoint.vae_file
    index = {name: file.name for file in files for name in file.names()}
    if len(files) > 1 and index:
        size = sum(file.nbytes for file in files)
        contents[INDEX_NAME] = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2) + "\n"
    sums = dict(journal.done)
    for name, content in contents.items():
        temporary = place / f".{name}.tmp"
        sums[name] = write_content(temporary, content, replace=True)
        os.replace(temporary, place / name)
    names = [*(file.name for file in files), *contents]
    write_content(place / f".{CHECKSUMS}.tmp", "".join(f"{sums[name]}  {name}\n" for name in names), replace=True)
    os.replace(place / f".{CHECKSUMS}.tmp", place / CHECKSUMS)
    (place / JOURNAL).unlink()
    try:
        Checkpoint.open(place)  # every key, shape and dtype
    except CheckpointError:
        journal.save()
        raise
    _sync(place)
    return [*names, CHECKSUMS]
