"""The shapes world as training samples: which pieces of an example are shown, dropped, or to be learned.

To train on your own data, write such a function: from a random generator to a list of items.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from bagel.evaluation.samples import Example, sample
from bagel.evaluation.tasks import NEXT_FRAME, SHOWN_FRAMES
from bagel.options import THINK_GENERATE
from bagel.training import ItemMaker
from bagel.training.samples import Item

WEIGHTS = {"t2i1": 4, "t2i2": 3, "t2i3": 3, "caption": 2, "qa": 2, "edit": 4, "think": 1.5, "frames": 1}
"""How often each task is drawn."""


@dataclass(frozen=True)
class Shapes:
    """Makes the items of one task; holds nothing but how."""

    task: str
    maker: ItemMaker
    side: int
    split: str = "train"

    def __call__(self, rng: random.Random) -> Sequence[Item]:
        """Return the items of one random example."""
        example = sample(rng, "video" if self.task == "frames" else self.task, self.split, side=self.side)
        if self.task.startswith("t2i"):
            return self.text_to_image(example)
        if self.task in ("caption", "qa"):
            return self.answer(example)
        return {"edit": self.edit, "think": self.think, "frames": self.frames}[self.task](example, rng)

    def text_to_image(self, example: Example) -> list[Item]:
        """Caption, then the picture to learn; the caption is dropped now and then."""
        (caption,), (picture,) = example.inputs, example.outputs
        return [self.maker.text(caption, droppable=True), self.maker.latent(picture, loss=True)]

    def answer(self, example: Example) -> list[Item]:
        """Picture and question, then the answer to learn; a question sees the picture through the ViT only."""
        picture, question = example.inputs
        answer = example.outputs[0]
        return [self.maker.vit(picture), self.maker.text(question), self.maker.text(answer, loss=True)]

    def edit(self, example: Example, rng: random.Random) -> list[Item]:
        """Picture (as latents and through the ViT) and instruction, then the changed picture to learn."""
        picture, instruction = example.inputs
        return [
            *self.shown([picture], rng),
            self.maker.text(instruction, droppable=True),
            self.target(example.outputs[0]),
        ]

    def think(self, example: Example, rng: random.Random) -> list[Item]:
        """System prompt, prompt, the plan to learn, the picture to learn.

        Guidance compares with the system prompt alone, so prompt and plan are left out together.
        """
        system, (prompt,), (plan, picture) = self.maker.text(THINK_GENERATE), example.inputs, example.outputs
        if rng.random() < 0.1:
            return [system, self.target(picture)]
        return [system, self.maker.text(prompt), self.maker.text(plan, loss=True), self.target(picture)]

    def frames(self, example: Example, rng: random.Random) -> list[Item]:
        """Three frames in a row, then the fourth to learn."""
        first = rng.randrange(len(example.outputs) - SHOWN_FRAMES)
        frames = example.outputs[first : first + SHOWN_FRAMES + 1]
        text = self.maker.text(NEXT_FRAME, droppable=True)
        return [*self.shown(frames[:-1], rng), text, self.target(frames[-1])]

    def target(self, picture: Image.Image) -> Item:
        """Return the picture to learn."""
        return self.maker.latent(picture, loss=True)

    def shown(self, pictures: Sequence[Image.Image], rng: random.Random) -> list[Item]:
        """Return both views of each input picture; now and then all pictures are left out, as guidance does."""
        if rng.random() < 0.1:
            return []
        return [view for picture in pictures for view in self.maker.condition(picture)]
