"""Short motions: one shape on a straight line at constant speed, inside the image from first to last frame.

Shapes stand on a grid of a 32nd of the side, and move one or two of its cells a frame along an axis or both.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from bagel.evaluation.render import REACH, Point, render
from bagel.evaluation.scene import BACKGROUNDS, SIZES, SPLITS, Scene, random_shape, split_of

FRAMES = 7
CELL = 1 / 32  # of the side
SPEEDS = (1, 2)  # cells a frame
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and right": (1, -1),
    "up and left": (-1, -1),
    "down and right": (1, 1),
    "down and left": (-1, 1),
}


@dataclass(frozen=True)
class Motion:
    """Move the one shape of a scene: `start` and `velocity` (a frame) in fractions of the side, x right and y down.

    The shape's named place (always the center) plays no part in where it is drawn.
    """

    scene: Scene
    direction: str
    start: Point
    velocity: Point

    def centers(self, frames: int = FRAMES) -> list[Point]:
        """Center (x, y) at each frame, in fractions of the side."""
        (x, y), (dx, dy) = self.start, self.velocity
        return [(x + i * dx, y + i * dy) for i in range(frames)]

    def frames(self, *, side: int = 64) -> list[Image.Image]:
        """Images of the motion, `FRAMES` of them."""
        return [render(self.scene, side=side, centers=[center]) for center in self.centers()]


def random_motion(rng: random.Random, *, split: str = "train") -> Motion:
    """Draw a motion from a split; color, kind, size, background and direction together decide the split.

    Raises ValueError for a split that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    while True:
        shape = random_shape(rng, "center")
        scene = Scene((shape,), rng.choice(tuple(BACKGROUNDS)))
        direction = rng.choice(tuple(DIRECTIONS))
        if split_of(scene, direction) == split:
            break
    speed = rng.choice(SPEEDS)
    steps = [speed * step for step in DIRECTIONS[direction]]  # cells a frame
    margin = REACH * SIZES[scene.objects[0].size] + 0.01
    start = []
    for step in steps:
        first, last = margin - CELL * min((FRAMES - 1) * step, 0), 1 - margin - CELL * max((FRAMES - 1) * step, 0)
        start.append(CELL * rng.randint(math.ceil(first / CELL), math.floor(last / CELL)))
    velocity = (CELL * steps[0], CELL * steps[1])
    return Motion(scene=scene, direction=direction, start=(start[0], start[1]), velocity=velocity)
