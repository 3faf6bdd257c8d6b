"""How much memory computing takes besides weights and caches: counted from the largest tensors that live at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.config import BagelConfig

MIB = 2**20


@dataclass(frozen=True)
class Request:
    """What is planned for: an image of `side` x `side` pixels in so many branches, with a context of so many tokens."""

    side: int = 1024
    branches: int = 2
    context: int = 256


class Work:
    """Bytes that the parts of a model need to compute, for inputs of a size.

    Args:
        config: the model's sizes.
        dtype: in which it computes.
    """

    def __init__(self, config: BagelConfig, dtype: torch.dtype) -> None:
        self.config, self.size = config, dtype.itemsize
        llm = config.llm_config
        self.token = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * self.size
        """Bytes of the keys and values of a token."""

    def __call__(self, und: int, gen: int) -> int:
        """Return what a forward of so many tokens of each expert takes at its peak."""
        llm = self.config.llm_config
        width = 3 * llm.intermediate_size + 8 * llm.hidden_size  # gate and up, their product, residual and its norms
        return (und + gen) * width * self.size + 64 * MIB

    def drawing(self, request: Request) -> int:
        """Return what drawing takes, caches included, at most the largest image; nothing for a model that cannot."""
        if not self.config.visual_gen:
            return 0
        return self._cached(request) + self(2 * request.branches, self._latents(request))

    def finishing(self, request: Request) -> int:
        """Return what decoding the drawn image takes, caches included."""
        return self._cached(request) + self.pixels(self.side(request) ** 2)

    def _latents(self, request: Request) -> int:
        return request.branches * (self.side(request) // self.config.latent_downsample) ** 2

    def _cached(self, request: Request) -> int:
        return (self._latents(request) + request.branches * request.context) * self.token

    def side(self, request: Request) -> int:
        """Return the side of the image that a request means: as asked, or the largest that the model draws."""
        return min(request.side, self.config.max_latent_size * self.config.latent_downsample)

    def writing(self, request: Request) -> int:
        """Return what answering takes about an image as large as the vision encoder sees any, caches included."""
        return self(1, 0) + (request.context + 4096) * self.token

    def seeing(self, patches: Tensor) -> int:
        """Return what the vision encoder takes for packed patches (n, 588)."""
        vit = self.config.vit_config
        return 0 if vit is None else patches.shape[0] * (2 * vit.intermediate_size + 10 * vit.hidden_size) * self.size

    def decoding(self, latents: Tensor) -> int:
        """Return what the autoencoder takes to decode latents (B, Z, h, w)."""
        vae = self.config.vae_config
        return 0 if vae is None else self.pixels(latents[:, 0].numel() * vae.downsample**2)

    def encoding(self, pixels: Tensor) -> int:
        """Return what the autoencoder takes to encode pixels (B, 3, H, W)."""
        return self.pixels(pixels[:, 0].numel())

    def pixels(self, count: int) -> int:
        """Return what the autoencoder takes for so many pixels, in either direction."""
        vae = self.config.vae_config
        return 0 if vae is None else count * 12 * vae.ch * self.size
