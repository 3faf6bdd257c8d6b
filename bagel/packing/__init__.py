"""Segments of text and images, packed into one sequence: tokens, positions, experts, and who sees whom."""

from bagel.packing.layout import LATENT, TEXT, VIT, Layout, Rule, SampleRows, Split, Tokens, mask_of, sees
from bagel.packing.packed import Packed, pack
from bagel.packing.segments import (
    IGNORE,
    DroppedImage,
    Frames,
    LatentImage,
    Segment,
    Text,
    ViTImage,
)

__all__ = [
    "IGNORE",
    "LATENT",
    "TEXT",
    "VIT",
    "DroppedImage",
    "Frames",
    "LatentImage",
    "Layout",
    "Packed",
    "Rule",
    "SampleRows",
    "Segment",
    "Split",
    "Text",
    "Tokens",
    "ViTImage",
    "mask_of",
    "pack",
    "sees",
]
