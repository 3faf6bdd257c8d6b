"""Readers for the data formats of BAGEL's trainer: parquet text-to-image, parquet editing, jsonl conversations.

A row that cannot be used raises `BrokenRowError` with its file and number; the stream counts it and goes on.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bagel.image import open_image
from bagel.training.samples import Item, ItemMaker
from bagel.training.stream import BrokenRowError

Row = dict[str, Any]


def find_files(place: str | Path, suffix: str) -> list[Path]:
    """Return a file itself, or the files in a folder with this suffix, sorted.

    Raises:
        ValueError: there are none.
    """
    path = Path(place).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
    if not files:
        raise ValueError(f"{path} holds no {suffix} files")
    return files


def _shuffled(count: int, *key: object) -> list[int]:
    order = list(range(count))
    random.Random("/".join(map(str, key))).shuffle(order)
    return order


class ParquetRows:
    """Rows of parquet files in an order shuffled anew each epoch: row groups first, then the rows of each.

    One row group is held at a time. Needs pyarrow.

    Args:
        place: a file or a folder.
        columns: to read.
        seed: of the order.
    """

    def __init__(self, place: str | Path, columns: Sequence[str], *, seed: int = 0) -> None:
        self.files = find_files(place, ".parquet")
        self.columns, self.seed = list(columns), seed
        self.groups: list[tuple[Path, int, int]] = []  # file, group, rows
        for file in self.files:
            metadata = _parquet(file)
            missing = [name for name in self.columns if name not in metadata.schema_arrow.names]
            if missing:
                raise ValueError(f"{file} lacks the columns {missing}; it has {metadata.schema_arrow.names}")
            groups = range(metadata.metadata.num_row_groups)
            self.groups += [(file, group, metadata.metadata.row_group(group).num_rows) for group in groups]
        self.count = sum(rows for _, _, rows in self.groups)
        if not self.count:
            raise ValueError(f"{place} holds no rows")
        self._order: tuple[int, list[int]] = (-1, [])
        self._held: tuple[int, list[Row]] = (-1, [])

    def row(self, index: int) -> tuple[Row, str]:
        """Return row `index` of an endless sequence of epochs, and its name."""
        epoch, left = divmod(index, self.count)
        if self._order[0] != epoch:
            self._order = epoch, _shuffled(len(self.groups), self.seed, epoch)
        for number in self._order[1]:
            file, group, rows = self.groups[number]
            if left < rows:
                place = _shuffled(rows, self.seed, epoch, number)[left]
                return self._rows(number)[place], f"{file} row group {group} row {place}"
            left -= rows
        raise AssertionError("an index within the epoch has a row group")

    def _rows(self, number: int) -> list[Row]:
        if self._held[0] != number:
            file, group, _ = self.groups[number]
            try:
                table = _parquet(file).read_row_group(group, columns=self.columns)
            except Exception as error:  # pyarrow raises OSError, ArrowInvalid and others on damaged files
                raise BrokenRowError(f"{file} row group {group} cannot be read: {error}") from error
            self._held = number, table.to_pylist()
        return self._held[1]


def _parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading parquet files needs pyarrow: pip install 'bagel-mot[train]'") from error
    return pyarrow.parquet.ParquetFile(file)


class TextToImage:
    """Parquet files with `image` (bytes) and `captions` (JSON: a text, a list, or an object of texts).

    One caption is chosen at random and may be dropped; the image is the target.
    """

    def __init__(self, place: str | Path, maker: ItemMaker, *, seed: int = 0) -> None:
        self.rows = ParquetRows(place, ("image", "captions"), seed=seed)
        self.maker = maker

    def sample(self, index: int, rng: random.Random) -> list[Item]:
        """Return the sample of one row; see `bagel.training.stream.Source`."""
        return _named(self._items, *self.rows.row(index), rng)

    def _items(self, row: Row, rng: random.Random) -> list[Item]:
        captions = json.loads(row["captions"])
        choices = list(captions.values()) if isinstance(captions, dict) else captions
        caption = choices if isinstance(choices, str) else rng.choice(choices)
        if not isinstance(caption, str):
            raise ValueError(f"a caption must be a text, got {caption!r}")
        return [self.maker.text(caption, droppable=True), self.maker.latent(_open(row["image"]), loss=True)]


class Editing:
    """Parquet files with `image_list` (bytes) and `instruction_list` (between images: a text, or several).

    The first image is a condition; each later one is the target of its instruction, and a condition for the next.
    """

    def __init__(self, place: str | Path, maker: ItemMaker, *, seed: int = 0) -> None:
        self.rows = ParquetRows(place, ("image_list", "instruction_list"), seed=seed)
        self.maker = maker

    def sample(self, index: int, rng: random.Random) -> list[Item]:
        """Return the sample of one row; see `bagel.training.stream.Source`."""
        return _named(self._items, *self.rows.row(index), rng)

    def _items(self, row: Row, rng: random.Random) -> list[Item]:
        maker, steps = self.maker, row["instruction_list"]
        images = [_open(image) for image in row["image_list"]]
        if len(images) < 2 or len(images) != len(steps) + 1:
            raise ValueError(f"an edit needs one image more than instructions, got {len(images)} and {len(steps)}")
        items: list[Item] = []
        for before, after, step in zip(images, images[1:], steps, strict=False):
            words = step if isinstance(step, str) else rng.choice(step)
            items += [*maker.condition(before), maker.text(words, droppable=True), maker.latent(after, loss=True)]
        return items


class Conversations:
    """Jsonl of `{"image": path or paths, "conversations": [{"from": "human" or "gpt", "value": text}, ...]}`.

    `<image>` in a text stands for the next image. What "gpt" says is learned.

    Args:
        place: a file or a folder of them.
        maker: of the model.
        images: folder of the images, by default that of the jsonl file.
        seed: of the order, new in each epoch.
    """

    def __init__(self, place: str | Path, maker: ItemMaker, *, images: str | Path | None = None, seed: int = 0) -> None:
        files = find_files(place, ".jsonl")
        self.lines = [(file, number, start) for file in files for number, start in enumerate(_line_starts(file), 1)]
        if not self.lines:
            raise ValueError(f"{place} holds no lines")
        self.maker, self.images, self.seed = maker, images, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def sample(self, index: int, rng: random.Random) -> list[Item]:
        """Return the sample of one line; see `bagel.training.stream.Source`."""
        epoch, left = divmod(index, len(self.lines))
        if self._order[0] != epoch:
            self._order = epoch, _shuffled(len(self.lines), self.seed, epoch)
        file, number, start = self.lines[self._order[1][left]]
        with file.open("rb") as opened:
            opened.seek(start)
            row = {"line": opened.readline(), "folder": Path(self.images or file.parent)}
        return _named(self._items, row, f"{file} line {number}", rng)

    def _items(self, row: Row, rng: random.Random) -> list[Item]:
        talk = json.loads(row["line"])
        paths = talk.get("image", [])
        images = iter([paths] if isinstance(paths, str) else paths)
        items: list[Item] = []
        for turn in talk["conversations"]:
            if turn["from"] not in ("human", "gpt"):
                raise ValueError(f'"from" must be "human" or "gpt", got {turn["from"]!r}')
            items += _turn(turn, images, row["folder"], self.maker)
        unused = list(images)
        if unused:
            raise ValueError(f"no <image> stands for {unused}")
        return items


def _named(make: Callable[[Row, random.Random], list[Item]], row: Row, name: str, rng: random.Random) -> list[Item]:
    """Make items of a row; whatever is wrong with it is told with its name."""
    try:
        return make(row, rng)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise BrokenRowError(f"{name}: {type(error).__name__}: {error}") from error


def _turn(turn: Row, images: Any, folder: Path, maker: ItemMaker) -> list[Item]:
    items: list[Item] = []
    for number, text in enumerate(turn["value"].split("<image>")):
        if number:
            path = next(images, None)
            if path is None:
                raise ValueError("there are more <image> than images")
            items.append(maker.vit(open_image(folder / path)))
        if text.strip():
            items.append(maker.text(text.strip(), loss=turn["from"] == "gpt"))
    return items


def _line_starts(file: Path) -> list[int]:
    starts, position = [], 0
    with file.open("rb") as opened:
        for line in opened:
            if line.strip():
                starts.append(position)
            position += len(line)
    return starts


def _open(content: bytes) -> Image.Image:
    return open_image(Image.open(io.BytesIO(content)))
