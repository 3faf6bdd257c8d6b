"""Examples of every task of the shapes world, for training and for evaluation alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from PIL import Image

from bagel.evaluation.edits import CHANGES, Edit, edit
from bagel.evaluation.language import (
    ATTRIBUTES,
    WORDINGS,
    Caption,
    caption,
    full_caption,
    noun_phrase,
    plain,
    with_article,
)
from bagel.evaluation.motion import Motion, random_motion
from bagel.evaluation.plans import plan
from bagel.evaluation.questions import CAPTION_REQUESTS, TOPICS, ask
from bagel.evaluation.render import render
from bagel.evaluation.scene import Scene, random_scene, split_of

TASKS = ("t2i1", "t2i2", "t2i3", "caption", "qa", "edit", "think", "video")

# What `sample` may be asked for in particular: a wording, a topic, a change or a kind of plan.
DETAILS = {
    **{f"t2i{count}": wordings for count, wordings in WORDINGS.items()},
    **{"qa": TOPICS, "edit": CHANGES, "think": ("indirect", "clear")},
}

INSTRUCTIONS_DRAWN = 40
"""Edits drawn at most to find one that does the same in other words."""

Part = str | Image.Image


@dataclass(frozen=True)
class Example:
    """Hold what a model is given (`inputs`) and should give (`outputs`), texts and RGB images in order.

    `scenes`: what the images show (before and after, for an edit). `stated`: the attributes that the inputs fix, on
    which a drawn image is judged. `detail`: which of `DETAILS[task]` it is (a video's direction).
    `motion`: the line of a video's shape.

    | task | inputs | outputs |
    |---|---|---|
    | t2i1, t2i2, t2i3 | caption | image |
    | caption, qa | image, question | answer |
    | edit | image, instruction | image |
    | think | prompt | plan, image |
    | video | caption | 7 frames |
    """

    task: str
    inputs: tuple[Part, ...]
    outputs: tuple[Part, ...]
    scenes: tuple[Scene, ...]
    stated: frozenset[str] = frozenset()
    detail: str = ""
    motion: Motion | None = None


def _random_count(rng: random.Random) -> int:
    return rng.choice((1, 2, 3))


def _text_to_image(rng: random.Random, task: str, split: str, side: int, detail: str | None) -> Example:
    count = int(task[-1])
    wording = detail or rng.choice(WORDINGS[count])
    while True:
        scene = random_scene(rng, objects=count, split=split)
        if wording == "relation" and not _can_be_related(scene):
            continue
        words = caption(rng, scene, wording=wording)
        drawn = plain(scene, words.stated)
        if split_of(drawn) == split:
            return Example(task, (words.text,), (render(drawn, side=side),), (drawn,), words.stated, wording)


def _can_be_related(scene: Scene) -> bool:
    """Tell whether two shapes look different enough to be told apart."""
    return len({shape.pair for shape in scene.objects}) == 2


def _caption(rng: random.Random, task: str, split: str, side: int, detail: str | None) -> Example:
    scene = random_scene(rng, objects=_random_count(rng), split=split)
    return Example(task, (render(scene, side=side), rng.choice(CAPTION_REQUESTS)), (full_caption(scene),), (scene,))


def _question(rng: random.Random, task: str, split: str, side: int, detail: str | None) -> Example:
    while True:
        scene = random_scene(rng, objects=_random_count(rng), split=split)
        question = ask(rng, scene, about=detail)
        if question is not None:
            inputs = (render(scene, side=side), question.text)
            return Example(task, inputs, (question.answer,), (scene,), detail=question.about)


def _edit(
    rng: random.Random,
    task: str,
    split: str,
    side: int,
    detail: str | None,
    *,
    wanted: Callable[[Edit], bool] | None = None,
) -> Example:
    change = detail or rng.choice(CHANGES)
    counts = {"add": (1, 2), "remove": (2, 3)}.get(change, (1, 2, 3))
    while True:
        done = edit(rng, random_scene(rng, objects=rng.choice(counts), split=split), change=change)
        if (wanted is None or wanted(done)) and split_of(done.after) == split:
            break
    before, after = (render(scene, side=side) for scene in (done.before, done.after))
    stated = frozenset(ATTRIBUTES) - {"relation"}
    return Example(task, (before, done.instruction), (after,), (done.before, done.after), stated, change)


def _think(rng: random.Random, task: str, split: str, side: int, detail: str | None) -> Example:
    while True:
        scene = random_scene(rng, objects=_random_count(rng), split=split)
        if len(scene.objects) == 3 and len({shape.pair for shape in scene.objects}) > 1:
            continue  # three shapes come in number riddles only: their full captions leave no room for a plan
        made = plan(rng, scene)
        kind, drawn = "indirect" if made.indirect else "clear", plain(scene, made.stated)
        if detail in (None, kind) and split_of(drawn) == split:
            outputs = (made.text, render(drawn, side=side))
            return Example(task, (made.prompt,), outputs, (drawn,), made.stated, kind)


def motion_caption(rng: random.Random, motion: Motion) -> Caption:
    """Say what moves where: "a small red circle moves up and left on a white background"."""
    (shape,) = motion.scene.objects
    stated = {"count", "color", "kind"} | {name for name in ("size", "background") if rng.random() < 0.5}
    text = f"{with_article(noun_phrase(shape, stated))} moves {motion.direction}"
    if "background" in stated:
        text += f" on a {motion.scene.background} background"
    return Caption(text, frozenset(stated))


def _video(rng: random.Random, task: str, split: str, side: int, detail: str | None) -> Example:
    motion = random_motion(rng, split=split)
    words = motion_caption(rng, motion)
    frames = tuple(motion.frames(side=side))
    return Example(task, (words.text,), frames, (motion.scene,), words.stated, motion.direction, motion)


_MAKE = {
    **dict.fromkeys(("t2i1", "t2i2", "t2i3"), _text_to_image),
    **{"caption": _caption, "qa": _question, "edit": _edit, "think": _think, "video": _video},
}


def sample(
    rng: random.Random,
    task: str,
    split: str = "train",
    *,
    side: int = 64,
    detail: str | None = None,
    wanted: Callable[[Edit], bool] | None = None,
) -> Example:
    """Draw one example of a task from a split; the same seed gives the same example.

    `detail` asks for one of `DETAILS[task]`; any by default. An edit's scenes before and after are both of the split,
    and edits are drawn until one is `wanted`.

    Raises ValueError for a task, split or detail that does not exist, and `wanted` for another task.
    """
    if task not in _MAKE:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if detail is not None and detail not in DETAILS.get(task, ()):
        raise ValueError(f"detail of task {task} must be one of {', '.join(DETAILS.get(task, ()))}, got {detail!r}")
    if wanted is not None:
        if task != "edit":
            raise ValueError(f"wanted is for edits, got task {task!r}")
        return _edit(rng, task, split, side, detail, wanted=wanted)
    return _MAKE[task](rng, task, split, side, detail)


def reworded(rng: random.Random, example: Example, weights: Mapping[str, float] | None = None) -> Example:
    """Say what an example shows in other words: captions to draw from, and plans.

    A relation is named where two shapes differ, and nothing is left out that the image does not show plainly. The
    other tasks are returned as they are. The images are not looked at and may be anything. `weights`: how likely
    each wording of a caption is, relative to the others; all alike by default. "full" fits every scene, others not
    all. Raises ValueError where no wording that fits is likely at all.
    """
    scene, wordings = example.scenes[0], WORDINGS.get(len(example.scenes[0].objects), ())
    if example.task.startswith("t2i"):
        tried = [name for name in wordings if name != "relation" or _can_be_related(scene)]
        captions = {name: caption(rng, scene, wording=name) for name in tried}
        fitting = [name for name, words in captions.items() if plain(scene, words.stated) == scene]
        (wording,) = rng.choices(fitting, [1.0 if weights is None else weights[name] for name in fitting])
        words = captions[wording]
        return replace(example, inputs=(words.text,), stated=words.stated, detail=wording)
    if example.task == "think":
        while True:
            made = plan(rng, scene)
            if plain(scene, made.stated) == scene:
                kind, outputs = "indirect" if made.indirect else "clear", (made.text, *example.outputs[1:])
                return replace(example, inputs=(made.prompt,), outputs=outputs, stated=made.stated, detail=kind)
    if example.task == "edit":
        before, after = example.scenes
        for _ in range(INSTRUCTIONS_DRAWN):
            done = edit(rng, before, change=example.detail)
            if done.after == after:
                return replace(example, inputs=(example.inputs[0], done.instruction))
    return example


def all_texts_sample(rng: random.Random, n: int) -> list[str]:
    """Draw at least `n` texts from all tasks and splits, to train a tokenizer on."""
    texts: list[str] = []
    while len(texts) < n:
        for task in TASKS:
            example = sample(rng, task, rng.choice(("train", "held_out", "new_pairs")), side=16)
            texts += [part for part in (*example.inputs, *example.outputs) if isinstance(part, str)]
    return texts
