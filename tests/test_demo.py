"""What `bagel demo` leaves and tells, and its contact sheet. Whether the images are right: test_small_model.py."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageColor, ImageSequence

from bagel import BagelPipeline
from bagel.cli import main
from bagel.cli.demo import BORDER, EDITS, PROMPTS, QUESTIONS, RIDDLE
from bagel.cli.sheet import COLUMN, GAP, MARGIN, PAPER, WIDTH, Tile, contact_sheet
from bagel.demo import CHECKPOINT
from bagel.png import read_info, save_numbered_gif

IMAGES = ("draw-0001", "draw-0002", "draw-0003", "edit-0001", "edit-0002", "think-0001", "contact-sheet-0001")


@dataclass(frozen=True)
class Shown:
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Shown:
    """What one demo left and printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--out", str(folder)]) == 0
    return Shown(folder, printed.getvalue())


def test_demo_leaves_images_a_film_and_a_contact_sheet(shown):
    names = {path.name for path in shown.folder.iterdir()}
    assert names == {f"{name}.png" for name in IMAGES} | {"next-frames-0001.gif"}


def test_demo_tells_what_was_asked_and_how_long_it_took(shown):
    for words in (*PROMPTS, *QUESTIONS, *EDITS, RIDDLE, "plan: "):
        assert words in shown.printed
    for done in ("loaded", "drew three", "answered three", "edited", "thought", "predicted 4 frames from 3"):
        (line,) = [line for line in shown.printed.splitlines() if line.startswith(done)]
        assert line.endswith(" s")


def test_demo_shows_given_and_predicted_frames_in_its_film(shown):
    with Image.open(shown.folder / "next-frames-0001.gif") as film:
        assert film.size == (COLUMN + 2 * BORDER, COLUMN + 2 * BORDER)
        edges = [frame.convert("RGB").getpixel((0, 0)) for frame in ImageSequence.Iterator(film)]
    assert len(edges) == 7
    assert len(set(edges[:3])) == len(set(edges[3:])) == 1
    assert edges[0] != edges[3]


def test_an_image_of_the_demo_can_be_drawn_again(shown):
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    with Image.open(shown.folder / "think-0001.png") as found:
        info, pixels = read_info(shown.folder / "think-0001.png"), found.tobytes()
    names = ("num_timesteps", "seed", "think", "max_think_tokens", "height", "width")
    again = pipe.text_to_image(info["prompt"], **{name: json.loads(info["parameters"])[name] for name in names})
    assert again.text == info["plan"]
    assert again.image.tobytes() == pixels


def test_demo_replaces_nothing(shown, tmp_path):
    kept = {path.name: path.read_bytes() for path in shown.folder.iterdir()}
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert {"contact-sheet-0002.png", "next-frames-0002.gif"} <= {path.name for path in tmp_path.iterdir()}


def test_a_contact_sheet_shows_every_image_and_leaves_margins():
    colors = ("red", "green", "blue", "cyan", "magenta", "yellow", "black")
    tiles = [Tile(Image.new("RGB", (16, 16), color), "heading", ("a caption " * 20,)) for color in colors]
    sheet = contact_sheet("title", [tiles[:3], tiles])
    assert sheet.width == WIDTH + 2 * MARGIN
    counted = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height)}  # pyright: ignore
    large, small = ((COLUMN - 2) ** 2, ((WIDTH - 6 * GAP) // 7 - 2) ** 2)
    assert [counted[ImageColor.getrgb(color)] for color in colors] == [large + small] * 3 + [small] * 4
    edge = sheet.crop((0, 0, MARGIN, sheet.height)), sheet.crop((0, sheet.height - MARGIN // 2, *sheet.size))
    assert all(strip.getcolors() == [(strip.width * strip.height, ImageColor.getrgb(PAPER))] for strip in edge)


def test_a_film_shows_every_frame_for_its_time(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    path = save_numbered_gif(frames, tmp_path, "film", seconds=0.25)
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        for number, frame in enumerate(frames):
            film.seek(number)
            assert film.info["duration"] == 250
            assert film.convert("RGB").tobytes() == frame.tobytes()
    assert [path, save_numbered_gif(frames, tmp_path, "film", seconds=0.25)] == [
        tmp_path / "film-0001.gif",
        tmp_path / "film-0002.gif",
    ]
