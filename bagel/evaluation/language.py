"""The words of the shapes world: captions of scenes, from full to brief, and what each of them fixes.

Texts are lower case and use the closed list `WORDS`. A caption comes with the attributes it states, so that an image
drawn from it is judged on those alone.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from bagel.evaluation.scene import BACKGROUNDS, COLORS, KINDS, PLACES, SIZES, Scene, Shape, offset, place_of

ATTRIBUTES = ("count", "kind", "color", "size", "place", "background", "relation")
LOOKS = ("size", "color", "kind")
NUMBERS = ("zero", "one", "two", "three")
WORDINGS = {1: ("full", "brief"), 2: ("full", "relation", "count"), 3: ("full", "count")}

ROWS = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}
"""Columns of so many shapes side by side."""

FORMS = (
    "{objects} on {background}",
    "{background} with {objects}",
    "a picture of {objects} on {background}",
    "draw {objects} on {background}",
    "on {background}, {objects}",
)
BARE_FORMS = ("{objects}", "a picture of {objects}", "draw {objects}")

NounPhrase = Callable[[Shape, Collection[str]], str]


def plural(words: str) -> str:
    """Put the last word in the plural."""
    return words + ("es" if words.endswith("s") else "s")


# Every word that a text of this world may hold, tags and punctuation aside.
WORDS = frozenset(
    word
    for words in (
        *(KINDS, map(plural, KINDS), COLORS, BACKGROUNDS, SIZES, PLACES, NUMBERS),
        ("a an the and of on in at with to as shape shapes thing color background picture draw",),
        ("left right above below up down what where how big many is are there describe yes no see you do",),
        ("make change turn paint move put add remove take away moves prompt clear has",),
        ("tomato strawberry carrot pumpkin lemon banana grass frog sky sea grape eggplant pig flamingo bear",),
        ("chocolate wheel coin box tile pyramid three sides kite gem starfish five points plus sign crossroads",),
        ("snow milk night coal stone elephant sand cat eyes bicycle wheels tricycle",),
    )
    for phrase in words
    for word in phrase.split()
)


@dataclass(frozen=True)
class Caption:
    """Pair a text with the attributes of its scene (from `ATTRIBUTES`) that it states."""

    text: str
    stated: frozenset[str]


def with_article(words: str) -> str:
    """Put "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(shape: Shape, stated: Collection[str]) -> str:
    """Name a shape by those of size, color and kind that are stated: "small red circle", "red shape"."""
    words = [getattr(shape, name) for name in ("size", "color") if name in stated]
    return " ".join([*words, shape.kind if "kind" in stated else "shape"])


def background_phrase(background: str) -> str:
    """Name a background: "a light blue background"."""
    return with_article(f"{background} background")


def at(place: str) -> str:
    """Say where: "at the top left", "in the center"."""
    return f"{'in' if place == 'center' else 'at'} the {place}"


def listing(items: list[str]) -> str:
    """Join by commas and a last "and"."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def relation_words(a: Shape, b: Shape) -> str:
    """Say where `a` lies seen from `b`: "left of", "above", "below and right of"."""
    column, row = offset(a, b)
    words = (("", "below", "above")[row], ("", "right of", "left of")[column])
    return " and ".join(filter(None, words))


def place_phrase(shape: Shape, noun: NounPhrase = noun_phrase) -> str:
    """Say all of a shape: "a small red circle at the top left"."""
    return f"{with_article(noun(shape, LOOKS))} {at(shape.place)}"


def full_caption(scene: Scene) -> str:
    """Describe everything in the one canonical way: every attribute, in reading order, the background last."""
    objects = listing([place_phrase(shape) for shape in scene.objects]) if scene.objects else "no shapes"
    return FORMS[0].format(objects=objects, background=background_phrase(scene.background))


def _full(rng: random.Random, scene: Scene, noun: NounPhrase) -> tuple[str, set[str]]:
    shapes = rng.sample(scene.objects, len(scene.objects))
    return listing([place_phrase(shape, noun) for shape in shapes]), {*LOOKS, "place"}


def _brief(rng: random.Random, scene: Scene, noun: NounPhrase) -> tuple[str, set[str]]:
    """Name one shape by some of its attributes."""
    (shape,) = scene.objects
    stated = {*rng.choice((("color", "kind"), ("color", "kind"), ("kind",), ("color",)))}
    stated |= {name for name in ("size", "place") if rng.random() < 0.3}
    text = with_article(noun(shape, stated))
    return (f"{text} {at(shape.place)}" if "place" in stated else text), stated


def _relation(rng: random.Random, scene: Scene, noun: NounPhrase) -> tuple[str, set[str]]:
    """Name two shapes by where they lie from each other."""
    a, b = rng.sample(scene.objects, 2)
    stated = {"color", "kind"} | ({"size"} if rng.random() < 0.5 else set())
    names = [with_article(noun(shape, stated)) for shape in (a, b)]
    return f"{names[0]} {relation_words(a, b)} {names[1]}", stated | {"relation"}


def _count(rng: random.Random, scene: Scene, noun: NounPhrase) -> tuple[str, set[str]]:
    """Count the shapes that look the same, in reading order: "two red circles and a blue square", "three stars"."""
    choices = [("color", "kind")] * 2
    choices += [(name,) for name in ("color", "kind") if len({getattr(s, name) for s in scene.objects}) == 1]
    stated = rng.choice(choices)
    groups = Counter(noun(shape, stated) for shape in scene.objects)
    names = [f"{NUMBERS[n]} {plural(name)}" if n > 1 else with_article(name) for name, n in groups.items()]
    return listing(names), {*stated}


_WORDING = {"full": _full, "brief": _brief, "relation": _relation, "count": _count}


def caption(
    rng: random.Random,
    scene: Scene,
    *,
    wording: str,
    noun: NounPhrase = noun_phrase,
    background: Callable[[str], str] = background_phrase,
) -> Caption:
    """Describe a scene in one of many ways.

    `wording`: "full" (everything), "brief" (one shape, some of its attributes), "relation" (two shapes of different
    looks) or "count"; `WORDINGS` says which fit a number of objects. `noun` and `background` replace the plain names.
    All but "full" leave the background out half of the time. Raises ValueError for a wording that does not fit.
    """
    allowed = WORDINGS.get(len(scene.objects), ())
    if wording not in allowed:
        raise ValueError(f"wording for {len(scene.objects)} objects must be one of {allowed}, got {wording!r}")
    objects, stated = _WORDING[wording](rng, scene, noun)
    stated.add("count")
    if wording != "full" and rng.random() < 0.5:
        return Caption(rng.choice(BARE_FORMS).format(objects=objects), frozenset(stated))
    text = rng.choice(FORMS).format(objects=objects, background=background(scene.background))
    return Caption(text, frozenset(stated | {"background"}))


def plain(scene: Scene, stated: Collection[str]) -> Scene:
    """Return the image that a caption calls for: what it leaves open, `stated` being the rest, is drawn plainly.

    Plain is medium size, shapes alike where nothing tells them apart, and the middle of the image: side by side in
    the order of mention, or on both sides of the center as a stated relation has it. Backgrounds, and the looks of a
    single shape, stay as they are. A scene that is plain already is returned as it is.
    """
    first = scene.objects[0]
    open_looks = {name: getattr(first, name) for name in ("color", "kind") if name not in stated}
    if "size" not in stated:
        open_looks["size"] = "medium"
    shapes = [dataclasses.replace(shape, **open_looks) for shape in scene.objects]
    if "relation" in stated:
        column, row = offset(*shapes)
        cells = [(1 + column, 1 + row), (1 - column, 1 - row)]
    elif "place" not in stated:
        looks = [shape.pair for shape in shapes]
        shapes.sort(key=lambda shape: looks.index(shape.pair))
        cells = [(column, 1) for column in ROWS[len(shapes)]]
    else:
        cells = [PLACES[shape.place] for shape in shapes]
    placed = [dataclasses.replace(shape, place=place_of(cell)) for shape, cell in zip(shapes, cells, strict=True)]
    return Scene(tuple(placed), scene.background)


_SHAPE = re.compile(
    rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(KINDS)}) "
    rf"(?:at|in) the ({'|'.join(sorted(PLACES, key=len, reverse=True))})\b"
)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")


def parse_caption(text: str) -> Scene | None:
    """Read a full caption, in any of its forms, back into its scene; None without exactly one background."""
    backgrounds = _BACKGROUND.findall(text)
    if len(backgrounds) != 1:
        return None
    shapes = [
        Shape(kind=kind, color=color, size=size, place=place) for size, color, kind, place in _SHAPE.findall(text)
    ]
    return Scene(tuple(shapes), backgrounds[0])
