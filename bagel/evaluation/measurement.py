"""A pipeline under measurement: deals out examples of the world, runs them in batches, and judges what comes back.

Example `i` of a row depends on the settings' seed, the kind of the example and `i` alone, and is drawn with the noise
of seed + i. So neither the batch size nor the other tasks change it, and fewer examples are the first of more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from bagel.evaluation.judge import judge
from bagel.evaluation.language import full_caption
from bagel.evaluation.samples import Example, sample
from bagel.evaluation.scene import SPLITS
from bagel.evaluation.table import Row, Trial, rate_row
from bagel.options import make_options
from bagel.pipeline import BagelPipeline
from bagel.results import ImageResult

ANSWER_TOKENS = 128  # limit of an answer; the longest caption of the world has 32 words


@dataclass(frozen=True)
class Settings:
    """Say how to measure.

    `count` examples per row; `split` and `seed` of the examples; `side` of the images in pixels, by default as large
    as the model draws unasked; `batch_size` requests at a time; `keep_images` of failures in their trials.
    `drawing`: options of `bagel.options.ImageOptions` for every image drawn, over the defaults of its task and 25
    timesteps. Raises ValueError or TypeError for what cannot be meant.
    """

    count: int = 100
    split: str = "held_out"
    seed: int = 0
    side: int | None = None
    batch_size: int = 8
    keep_images: bool = False
    drawing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawing", {"num_timesteps": 25, "progress": False, **self.drawing})
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.side is not None and (self.side < 16 or self.side % 16):
            raise ValueError(f"side must be a positive multiple of 16, got {self.side}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        make_options("text_to_image", self.drawing)


@dataclass(frozen=True)
class Batch:
    """Hold some examples of a row and the seed of each."""

    examples: list[Example]
    seeds: list[int]

    @property
    def texts(self) -> list[str]:
        """Caption, question, instruction or prompt of each example."""
        return [text_of(example) for example in self.examples]


class Measurement:
    """A pipeline with the settings to measure it by.

    Args:
        pipe: the pipeline.
        settings: how to measure it.
    """

    def __init__(self, pipe: BagelPipeline, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.side = settings.side or largest_side(pipe)

    def batches(
        self,
        name: str,
        *kinds: tuple[str, str | None],
        split: str | None = None,
        balanced: bool = False,
        count: int | None = None,
    ) -> Iterator[Batch]:
        """Yield the examples of a row, of each kind (task, detail) in turn; split and count are those of the settings.

        `balanced` takes questions to answer with yes and with no in turn. A terminal shows a bar under `name`.
        """
        count, size = count or self.settings.count, self.settings.batch_size
        with tqdm(total=count, desc=name, leave=False, disable=None) as bar:
            for start in range(0, count, size):
                numbers = range(start, min(start + size, count))
                examples = []
                for i in numbers:
                    task, detail = kinds[i % len(kinds)]
                    answer = ("yes", "no")[i % 2] if balanced else None
                    examples.append(self._example(i, task, detail, split or self.settings.split, answer))
                yield Batch(examples, [self.settings.seed + i for i in numbers])
                bar.update(len(numbers))

    def _example(self, number: int, task: str, detail: str | None, split: str, answer: str | None) -> Example:
        rng = random.Random(f"{self.settings.seed} {number} {task} {detail} {split}")
        while True:
            example = sample(rng, task, split, side=self.side, detail=detail)
            if answer is None or example.outputs == (answer,):
                return example

    def draw(self, batch: Batch, **options: Any) -> list[ImageResult]:
        """Draw from each example's text."""
        chosen = {"height": self.side, "width": self.side, **self.settings.drawing, **options}
        return self.pipe.text_to_image(batch.texts, seed=batch.seeds, **chosen)

    def edit(self, batch: Batch, images: list[list[Image.Image]], texts: list[str]) -> list[Image.Image]:
        """Draw from images and a text for each example."""
        results = self.pipe.edit(images, texts, seed=batch.seeds, **self.settings.drawing)
        return [result.image for result in results]

    def answer(self, batch: Batch) -> list[str]:
        """Answer each example's question about its image, by the likeliest token each time."""
        images = [images_of(example) for example in batch.examples]
        results = self.pipe.understand(images, batch.texts, max_new_tokens=ANSWER_TOKENS, progress=False)
        return [result.text for result in results]

    def drawn_row(self, name: str, batches: Iterable[Batch], *, note: str = "", **options: Any) -> Row:
        """Return the row of images drawn from texts and judged by what the texts state."""
        trials = []
        for batch in batches:
            for example, seed, result in zip(batch.examples, batch.seeds, self.draw(batch, **options), strict=True):
                trials.append(self.judged(example, seed, result.image))
        return rate_row(name, trials, note)

    def judged(self, example: Example, seed: int, image: Image.Image) -> Trial:
        """Judge an image by what the example's text states."""
        right, seen = verdict_of(example, image)
        images = self.kept(image, right=right)
        return Trial(text_of(example), seed, right, full_caption(example.scenes[-1]), seen, images)

    def kept(self, *images: Image.Image, right: bool) -> tuple[Image.Image, ...]:
        """Return the images of a failure if they are wanted later."""
        return images if self.settings.keep_images and not right else ()


def largest_side(pipe: BagelPipeline) -> int:
    """Return the side, in pixels, of the images that a model draws unasked."""
    return pipe.processor.default_side


def text_of(example: Example) -> str:
    """Return the one text among what a model is given."""
    (text,) = (part for part in example.inputs if isinstance(part, str))
    return text


def images_of(example: Example) -> list[Image.Image]:
    """Return the images among what a model is given."""
    return [part for part in example.inputs if isinstance(part, Image.Image)]


def verdict_of(example: Example, image: Image.Image) -> tuple[bool, str]:
    """Tell whether an image shows all that is stated, and describe it, with what is wrong."""
    verdict = judge(image, example.scenes[-1], attributes=example.stated)
    wrong = ", ".join(name for name, is_right in verdict.right.items() if not is_right)
    return verdict.all_right, full_caption(verdict.reading.scene) + (f" (wrong: {wrong})" if wrong else "")
