"""Scenes to images: flat colors and anti-aliased outlines, with numpy alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bagel.evaluation.scene import BACKGROUNDS, COLORS, SIZES, Scene

ROWS_PER_PIXEL = 16

Point = tuple[float, float]


def _turned(radii: Sequence[float]) -> np.ndarray:
    """Vertices at equal angles, clockwise from the top, at the given distances from the center."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.asarray(radii)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _cross(length: float, width: float) -> np.ndarray:
    corner = [(-width, -length), (width, -length), (width, -width)]
    quarters = [np.array(corner) @ np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), turn) for turn in range(4)]
    return np.concatenate(quarters)


# Outlines for radius 1, clockwise on the screen (y down), each with its center of mass at the origin. The circle has
# none: it is the unit circle itself.
OUTLINES = {
    "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _turned([1.2] * 3),
    "diamond": np.array([(0.0, -1.12), (0.8, 0.0), (0.0, 1.12), (-0.8, 0.0)]),
    "star": _turned([1.15, 0.48] * 5),
    "cross": _cross(1.0, 0.34),
}
REACH = 1.2


def unit_area(kind: str) -> float:
    """Area of a kind drawn with radius 1."""
    if kind == "circle":
        return math.pi
    x, y = OUTLINES[kind].T
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _crossings(kind: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rows (R,) cross the outline: x (E, R), infinite where an edge is not met, and +1 in or -1 out (E,)."""
    if kind == "circle":
        half = np.where(np.abs(rows) < 1, np.sqrt(np.maximum(1 - rows**2, 0)), np.inf)
        return np.stack([np.where(np.isinf(half), np.inf, -half), half]), np.array([1.0, -1.0])
    start = OUTLINES[kind][:, None, :]  # (E, 1, 2)
    end = np.roll(start, -1, axis=0)
    rise = end[..., 1] - start[..., 1]
    met = (start[..., 1] <= rows) != (end[..., 1] <= rows)  # (E, R)
    slope = (end[..., 0] - start[..., 0]) / np.where(rise == 0, 1, rise)
    x = np.where(met, start[..., 0] + slope * (rows - start[..., 1]), np.inf)
    return x, np.where(rise[:, 0] < 0, 1.0, -1.0)


def coverage(kind: str, center: Point, radius: float, side: int) -> np.ndarray:
    """Measure how much of each pixel a shape covers.

    `center` and `radius` in pixels (pixel 0 spans 0 to 1). Returns (side, side) in [0, 1]: exact along a row, and the
    mean of `ROWS_PER_PIXEL` rows within a pixel. What lies outside the image is cut off.
    """
    top, left, filled = _covered(kind, center, radius, side)
    alpha = np.zeros((side, side))
    alpha[top : top + filled.shape[0], left : left + filled.shape[1]] = filled
    return alpha


def _covered(kind: str, center: Point, radius: float, side: int) -> tuple[int, int, np.ndarray]:
    """Return the part of `coverage` that holds the shape, and the row and column where that begins."""
    reach = REACH * radius
    left, right = (int(np.clip(v, 0, side)) for v in (math.floor(center[0] - reach), math.ceil(center[0] + reach)))
    top, bottom = (int(np.clip(v, 0, side)) for v in (math.floor(center[1] - reach), math.ceil(center[1] + reach)))
    rows = (np.arange(top * ROWS_PER_PIXEL, bottom * ROWS_PER_PIXEL) + 0.5) / ROWS_PER_PIXEL
    x, signs = _crossings(kind, (rows - center[1]) / radius)
    to_the_right = np.arange(left + 1, right + 1) - (center[0] + radius * x)[..., None]  # (E, R, W)
    filled = np.tensordot(signs, np.clip(to_the_right, 0, 1), axes=1)  # (R, W)
    return top, left, filled.reshape(bottom - top, ROWS_PER_PIXEL, right - left).mean(axis=1)


@functools.lru_cache(maxsize=1024)
def _placed(kind: str, size: str, center: Point, side: int) -> tuple[int, int, np.ndarray]:
    """`_covered` of a shape at a named place: the same few hundred arrays serve every scene."""
    return _covered(kind, (center[0] * side, center[1] * side), SIZES[size] * side, side)


def render(scene: Scene, *, side: int = 64, centers: Sequence[Point] | None = None) -> Image.Image:
    """Draw a scene.

    `side` in pixels, a multiple of 16. `centers`, when given, replaces the places: one (x, y) an object in fractions
    of the side. Returns an RGB image. Raises ValueError for a side that is no multiple of 16 or centers that do not
    pair with the objects.
    """
    if side <= 0 or side % 16:
        raise ValueError(f"side must be a positive multiple of 16, got {side}")
    if centers is not None and len(centers) != len(scene.objects):
        raise ValueError(f"centers must be one an object: got {len(centers)} for {len(scene.objects)} objects")
    pixels = np.tile(np.array(BACKGROUNDS[scene.background], dtype=np.float64), (side, side, 1))
    for i, shape in enumerate(scene.objects):
        if centers is None:
            top, left, alpha = _placed(shape.kind, shape.size, shape.center, side)
        else:
            x, y = centers[i]
            top, left, alpha = _covered(shape.kind, (x * side, y * side), SIZES[shape.size] * side, side)
        box = pixels[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        box += alpha[..., None] * (np.array(COLORS[shape.color]) - box)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
