"""Images on disk, written whole or not at all, never over another file.

PNG files carry how they were made; images that follow each other make an animated GIF.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save_png(image: Image.Image, path: str | Path, info: Mapping[str, str], *, overwrite: bool = False) -> Path:
    """Write an image as PNG with text entries and return its path.

    Args:
        image: the image.
        path: the file; its folder must exist.
        info: keyword to text, any unicode, readable with `read_info` and with most image viewers.
        overwrite: replace a file that is there already.

    Raises:
        FileExistsError: the file exists and `overwrite` is false.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    with _written(_png(image, info), beside=path) as part:
        _rename(part, path, overwrite=overwrite)
    return path


def save_numbered_png(image: Image.Image, folder: str | Path, stem: str, info: Mapping[str, str]) -> Path:
    """Write an image as `folder/stem-0001.png`, or under the number after the highest that is there.

    Two programs may fill one folder at once: each number is taken by one of them only. Arguments and errors otherwise
    as for `save_png`.
    """
    with _written(_png(image, info), beside=Path(folder) / stem) as part:
        return _numbered(part, Path(folder), stem, ".png")


def save_numbered_gif(frames: Sequence[Image.Image], folder: str | Path, stem: str, *, seconds: float) -> Path:
    """Write images of one size as `folder/stem-0001.gif`, which shows each for `seconds`, over and over.

    Numbers and errors as for `save_numbered_png`.
    """
    first, *rest = frames

    def write(file: BinaryIO) -> None:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0)

    with _written(write, beside=Path(folder) / stem) as part:
        return _numbered(part, Path(folder), stem, ".gif")


def read_info(path: str | Path) -> dict[str, str]:
    """Return the text entries of a PNG file, {} where it has none."""
    with Image.open(path) as image:
        image.load()  # entries may stand behind the pixels
        return {key: str(text) for key, text in getattr(image, "text", {}).items()}


def _png(image: Image.Image, info: Mapping[str, str]) -> Callable[[BinaryIO], None]:
    chunks = PngInfo()
    for key, text in info.items():
        chunks.add_itxt(key, text)
    return lambda file: image.save(file, format="PNG", pnginfo=chunks)


@contextmanager
def _written(write: Callable[[BinaryIO], None], *, beside: Path) -> Iterator[Path]:
    """Write a whole file under a temporary name in the folder of `beside`; gone at the end unless renamed."""
    part = beside.with_name(f".{beside.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            write(file)
        yield part
    finally:
        part.unlink(missing_ok=True)


def _numbered(part: Path, folder: Path, stem: str, suffix: str) -> Path:
    """Give a finished file the first number that is free after the highest, and return its path."""
    number = _highest(folder, stem, suffix) + 1
    while True:
        path = folder / f"{stem}-{number:04}{suffix}"
        try:
            _rename(part, path, overwrite=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _rename(part: Path, path: Path, *, overwrite: bool) -> None:
    """Give a finished file its name, which is claimed first so that a file made meanwhile is not lost."""
    if not overwrite:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(part, path)
    except BaseException:
        if not overwrite:
            path.unlink(missing_ok=True)
        raise


def _highest(folder: Path, stem: str, suffix: str) -> int:
    numbered = re.compile(re.escape(stem) + r"-(\d+)" + re.escape(suffix))
    found = [numbered.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0)
