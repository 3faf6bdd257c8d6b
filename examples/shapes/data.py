"""The shapes world as training samples: which pieces of an example are shown, dropped, or to be learned.

To train on your own data, write such a function: from a random generator to a list of items.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from bagel.evaluation.edits import Edit
from bagel.evaluation.questions import ask
from bagel.evaluation.render import render
from bagel.evaluation.samples import DETAILS, Example, reworded, sample
from bagel.evaluation.scene import Scene, random_scene
from bagel.evaluation.tasks import NEXT_FRAME, SHOWN_FRAMES
from bagel.options import THINK_GENERATE
from bagel.training import ItemMaker
from bagel.training.samples import Item

WEIGHTS = {"t2i1": 2, "t2i2": 6, "t2i3": 7, "caption": 5, "qa": 16, "edit": 72, "think": 4, "frames": 32}
"""How often each task is drawn: most often those that take longest to learn."""
CHANGED = {"recolor": 3, "move": 4, "add": 1, "remove": 2, "background": 4}
"""How often an edit is of each kind."""
SEVERAL = 0.6
"""How often an edit begins with two shapes at least, or with three, as far as it allows: there is more to mistake."""
ON_BLACK = 0.35
"""How often an edit begins or ends on black at least: no other background is as hard."""
DROPPED = {"t2i1": 0.1, "t2i2": 0.1, "t2i3": 0.1, "think": 0.15, "edit": 0.4, "frames": 0.5}
"""How often the texts of a task are left out.

Guidance amplifies the difference that the text makes, mistakes of the model without it included.
"""
IMAGES_DROPPED = 0.1
"""How often all images to edit or to continue are left out, and the text is there."""
WORDINGS = {"full": 2, "brief": 2, "relation": 6, "count": 4}
"""How often a caption is worded so: those that leave open what stands where take longer to learn."""
TOPICS = {"yes_no": 6, "kind": 4, "place": 3, "count": 3, "color": 2, "size": 2, "background": 1}
"""How often each topic is asked about."""
TARGETS = 4
"""Noisy copies of an image to learn from, at times of their own: what they follow is read once for all of them."""
QUESTIONS = 3
"""Questions about one image, one after the other as in a chat."""


@dataclass(frozen=True)
class Shapes:
    """Makes the items of one task; holds nothing but how."""

    task: str
    maker: ItemMaker
    side: int

    def __call__(self, rng: random.Random) -> Sequence[Item]:
        """Return the items of one random example."""
        if self.task == "qa":
            return self.chat(random_scene(rng, objects=rng.choice((1, 2, 3))), rng)
        return self.shown(self.example(rng), rng)

    def example(self, rng: random.Random) -> Example:
        """Return one random example, its images drawn."""
        if self.task == "edit":
            return self.example_of_edit(rng)
        detail = None
        if self.task.startswith("t2i"):
            wordings = DETAILS[self.task]
            (detail,) = rng.choices(wordings, [WORDINGS[name] for name in wordings])
        return sample(rng, "video" if self.task == "frames" else self.task, side=self.side, detail=detail)

    def example_of_edit(self, rng: random.Random) -> Example:
        """Return one random edit, more often of those that are hard."""
        (change,) = rng.choices(list(CHANGED), list(CHANGED.values()))
        at_least = rng.choice((2, 3)) if rng.random() < SEVERAL else 1
        if change == "add":
            at_least = min(at_least, 2)
        anywhere = rng.random() >= ON_BLACK

        def wanted(edit: Edit) -> bool:
            on_black = "black" in (edit.before.background, edit.after.background)
            return (anywhere or on_black) and len(edit.before.objects) >= at_least

        return sample(rng, "edit", side=self.side, detail=change, wanted=wanted)

    def items(self, example: Example, rng: random.Random) -> Sequence[Item]:
        """Return the items of an example that was kept, in words drawn afresh."""
        return self.shown(reworded(rng, example, WORDINGS), rng)

    def shown(self, example: Example, rng: random.Random) -> Sequence[Item]:
        """Return the items of an example as it is."""
        if self.task.startswith("t2i"):
            return self.text_to_image(example, rng)
        return {"caption": self.caption, "edit": self.edit, "think": self.think, "frames": self.frames}[self.task](
            example, rng
        )

    def text_to_image(self, example: Example, rng: random.Random) -> list[Item]:
        """Caption, then the image to learn."""
        (caption,), (image,) = example.inputs, example.outputs
        return [*self.given([], caption, rng), *self.targets(image)]

    def caption(self, example: Example, rng: random.Random) -> list[Item]:
        """Image and request, then the caption to learn; a question sees the image through the ViT only."""
        (image, request), (caption,) = example.inputs, example.outputs
        return [self.maker.vit(image), self.maker.text(request), self.maker.text(caption, loss=True)]

    def chat(self, scene: Scene, rng: random.Random) -> list[Item]:
        """Image, then questions, each followed by its answer to learn."""
        items: list[Item] = [self.maker.vit(render(scene, side=self.side))]
        topics = rng.choices(list(TOPICS), list(TOPICS.values()), k=2 * QUESTIONS)
        asked = [ask(rng, scene, about=topic) for topic in topics]
        for question in [question for question in asked if question is not None][:QUESTIONS]:
            items += [self.maker.text(question.text), self.maker.text(question.answer, loss=True)]
        return items

    def edit(self, example: Example, rng: random.Random) -> list[Item]:
        """Image (as latents and through the ViT) and instruction, then the changed image to learn."""
        image, instruction = example.inputs
        return [*self.given([image], instruction, rng), *self.targets(example.outputs[0])]

    def think(self, example: Example, rng: random.Random) -> list[Item]:
        """System prompt, prompt, the plan to learn, the image to learn.

        Guidance compares with the system prompt alone, so prompt and plan are left out together.
        """
        system, (prompt,), (plan, image) = self.maker.text(THINK_GENERATE), example.inputs, example.outputs
        if rng.random() < DROPPED["think"]:
            return [system, *self.targets(image)]
        return [system, self.maker.text(prompt), self.maker.text(plan, loss=True), *self.targets(image)]

    def frames(self, example: Example, rng: random.Random) -> list[Item]:
        """Three frames in a row, then the fourth to learn."""
        first = rng.randrange(len(example.outputs) - SHOWN_FRAMES)
        frames = example.outputs[first : first + SHOWN_FRAMES + 1]
        return [*self.given(frames[:-1], NEXT_FRAME, rng), *self.targets(frames[-1])]

    def targets(self, image: Image.Image) -> list[Item]:
        """Return the image to learn; the copies do not see one another."""
        return [self.maker.latent(image, loss=True)] * TARGETS

    def given(self, images: Sequence[Image.Image], text: str, rng: random.Random) -> list[Item]:
        """Return both views of each input image, then the text; one or the other is left out now and then.

        Both together never are: guidance has no such branch.
        """
        left_out = rng.random()
        shown = [] if left_out < IMAGES_DROPPED else images
        told = [] if left_out >= 1 - DROPPED[self.task] else [self.maker.text(text)]
        return [*(view for image in shown for view in self.maker.condition(image, droppable=False)), *told]
