"""Reads an image of the shapes world without the model that drew it and without knowing what it should show.

The background is the median color. What stands out from it falls into connected blobs; each blob's color is the
median of its core, its soft mask follows from the mix of the two colors, and the kind is that of the ideal outline, of
the same area at the same center, which overlaps the mask most. Slight blur, noise or a tint do no harm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from bagel.evaluation.language import ATTRIBUTES
from bagel.evaluation.render import Point, coverage, render, unit_area
from bagel.evaluation.scene import BACKGROUNDS, COLORS, GRID, KINDS, SIZES, Scene, Shape, offset, place_of

# Distance in RGB (0 to 255 each) at which a pixel stands out from the background; the palettes are over 100 apart.
STANDS_OUT = 48.0
# Blobs smaller than this fraction of the image are specks, not shapes; the smallest shape covers 0.0078.
SPECK = 0.003
# A blob's color is read in its core: the pixels beyond this quantile of distance from the background. Nearer ones may
# hold some background, and most of a thin shape is edge.
CORE = 0.75
# A drawing that fits no outline better than this (soft intersection over union) is no shape of this world, and a
# color further than this from the palette is no color of it.
MIN_FIT = 0.75
MAX_COLOR_ERROR = 60.0
MAX_BLOBS = 6


@dataclass(frozen=True)
class Blob:
    """Describe one thing in an image as the nearest shape of the world.

    `center` (x, y) in pixels; `fit`, the overlap with that shape's ideal outline, in [0, 1]; `color_error`, the RGB
    distance to its ideal color.
    """

    shape: Shape
    center: Point
    fit: float
    color_error: float

    @property
    def clear(self) -> bool:
        """Whether this is that shape, and not merely nearest to it."""
        return self.fit >= MIN_FIT and self.color_error <= MAX_COLOR_ERROR

    def shows(self, shape: Shape, name: str) -> bool:
        """Whether the attribute `name` (kind, color, size or place) is the shape's, and believable."""
        believable = {"kind": self.fit >= MIN_FIT, "color": self.color_error <= MAX_COLOR_ERROR}
        return believable.get(name, True) and getattr(self.shape, name) == getattr(shape, name)


@dataclass(frozen=True)
class Reading:
    """Hold what was found in an image; blobs from the largest to the smallest."""

    blobs: tuple[Blob, ...]
    background: str
    background_error: float

    @property
    def scene(self) -> Scene:
        """The scene in names; unclear blobs count as the nearest shape."""
        return Scene(tuple(blob.shape for blob in self.blobs), self.background)


@dataclass(frozen=True)
class Verdict:
    """Tell for each judged attribute whether the image has it right."""

    right: dict[str, bool]
    reading: Reading

    @property
    def all_right(self) -> bool:
        """Whether every judged attribute is right."""
        return all(self.right.values())


def _pixels(image: Image.Image) -> np.ndarray:
    if image.width != image.height:
        raise ValueError(f"the judge reads square images, got {image.width}x{image.height}")
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(image) > 0


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its 4-connected parts, the largest first."""
    labels = np.pad(np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), 1)
    inner = labels[1:-1, 1:-1]
    while True:
        neighbours = (labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:], inner)
        grown = np.maximum.reduce(neighbours) * mask
        if np.array_equal(grown, inner):
            break
        inner[:] = grown
    names, areas = np.unique(inner[mask], return_counts=True)
    return [inner == name for name in names[np.argsort(-areas)] if name]


def _place(center: Point, side: int) -> str:
    column, row = (min(range(3), key=lambda i: abs(GRID[i] - value / side)) for value in center)
    return place_of((column, row))


def _soft_mask(pixels: np.ndarray, blob: np.ndarray, others: np.ndarray, ground: np.ndarray) -> tuple:
    """Estimate a blob's color (3,) and its share of each pixel (side, side), noise included.

    Where the pixels are no mix of one color and the background, in a motley drawing, the share is the blob itself.
    """
    distance = np.linalg.norm(pixels - ground, axis=-1)
    core = blob & (distance >= np.quantile(distance[blob], CORE))
    ink = np.median(pixels[core], axis=0)
    mix = (pixels - ground) @ (ink - ground) / max(np.sum((ink - ground) ** 2), 1.0)
    mask = np.where(_dilate(blob, 2) & ~_dilate(others, 1), mix, 0)
    return ink, mask if mask.sum() >= blob.sum() / 4 else blob.astype(np.float64)


def _blurred(mask: np.ndarray) -> np.ndarray:
    """Blur as far as an autoencoder may: by 1/4, 1/2, 1/4 along both axes (a deviation of 0.7 pixels)."""
    for axis in (0, 1):
        mask = mask / 2 + (np.roll(mask, 1, axis) + np.roll(mask, -1, axis)) / 4
    return mask


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Soft intersection over union."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _read_blob(pixels: np.ndarray, blob: np.ndarray, others: np.ndarray, ground: np.ndarray) -> Blob:
    side = len(pixels)
    ink, mask = _soft_mask(pixels, blob, others, ground)
    area = mask.sum()
    middles = np.arange(side) + 0.5
    center = float(mask.sum(axis=0) @ middles / area), float(mask.sum(axis=1) @ middles / area)
    soft = np.clip(mask, 0, 1)
    fits, radii = {}, {}
    for kind in KINDS:
        radii[kind] = math.sqrt(area / unit_area(kind))
        ideal = coverage(kind, center, radii[kind], side)
        fits[kind] = max(_overlap(soft, ideal), _overlap(soft, _blurred(ideal)))
    kind = max(fits, key=fits.__getitem__)
    size = min(SIZES, key=lambda name: abs(math.log(radii[kind] / (SIZES[name] * side))))
    color, error = _nearest(ink, COLORS)
    shape = Shape(kind=kind, color=color, size=size, place=_place(center, side))
    return Blob(shape=shape, center=center, fit=fits[kind], color_error=error)


def read(image: Image.Image) -> Reading:
    """Read a square image of the world: background, and every blob with how well it fits.

    At most the `MAX_BLOBS` largest blobs are read. Raises ValueError for an image that is not square.
    """
    pixels = _pixels(image)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    stands_out = np.linalg.norm(pixels - ground, axis=-1) > STANDS_OUT
    found = [part for part in _components(stands_out) if part.sum() >= SPECK * part.size]
    everything = np.logical_or.reduce(found) if found else np.zeros_like(stands_out)
    blobs = [_read_blob(pixels, part, everything & ~part, ground) for part in found[:MAX_BLOBS]]
    background, error = _nearest(ground, BACKGROUNDS)
    return Reading(blobs=tuple(blobs), background=background, background_error=error)


def read_scene(image: Image.Image) -> Scene:
    """Read a square image of the world in names."""
    return read(image).scene


def shape_center(image: Image.Image) -> Point | None:
    """Find the center (x, y), in pixels, of the largest shape of a square image; None where there is none."""
    blobs = read(image).blobs
    return blobs[0].center if blobs else None


def _same_relations(wanted: tuple[Shape, ...], seen: tuple[Shape, ...]) -> bool:
    """Whether every pair is on the wanted sides of each other; a wanted 0 leaves that axis free."""
    for i, j in itertools.combinations(range(len(wanted)), 2):
        pairs = zip(offset(wanted[i], wanted[j]), offset(seen[i], seen[j]), strict=True)
        if any(want and want != got for want, got in pairs):
            return False
    return True


def _match(wanted: tuple[Shape, ...], blobs: tuple[Blob, ...], names: list[str]) -> dict[str, bool]:
    """Judge attributes of shapes for one assignment of blobs to them."""
    pairs = list(zip(wanted, blobs, strict=True))
    right = {name: all(blob.shows(shape, name) for shape, blob in pairs) for name in names if name != "relation"}
    if "relation" in names:
        right["relation"] = _same_relations(wanted, tuple(blob.shape for blob in blobs))
    return right


def judge(image: Image.Image, scene: Scene, *, attributes: Collection[str] = ATTRIBUTES) -> Verdict:
    """Tell which attributes of a scene a square image has right.

    `attributes`: those to judge, from `ATTRIBUTES`; what a caption states, say. "count" asks for as many shapes, all
    of them clear; "kind", "color", "size" and "place" for every shape of the scene, matched in the best way to what is
    seen; "relation" for every pair to lie on the right side of each other, whatever the distance. Of too few shapes
    none of these is right. Raises ValueError for an unknown attribute or an image that is not square.
    """
    unknown = set(attributes) - set(ATTRIBUTES)
    if unknown:
        raise ValueError(f"attributes must be of {', '.join(ATTRIBUTES)}, got {', '.join(sorted(unknown))}")
    reading = read(image)
    names = [name for name in ATTRIBUTES if name in attributes and name not in ("count", "background")]
    count = len(scene.objects)
    matches = [_match(scene.objects, blobs, names) for blobs in itertools.permutations(reading.blobs, count)]
    right = max(matches, key=lambda match: sum(match.values()), default=dict.fromkeys(names, False))
    if "count" in attributes:
        right["count"] = len(reading.blobs) == count and all(blob.clear for blob in reading.blobs)
    if "background" in attributes:
        is_clear = reading.background_error <= MAX_COLOR_ERROR
        right["background"] = is_clear and reading.background == scene.background
    return Verdict(right=right, reading=reading)


def unchanged_psnr(before: Image.Image, after: Image.Image, scene_before: Scene, scene_after: Scene) -> float:
    """Measure, in dB, how well an edit keeps the pixels that it should not touch.

    Touched are all pixels where the two scenes, ideally drawn, differ, and a rim of 1/64 of the side around them.
    Infinite where the rest is equal, or where there is no rest. Raises ValueError for images of different sizes.
    """
    if before.size != after.size:
        raise ValueError(f"the images must be of one size, got {before.size} and {after.size}")
    a, b = _pixels(before), _pixels(after)
    side = len(a)
    ideal_before, ideal_after = (_pixels(render(scene, side=side)) for scene in (scene_before, scene_after))
    kept = ~_dilate((ideal_before != ideal_after).any(axis=-1), max(1, round(side / 64)))
    error = float(np.mean((a - b)[kept] ** 2)) if kept.any() else 0.0
    return 10 * math.log10(255**2 / error) if error else math.inf
