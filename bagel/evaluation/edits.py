"""Instructions that change a scene, and the scene they lead to."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from bagel.evaluation.language import at, place_phrase
from bagel.evaluation.questions import refer
from bagel.evaluation.scene import BACKGROUNDS, COLORS, Scene, Shape, random_shape


@dataclass(frozen=True)
class Edit:
    """Pair an instruction with the scenes before and after; `change` is one of `CHANGES`."""

    instruction: str
    before: Scene
    after: Scene
    change: str


def _swap(scene: Scene, old: Shape | None, new: Shape | None) -> Scene:
    kept = [shape for shape in scene.objects if shape != old]
    return dataclasses.replace(scene, objects=(*kept, *([new] if new else [])))


def _recolor(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    shape = rng.choice(scene.objects)
    color = rng.choice([color for color in COLORS if color != shape.color])
    form = rng.choice(("make the {} {}", "paint the {} {}", "turn the {} {}", "change the color of the {} to {}"))
    after = _swap(scene, shape, dataclasses.replace(shape, color=color))
    return form.format(refer(rng, scene, shape), color), after


def _move(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    shape, place = rng.choice(scene.objects), rng.choice(scene.free_places)
    where = rng.choice((f"to the {place}", at(place)))
    instruction = f"{'move' if where.startswith('to') else 'put'} the {refer(rng, scene, shape)} {where}"
    return instruction, _swap(scene, shape, dataclasses.replace(shape, place=place))


def _add(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    shape = random_shape(rng, rng.choice(scene.free_places))
    return f"{rng.choice(('add', 'put', 'draw'))} {place_phrase(shape)}", _swap(scene, None, shape)


def _remove(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    shape = rng.choice(scene.objects)
    form = rng.choice(("remove the {}", "take away the {}"))
    return form.format(refer(rng, scene, shape)), _swap(scene, shape, None)


def _background(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    color = rng.choice([color for color in BACKGROUNDS if color != scene.background])
    form = rng.choice(("make the background {}", "turn the background {}", "change the background to {}"))
    return form.format(color), dataclasses.replace(scene, background=color)


_CHANGE = {"recolor": _recolor, "move": _move, "add": _add, "remove": _remove, "background": _background}
CHANGES = tuple(_CHANGE)


def edit(rng: random.Random, scene: Scene, *, change: str) -> Edit:
    """Change a scene in one way of `CHANGES`.

    Raises ValueError where there is no room ("add" to three shapes) or nothing would be left ("remove" of the only
    one).
    """
    count = len(scene.objects)
    if (change == "add" and count > 2) or (change == "remove" and count < 2):
        raise ValueError(f"cannot {change} a shape in a scene of {count}: a scene keeps 1 to 3 shapes")
    instruction, after = _CHANGE[change](rng, scene)
    return Edit(instruction=instruction, before=scene, after=after, change=change)
