"""The command that shows what the built-in model can do: `bagel demo`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps

import bagel
from bagel.cli.images import describe
from bagel.cli.sheet import COLUMN, Tile, contact_sheet, enlarged
from bagel.demo import CHECKPOINT
from bagel.evaluation.measurement import largest_side
from bagel.evaluation.motion import Motion
from bagel.evaluation.scene import Scene, Shape
from bagel.evaluation.tasks import NEXT_FRAME, SHOWN_FRAMES
from bagel.options import make_options
from bagel.pipeline import BagelPipeline
from bagel.png import save_numbered_gif, save_numbered_png
from bagel.results import ImageResult

PROMPTS = (
    "a large red circle in the center on a light blue background",
    "a green diamond above an orange square on a white background",
    "three blue stars on a beige background",
)
QUESTIONS = ("how big is the circle?", "what color is the diamond?", "what color is the background?")
EDITS = ("add a small yellow star at the top right", "make the background white")
RIDDLE = "a large circle of the color of grass in the center on a background of the color of snow"
MOTION = Motion(
    scene=Scene((Shape("star", "purple", "medium", "center"),), "light green"),
    direction="up and right",
    start=(0.25, 0.75),
    velocity=(0.0625, -0.0625),
)
DRAWING = {"num_timesteps": 25, "progress": False}
THINKING = {"think": True, "max_think_tokens": 64}
ANSWER_TOKENS = 32
BORDER, GIVEN, PREDICTED = 6, "#b9b9b4", "#f08030"
FRAME_SECONDS = 0.35


def demo(args: Namespace) -> None:
    """Draw, ask, edit, think and predict with the built-in model; leave images, a film and a contact sheet."""
    folder = Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        _show(folder)


def _show(folder: Path) -> None:
    with _timed("loaded the built-in model, a small BAGEL trained on colored shapes"):
        pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    drawn = _draw(pipe, folder)
    changed = [*_edit(pipe, folder, drawn[0].image), _think(pipe, folder)]
    sheet = contact_sheet("What the built-in model draws", [drawn, changed, _predict(pipe, folder)])
    info = {"model": "demo", "software": f"bagel-mot {bagel.__version__}"}
    print(save_numbered_png(sheet, folder, "contact-sheet", info))


def _draw(pipe: BagelPipeline, folder: Path) -> list[Tile]:
    """Draw from each prompt, then ask about each image."""
    with _timed("drew three images"):
        results = pipe.text_to_image(PROMPTS, seed=[1, 2, 3], **DRAWING)
    with _timed("answered three questions about them"):
        images = [result.image for result in results]
        answers = pipe.understand(images, QUESTIONS, max_new_tokens=ANSWER_TOKENS, progress=False)
    tiles = []
    for prompt, result, question, answer in zip(PROMPTS, results, QUESTIONS, answers, strict=True):
        said = prompt, f"asked: {question}", f"answered: {answer.text}"
        print("  " + "\n    ".join(said))
        _save(result, folder, "draw", prompt)
        tiles.append(Tile(result.image, "drawn", said))
    return tiles


def _edit(pipe: BagelPipeline, folder: Path, image: Image.Image) -> list[Tile]:
    """Change an image, and what comes out again."""
    tiles = []
    with _timed("edited the first image twice"):
        for seed, instruction in enumerate(EDITS, 4):
            result = pipe.edit(image, instruction, seed=seed, **DRAWING)
            _save(result, folder, "edit", instruction)
            tiles.append(Tile(result.image, "edited again" if tiles else "edited", (instruction,)))
            image = result.image
    print("\n".join(f"  {instruction}" for instruction in EDITS))
    return tiles


def _think(pipe: BagelPipeline, folder: Path) -> Tile:
    """Draw what has to be worked out first."""
    with _timed("thought, then drew"):
        result = pipe.text_to_image(RIDDLE, seed=6, **THINKING, **DRAWING)
    _save(result, folder, "think", RIDDLE)
    said = RIDDLE, f"plan: {result.text}"
    print("  " + "\n    ".join(said))
    return Tile(result.image, "thought about, then drawn", said)


def _predict(pipe: BagelPipeline, folder: Path) -> list[Tile]:
    """Continue a motion, each predicted frame an input of the next, and leave it as an animated image."""
    truth = MOTION.frames(side=largest_side(pipe))
    given, missing = truth[:SHOWN_FRAMES], len(truth) - SHOWN_FRAMES
    predicted: list[Image.Image] = []
    with _timed(f"predicted {missing} frames from {len(given)}"):
        for seed in range(7, 7 + missing):
            last = [*given, *predicted][-SHOWN_FRAMES:]
            predicted.append(pipe.edit(last, NEXT_FRAME, seed=seed, **DRAWING).image)
    film = [_framed(frame, GIVEN) for frame in given] + [_framed(frame, PREDICTED) for frame in predicted]
    print(save_numbered_gif(film, folder, "next-frames", seconds=FRAME_SECONDS))
    return [Tile(frame, "given") for frame in given] + [Tile(frame, "predicted") for frame in predicted]


def _framed(image: Image.Image, color: str) -> Image.Image:
    return ImageOps.expand(enlarged(image, COLUMN), BORDER, color)


def _save(result: ImageResult, folder: Path, stem: str, prompt: str) -> None:
    task = "edit" if stem == "edit" else "text_to_image"
    options = make_options(task, {**DRAWING, **(THINKING if stem == "think" else {})})
    info = describe(result, prompt, options, task=task.replace("_", "-"), model="demo")
    save_numbered_png(result.image, folder, stem, info)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep to one thread: a model this small gains little from more, and on busy cores they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Print what was done and how long it took, when it is done."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
