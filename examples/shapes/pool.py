"""A pool of encoded examples, for training without a GPU: the autoencoder then runs once for each picture."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from data import Shapes

from bagel.image import patchify
from bagel.training import ItemMaker, LatentItem
from bagel.training.samples import Item
from bagel.vae import Autoencoder

BLOCK = 200


@dataclass(frozen=True)
class Pooled:
    """Draws from a pool of samples."""

    samples: Sequence[Sequence[Item]]

    def __call__(self, rng: random.Random) -> Sequence[Item]:
        """Return one sample."""
        return self.samples[rng.randrange(len(self.samples))]


def encoded_pool(
    maker: ItemMaker, vae: Autoencoder, weights: Mapping[str, float], *, size: int, side: int
) -> list[list[Item]]:
    """Return `size` samples of all tasks with their pictures encoded; the same ones whenever it is called."""
    vae = vae.to(torch.bfloat16)
    rng, generator = random.Random(1), torch.Generator().manual_seed(0)
    pool: list[list[Item]] = []
    while len(pool) < size:
        block = []
        for _ in range(BLOCK):
            (task,) = rng.choices(list(weights), list(weights.values()))
            block.append(list(Shapes(task, maker, side)(rng)))
        pool += encoded(block, vae, generator, patch=maker.config.latent_patch_size)
    return pool


@torch.inference_mode()
def encoded(samples: list[list[Item]], vae: Autoencoder, generator: torch.Generator, *, patch: int) -> list[list[Item]]:
    """Return samples with the latents of their pictures, sampled from the posterior, in place of the pixels."""
    found = [(i, j) for i, items in enumerate(samples) for j, item in enumerate(items) if isinstance(item, LatentItem)]
    pixels = torch.stack([samples[i][j].content for i, j in found]).float() / 127.5 - 1
    down = vae.config.downsample
    shape = (len(found), vae.config.z_channels, pixels.shape[2] // down, pixels.shape[3] // down)
    latents = vae.encode(pixels, torch.randn(shape, generator=generator)).float()
    for (i, j), latent in zip(found, latents, strict=True):
        samples[i][j] = dataclasses.replace(samples[i][j], content=patchify(latent, patch).clone())
    return samples
