"""What the JSON files of a checkpoint say, most trusted file first, each value with the file it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import json_object


@dataclass(frozen=True)
class Source:
    """One JSON object and the name of the file (and part of it) that holds it."""

    label: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Stated:
    """JSON objects about one part of the model, most trusted first."""

    sources: tuple[Source, ...] = ()

    def get(self, field: str) -> tuple[Any, str] | None:
        """Return the first value that is not null and the label of its file, or None."""
        for source in self.sources:
            if source.values.get(field) is not None:
                return source.values[field], source.label
        return None

    def integer(self, field: str) -> tuple[int, str] | None:
        """Return a positive whole number and its file; raise CheckpointError naming the file for any other value."""
        found = self.get(field)
        if found is None:
            return None
        value, label = found
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{label}: {field} must be a positive whole number, got {value!r}")
        return value, label

    def number(self, field: str, *, positive: bool = True) -> tuple[float, str] | None:
        """Return a number and its file; raise CheckpointError naming the file for any other value."""
        found = self.get(field)
        if found is None:
            return None
        value, label = found
        real = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not real or (positive and value <= 0):
            kind = "positive" if positive else "finite"
            raise CheckpointError(f"{label}: {field} must be a {kind} number, got {value!r}")
        return float(value), label

    def boolean(self, field: str) -> tuple[bool, str] | None:
        """Return true or false and its file; raise CheckpointError naming the file for any other value."""
        found = self.get(field)
        if found is None:
            return None
        value, label = found
        if not isinstance(value, bool):
            raise CheckpointError(f"{label}: {field} must be true or false, got {value!r}")
        return value, label

    def text(self, field: str) -> tuple[str, str] | None:
        """Return a string and its file; raise CheckpointError naming the file for any other value."""
        found = self.get(field)
        if found is None:
            return None
        value, label = found
        if not isinstance(value, str):
            raise CheckpointError(f"{label}: {field} must be a string, got {value!r}")
        return value, label

    def part(self, field: str) -> Stated:
        """Return the objects nested under a field."""
        nested = [Source(f"{s.label} ({field})", s.values[field]) for s in self.sources if _is_object(s, field)]
        return Stated(tuple(nested))


def _is_object(source: Source, field: str) -> bool:
    return isinstance(source.values.get(field), dict)


@dataclass(frozen=True)
class StatedFiles:
    """The three JSON files of a folder (and of its base): the whole model, the decoder, the ViT; and what was odd.

    `unreadable` says what is wrong with the `config.json` that would have been trusted most, None if it was read.
    """

    model: Stated
    decoder: Stated
    vit: Stated
    notes: tuple[str, ...]
    unreadable: str | None = None


def read_stated(folder: Path, base: Path | None = None) -> StatedFiles:
    """Read `config.json`, `llm_config.json` and `vit_config.json` of a folder, then of its base.

    An unreadable `config.json` is noted and passed over (re-uploads of the released model carry broken ones); the
    other two, where present, must be JSON objects, else CheckpointError names the file.
    """
    notes: list[str] = []
    unreadable: str | None = None
    model: list[Source] = []
    parts: dict[str, list[Source]] = {"llm_config": [], "vit_config": []}
    for place in (folder, base):
        if place is None:
            continue
        prefix = "" if place == folder else f"{place.name}/"
        config, trouble = _read_config(place / "config.json", f"{prefix}config.json")
        if trouble is not None:
            notes.append(f"{trouble}; it is passed over; what only it could say is as in the released model")
            unreadable = unreadable if model else unreadable or trouble
        for name, sources in parts.items():
            own = _read_object(place / f"{name}.json")
            if own is not None:
                sources.append(Source(f"{prefix}{name}.json", own))
            if config is not None:
                sources.extend(Stated((config,)).part(name).sources)
        if config is not None:
            model.append(config)
    return StatedFiles(
        model=Stated(tuple(model)),
        decoder=Stated(tuple(parts["llm_config"])),
        vit=Stated(tuple(parts["vit_config"])),
        notes=tuple(notes),
        unreadable=unreadable,
    )


def _read_config(path: Path, label: str) -> tuple[Source | None, str | None]:
    """Return what a `config.json` says, and what is wrong with it."""
    try:
        values = _read_object(path)
    except CheckpointError as error:
        return None, str(error)
    return None if values is None else Source(label, values), None


def _read_object(path: Path) -> dict[str, Any] | None:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it is no file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return json_object(text, str(path))
