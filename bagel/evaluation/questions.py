"""Questions about a scene with answers of one canonical form: a name of the world, a number word, "yes" or "no"."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from bagel.evaluation.language import NUMBERS, at, noun_phrase, plural, with_article
from bagel.evaluation.scene import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, KINDS, Scene, Shape, offset, split_of

# What singles out a shape, in a phrase.
_REFERENCES = (("kind",), ("color",), ("color", "kind"), ("size", "kind"), ("size", "color", "kind"), ("place",))

CAPTION_REQUESTS = ("describe the picture", "what is in the picture?", "what do you see?")


@dataclass(frozen=True)
class Question:
    """Pair a question with its answer; `about` is one of `TOPICS`."""

    text: str
    answer: str
    about: str


def refer(rng: random.Random, scene: Scene, shape: Shape, *, without: Collection[str] = ()) -> str | None:
    """Name one shape so that nothing else in the scene is meant: "red circle", "shape at the top".

    `without` lists attributes that must not be given away. None where the rest does not single the shape out.
    """
    choices = []
    for names in _REFERENCES:
        same = [s for s in scene.objects if all(getattr(s, name) == getattr(shape, name) for name in names)]
        if len(same) == 1 and not set(names) & set(without):
            choices.append(names)
    if not choices:
        return None
    names = rng.choice(choices)
    return f"shape {at(shape.place)}" if names == ("place",) else noun_phrase(shape, names)


def _other(rng: random.Random, values: Collection[str], taken: Collection[str]) -> str:
    return rng.choice([value for value in values if value not in taken])


def _speakable_pairs(scene: Scene) -> list[tuple[str, str]]:
    """Color and kind pairs that a text about the scene may name: held-out ones only where one is seen."""
    pairs = [(color, kind) for color in COLORS for kind in KINDS]
    return pairs if split_of(scene) == "new_pairs" else [pair for pair in pairs if pair not in HELD_OUT_PAIRS]


def _attribute(rng: random.Random, scene: Scene, about: str, form: str) -> Question | None:
    shape = rng.choice(scene.objects)
    name = refer(rng, scene, shape, without={about})
    return None if name is None else Question(form.format(name), getattr(shape, about), about)


def _count(rng: random.Random, scene: Scene) -> Question:
    shown = rng.choice(scene.objects)
    kind = rng.choice((shown.kind, shown.kind, rng.choice(KINDS)))
    color = rng.choice((shown.color, shown.color, rng.choice(tuple(COLORS))))
    name, number = rng.choice(
        (
            ("shape", len(scene.objects)),
            (kind, sum(s.kind == kind for s in scene.objects)),
            (f"{color} shape", sum(s.color == color for s in scene.objects)),
        )
    )
    return Question(f"how many {plural(name)} are there?", NUMBERS[number], "count")


def _background(rng: random.Random, scene: Scene) -> Question:
    return Question("what color is the background?", scene.background, "background")


def _is_there(rng: random.Random, scene: Scene, truth: bool) -> str:
    pairs = [shape.pair for shape in scene.objects]
    if truth:
        color, kind = rng.choice(pairs)
    else:
        near = [pair for pair in _speakable_pairs(scene) if pair not in pairs]
        color, kind = rng.choice([(c, k) for c, k in near if any(c == a or k == b for a, b in pairs)])
    return f"is there {with_article(f'{color} {kind}')}?"


def _is_color(rng: random.Random, scene: Scene, truth: bool) -> str | None:
    shape = rng.choice(scene.objects)
    name = refer(rng, scene, shape, without={"color"})
    colors = [color for color, kind in _speakable_pairs(scene) if kind == shape.kind]
    color = shape.color if truth else _other(rng, colors, [shape.color])
    return None if name is None else f"is the {name} {color}?"


def _is_related(rng: random.Random, scene: Scene, truth: bool) -> str | None:
    if len(scene.objects) < 2:
        return None
    a, b = rng.sample(scene.objects, 2)
    names = [refer(rng, scene, shape, without={"place"}) for shape in (a, b)]
    if None in names:
        return None
    column, row = offset(a, b)
    facts = {"left of": column < 0, "right of": column > 0, "above": row < 0, "below": row > 0}
    words = rng.choice([words for words, holds in facts.items() if holds == truth])
    return f"is the {names[0]} {words} the {names[1]}?"


def _is_count(rng: random.Random, scene: Scene, truth: bool) -> str:
    number = NUMBERS[len(scene.objects)]
    number = number if truth else _other(rng, NUMBERS[1:], [number])
    return "is there one shape?" if number == "one" else f"are there {number} shapes?"


def _is_background(rng: random.Random, scene: Scene, truth: bool) -> str:
    return f"is the background {scene.background if truth else _other(rng, BACKGROUNDS, [scene.background])}?"


def _yes_no(rng: random.Random, scene: Scene) -> Question | None:
    """Draw the answer first, so that both are as likely whatever is asked."""
    truth = rng.random() < 0.5
    text = rng.choice((_is_there, _is_color, _is_related, _is_count, _is_background))(rng, scene, truth)
    return None if text is None else Question(text, "yes" if truth else "no", "yes_no")


_ASK = {
    "color": lambda rng, scene: _attribute(rng, scene, "color", "what color is the {}?"),
    "kind": lambda rng, scene: _attribute(rng, scene, "kind", "what shape is the {}?"),
    "place": lambda rng, scene: _attribute(rng, scene, "place", "where is the {}?"),
    "size": lambda rng, scene: _attribute(rng, scene, "size", "how big is the {}?"),
    "count": _count,
    "background": _background,
    "yes_no": _yes_no,
}
TOPICS = tuple(_ASK)


def ask(rng: random.Random, scene: Scene, *, about: str | None = None) -> Question | None:
    """Ask something about a scene; `about` is one of `TOPICS` (a random one by default).

    None where the topic cannot be asked about without ambiguity (the place of one of two equal shapes, say).
    """
    return _ASK[about or rng.choice(TOPICS)](rng, scene)
