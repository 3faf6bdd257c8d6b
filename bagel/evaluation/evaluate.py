"""Measure a model on the shapes world: the table of what it can do, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bagel.evaluation import tasks as measured
from bagel.evaluation.measurement import Measurement, Settings
from bagel.evaluation.table import Row
from bagel.modeling import MissingHalfError
from bagel.pipeline import BagelPipeline

_MEASURE: dict[str, Callable[[Measurement], Iterator[Row]]] = {
    "timing": measured.timing,  # first, so that the memory is that of single requests
    "t2i": measured.text_to_image,
    "wordings": measured.wordings,
    "new_pairs": measured.new_pairs,
    "guidance": measured.guidance,
    "caption": measured.captions,
    "qa": measured.questions,
    "edit": measured.edits,
    "think": measured.think,
    "frames": measured.next_frames,
}
TASKS = tuple(_MEASURE)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ValueError for a task that does not exist, or for none at all."""
    wrong = [task for task in tasks if task not in _MEASURE]
    if wrong or not tasks:
        raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {', '.join(map(repr, wrong)) or 'none'}")


def measure(pipe: BagelPipeline, settings: Settings, *, tasks: Sequence[str] = TASKS) -> Iterator[Row]:
    """Yield the rows of some of `TASKS` as they are measured.

    A task that the model lacks a half for is one row that says so. Raises ValueError for an unknown task.
    """
    check_tasks(tasks)
    of = Measurement(pipe, settings)
    for task in tasks:
        try:
            yield from _MEASURE[task](of)
        except MissingHalfError as error:
            yield Row(task, note=f"not possible: {error}")


def evaluate(
    pipe: BagelPipeline,
    *,
    count: int = 100,
    tasks: Sequence[str] = TASKS,
    split: str = "held_out",
    seed: int = 0,
    side: int | None = None,
    batch_size: int = 8,
    keep_images: bool = False,
    **drawing: Any,
) -> list[Row]:
    """Measure a pipeline on the shapes world and return the table; equal settings give equal rates.

    Args:
        pipe: the model.
        count: examples per row.
        tasks: which of `TASKS`.
        split: of the examples: "held_out", "new_pairs" or "train".
        seed: of the examples and the noise.
        side: of the images in pixels, a multiple of 16; by default as large as the model draws unasked.
        batch_size: requests at a time; changes the speed only, rounding aside.
        keep_images: keep those of failures in the rows' trials.
        drawing: options for every image drawn, see `bagel.options.ImageOptions`; 25 timesteps by default.

    Raises:
        ValueError, TypeError: a setting that does not exist or is out of range.
    """
    settings = Settings(
        count=count,
        split=split,
        seed=seed,
        side=side,
        batch_size=batch_size,
        keep_images=keep_images,
        drawing=drawing,
    )
    return list(measure(pipe, settings, tasks=tasks))
