"""The command that shows everything on a small built-in model: `bagel demo`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from PIL import Image, ImageDraw

import bagel
from bagel.pipeline import BagelPipeline
from bagel.png import save_numbered_png

CHECKPOINT = Path(bagel.__file__).parent / "demo" / "checkpoint"
RANDOM = (
    "This small model has random weights: it has learned nothing, so its pictures are patterns of noise and its "
    "answers are no words. What it shows is that every part runs."
)
PROMPTS = ("a red circle on white", "a small boat at sea", "three green squares")
INSTRUCTION = "make the circle blue"
QUESTION = "What is in the picture?"
STEPS = 12
MARGIN, CAPTION = 12, 22


def demo(args: Namespace) -> None:
    """Draw, edit and ask on the built-in model, and leave the pictures and a contact sheet in a folder."""
    folder = Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    print(RANDOM)
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    drawn = pipe.text_to_image(PROMPTS, height=192, width=256, num_timesteps=STEPS, seed=[1, 2, 3])
    tiles = [(result.image, prompt) for prompt, result in zip(PROMPTS, drawn, strict=True)]
    photo = input_picture()
    edited = pipe.edit(photo, INSTRUCTION, num_timesteps=STEPS, seed=4)
    tiles += [(photo, "an input picture"), (edited.image, INSTRUCTION)]
    answer = pipe.understand(photo, QUESTION, max_new_tokens=24)
    print(f"{QUESTION} {answer.text}")
    for stem, (image, prompt) in zip(("draw", "draw", "draw", "input", "edit"), tiles, strict=True):
        print(save_numbered_png(image, folder, stem, _info(prompt)))
    sheet = contact_sheet(tiles)
    print(save_numbered_png(sheet, folder, "contact-sheet", _info("all of them")))


def input_picture() -> Image.Image:
    """Return a picture to edit and ask about: a red circle and a green square, 256 x 192."""
    image = Image.new("RGB", (256, 192), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 40, 136, 152), fill="#d33")
    draw.rectangle((160, 80, 232, 152), fill="#2a5")
    return image


def contact_sheet(tiles: list[tuple[Image.Image, str]]) -> Image.Image:
    """Return all pictures side by side in rows of three, each over its caption."""
    columns = 3
    rows = -(-len(tiles) // columns)
    width = max(image.width for image, _ in tiles) + MARGIN
    height = max(image.height for image, _ in tiles) + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(tiles):
        x, y = MARGIN + index % columns * width, MARGIN + index // columns * height
        sheet.paste(image, (x, y))
        draw.text((x, y + image.height + 4), caption, fill="black")
    draw.text((MARGIN, sheet.height - CAPTION), "Random weights: drawn pictures are patterns of noise.", fill="black")
    return sheet


def _info(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "model": "demo, random weights", "software": f"bagel-mot {bagel.__version__}"}
