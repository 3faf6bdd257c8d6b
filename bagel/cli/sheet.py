"""A contact sheet: rows of images, each over its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLUMN, GAP, MARGIN = 256, 20, 28
WIDTH = 3 * COLUMN + 2 * GAP  # between the margins
TITLE_SIZE, TEXT_SIZE, LINE = 24, 15, 20
PAPER, INK, FAINT, EDGE = "#f6f6f4", "#1c1c1c", "#74746f", "#c9c9c4"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """An image, what it is in a word or two, and lines to read under it."""

    image: Image.Image
    heading: str
    lines: tuple[str, ...] = ()


def contact_sheet(title: str, rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Return all rows under each other; the tiles of a row share its width, images up to `COLUMN` pixels wide."""
    drawn = [_row(tiles) for tiles in rows]
    height = 2 * MARGIN + TITLE_SIZE + sum(GAP + row.height for row in drawn)
    sheet = Image.new("RGB", (WIDTH + 2 * MARGIN, height), PAPER)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, INK, font=ImageFont.load_default(TITLE_SIZE))
    y = MARGIN + TITLE_SIZE
    for row in drawn:
        sheet.paste(row, (MARGIN, y + GAP))
        y += GAP + row.height
    return sheet


def enlarged(image: Image.Image, width: int) -> Image.Image:
    """Return an image at another width, as high as its shape asks for."""
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def _row(tiles: Sequence[Tile]) -> Image.Image:
    width = min(COLUMN, (WIDTH - (len(tiles) - 1) * GAP) // len(tiles))
    drawn = [_tile(tile, width) for tile in tiles]
    row = Image.new("RGB", (WIDTH, max(tile.height for tile in drawn)), PAPER)
    for index, tile in enumerate(drawn):
        row.paste(tile, (index * (width + GAP), 0))
    return row


def _tile(tile: Tile, width: int) -> Image.Image:
    font = ImageFont.load_default(TEXT_SIZE)
    image = enlarged(tile.image, width)
    lines = [line for text in tile.lines for line in _wrapped(text, font, width)]
    drawn = Image.new("RGB", (width, image.height + (1 + len(lines)) * LINE + LINE // 2), PAPER)
    drawn.paste(image, (0, 0))
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 0, width - 1, image.height - 1), outline=EDGE)
    for index, line in enumerate([tile.heading, *lines]):
        pen.text((0, image.height + LINE // 4 + index * LINE), line, INK if index else FAINT, font=font)
    return drawn


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of a width in pixels, between words alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
