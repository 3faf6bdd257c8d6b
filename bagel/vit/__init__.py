"""The vision encoder: SigLIP (arXiv 2303.15343) over packed images of any size (arXiv 2307.06304)."""

from __future__ import annotations

from bagel.vit.siglip import SiglipViT

__all__ = ["SiglipViT"]
