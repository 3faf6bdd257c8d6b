"""The built-in model: a small BAGEL that this library trained on the images and texts of `bagel.evaluation`."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Its folder, in the official layout: `BagelPipeline.from_pretrained(CHECKPOINT)`."""
