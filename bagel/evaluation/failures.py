"""What an evaluation leaves on disk: its figures as JSON, the images of failures, and a contact sheet of them."""

from __future__ import annotations

import json
import os
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from bagel.evaluation.table import Row, Trial
from bagel.png import save_numbered_png

COLUMNS, TILE_WIDTH, IMAGE_HEIGHT, CAPTION_HEIGHT, MARGIN = 4, 320, 96, 92, 8
LINE_LENGTH, CAPTION_LINES = 50, 6
MAX_TILES = 120


def write_json(path: str | Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write rows and what they were measured with, whole or not at all.

    Every row lists its failures: prompt, seed, what was wanted and what was seen.
    """
    path = Path(path)
    text = json.dumps({**about, "rows": [_plain(row) for row in rows]}, ensure_ascii=False, indent=1)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": row.name, "note": row.note}
    if row.value is not None:
        return plain | {"value": row.value, "unit": row.unit}
    if row.rate is None:
        return plain
    failures = [
        {"prompt": trial.prompt, "seed": trial.seed, "wanted": trial.wanted, "seen": trial.seen}
        for trial in row.trials
        if not trial.right
    ]
    figures = {"right": row.right, "total": row.total, "rate": row.rate, "interval": row.interval}
    return plain | figures | {"failures": failures}


def save_failures(folder: str | Path, rows: Sequence[Row]) -> list[Path]:
    """Write one PNG for each failure whose images were kept and, first of the paths returned, a contact sheet.

    A failure's images stand side by side, what the model drew last; the file's text entries tell the rest. The
    sheet takes in turn from each row, `MAX_TILES` in all. No file is replaced. Nothing is written without failures.
    """
    folder = Path(folder)
    failed = [(row, [t for t in row.trials if not t.right and t.images]) for row in rows]
    failed = [(row, trials) for row, trials in failed if trials]
    if not failed:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row, trials in failed:
        stem = "-".join("".join(c if c.isalnum() else " " for c in row.name).split())
        for trial in trials:
            info = {"task": row.name, "prompt": trial.prompt, "seed": str(trial.seed)}
            info |= {"wanted": trial.wanted, "seen": trial.seen}
            paths.append(save_numbered_png(_side_by_side(trial.images), folder, stem, info))
    share = max(1, MAX_TILES // len(failed))
    tiles = [_tile(row, trial) for row, trials in failed for trial in trials[:share]]
    return [save_numbered_png(_sheet(tiles), folder, "contact-sheet", {"task": "failures"}), *paths]


def _side_by_side(images: Sequence[Image.Image], *, gap: int = 2) -> Image.Image:
    width = sum(image.width + gap for image in images) - gap
    strip = Image.new("RGB", (width, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + gap
    return strip


def _tile(row: Row, trial: Trial) -> Image.Image:
    """Draw a failure's images over what was asked and what is seen."""
    tile = Image.new("RGB", (TILE_WIDTH, IMAGE_HEIGHT + CAPTION_HEIGHT), "white")
    strip = _side_by_side(trial.images)
    scale = min(TILE_WIDTH / strip.width, IMAGE_HEIGHT / strip.height)
    size = max(1, round(strip.width * scale)), max(1, round(strip.height * scale))
    tile.paste(strip.resize(size, Image.Resampling.LANCZOS), (0, 0))
    texts = (f"{row.name}, seed {trial.seed}", f"asked: {trial.prompt}", f"seen: {trial.seen}")
    lines = [line for text in texts for line in textwrap.wrap(text, LINE_LENGTH)]
    ImageDraw.Draw(tile).multiline_text((0, IMAGE_HEIGHT + 2), "\n".join(lines[:CAPTION_LINES]), "black", spacing=2)
    return tile


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    rows = -(-len(tiles) // COLUMNS)
    width, height = TILE_WIDTH + MARGIN, IMAGE_HEIGHT + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), (225, 225, 225))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height))
    return sheet
