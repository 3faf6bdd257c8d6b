"""The shapes world as data: one to three colored shapes at named places on a flat background.

Lengths are fractions of the image's side, x to the right and y down, so a scene has no size of its own; see
`bagel.evaluation.render`. Every draw takes a `random.Random`, and the same seed gives the same scene everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import blake2s

KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")

COLORS = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 220, 0),
    "green": (0, 150, 60),
    "blue": (20, 80, 230),
    "purple": (130, 30, 180),
    "pink": (255, 80, 180),
    "brown": (125, 65, 20),
}

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (165, 170, 175),
    "beige": (240, 228, 200),
    "light blue": (185, 220, 255),
    "light green": (195, 240, 200),
}

# Radius of a circle of that size; the other kinds are drawn to look as large (`render.OUTLINES`).
SIZES = {"small": 0.066, "medium": 0.092, "large": 0.126}

# Rows of the grid, top to bottom; each name stands for (column, row).
PLACES = {
    name: (column, row)
    for row, names in enumerate(
        (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
    )
    for column, name in enumerate(names)
}
GRID = (0.18, 0.5, 0.82)

# Color and kind pairs that no training image or text shows together, though each part is seen with others.
HELD_OUT_PAIRS = (("purple", "circle"), ("orange", "star"), ("green", "cross"), ("blue", "triangle"))

SPLITS = ("train", "held_out", "new_pairs")
HELD_OUT_EVERY = 10
REPEAT_CHANCE = 0.4


def _require_name(what: str, name: str, names) -> None:
    if name not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}, got {name!r}")


@dataclass(frozen=True)
class Shape:
    """Name one shape: its kind, color, size and place, each from this module's tables.

    Raises ValueError for a name outside its table.
    """

    kind: str
    color: str
    size: str
    place: str

    def __post_init__(self) -> None:
        _require_name("kind", self.kind, KINDS)
        _require_name("color", self.color, COLORS)
        _require_name("size", self.size, SIZES)
        _require_name("place", self.place, PLACES)

    @property
    def center(self) -> tuple[float, float]:
        """Center (x, y) of the place, in fractions of the side."""
        column, row = PLACES[self.place]
        return GRID[column], GRID[row]

    @property
    def pair(self) -> tuple[str, str]:
        """Color and kind, what `HELD_OUT_PAIRS` lists."""
        return self.color, self.kind


@dataclass(frozen=True)
class Scene:
    """Hold shapes, kept in reading order (so that equal images are equal scenes), on a background.

    Raises ValueError for a background outside `BACKGROUNDS`.
    """

    objects: tuple[Shape, ...]
    background: str

    def __post_init__(self) -> None:
        _require_name("background", self.background, BACKGROUNDS)
        order = sorted(self.objects, key=lambda s: (*PLACES[s.place][::-1], s.kind, s.color, s.size))
        object.__setattr__(self, "objects", tuple(order))

    @property
    def free_places(self) -> tuple[str, ...]:
        """Places that no shape stands on."""
        taken = {shape.place for shape in self.objects}
        return tuple(place for place in PLACES if place not in taken)


def place_of(cell: tuple[int, int]) -> str:
    """Name the place at (column, row)."""
    return next(name for name, at in PLACES.items() if at == cell)


def offset(a: Shape, b: Shape) -> tuple[int, int]:
    """Tell where `a` lies seen from `b`: (-1 left, 0, 1 right) and (-1 above, 0, 1 below)."""
    (ax, ay), (bx, by) = PLACES[a.place], PLACES[b.place]
    return (ax > bx) - (ax < bx), (ay > by) - (ay < by)


def split_of(scene: Scene, detail: str = "") -> str:
    """Tell the split a scene belongs to, whoever draws it.

    `new_pairs` holds every scene with a pair of `HELD_OUT_PAIRS`; of the rest a stable hash of the whole scene (and of
    `detail`, a motion's direction say) sends one in `HELD_OUT_EVERY` to `held_out`. So no held-out combination is
    ever trained on.
    """
    if any(shape.pair in HELD_OUT_PAIRS for shape in scene.objects):
        return "new_pairs"
    names = [scene.background, detail]
    names += [name for shape in scene.objects for name in (shape.kind, shape.color, shape.size, shape.place)]
    number = int.from_bytes(blake2s("|".join(names).encode()).digest()[:4], "big")
    return "held_out" if number % HELD_OUT_EVERY == 0 else "train"


def random_shape(rng: random.Random, place: str, like: Shape | None = None) -> Shape:
    """Draw a shape for a place; with `like`, one of that color and kind."""
    color, kind = like.pair if like else (rng.choice(tuple(COLORS)), rng.choice(KINDS))
    return Shape(kind=kind, color=color, size=rng.choice(tuple(SIZES)), place=place)


def random_scene(rng: random.Random, *, objects: int, split: str = "train") -> Scene:
    """Draw a scene of 1 to 3 shapes at distinct places from a split.

    A shape repeats the color and kind of the one before with `REPEAT_CHANCE`, so that there is something to count.
    Raises ValueError for a number of objects or a split that does not exist.
    """
    if objects not in (1, 2, 3):
        raise ValueError(f"a scene has 1, 2 or 3 objects, got {objects}")
    _require_name("split", split, SPLITS)
    while True:
        shapes: list[Shape] = []
        for place in rng.sample(tuple(PLACES), objects):
            repeats = bool(shapes) and rng.random() < REPEAT_CHANCE
            shapes.append(random_shape(rng, place, shapes[-1] if repeats else None))
        scene = Scene(tuple(shapes), rng.choice(tuple(BACKGROUNDS)))
        if split_of(scene) == split:
            return scene
