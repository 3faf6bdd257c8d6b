"""The autoencoder of FLUX.1: images to latents eight times smaller along each side, and back."""

from __future__ import annotations

from bagel.vae.autoencoder import Autoencoder

__all__ = ["Autoencoder"]
