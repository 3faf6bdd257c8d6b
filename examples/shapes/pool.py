"""Images encoded ahead, for training without a GPU: the autoencoder then runs once for each, not once a step.

Captions and plans are worded afresh whenever an image is used, and questions about images need no autoencoder.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from data import Shapes
from PIL import Image

from bagel.evaluation.samples import Example
from bagel.image import in_unit, patchify
from bagel.training import ItemMaker, LatentItem, ViTItem
from bagel.training.samples import Item
from bagel.vae import Autoencoder

BLOCK = 1000
"""Examples of a file."""
DRAWN = {"t2i1": 8, "t2i2": 20, "t2i3": 22, "think": 8, "edit": 30, "frames": 12}
"""Share of each task that draws."""


@dataclass(frozen=True)
class Encoded:
    """Both views of an image; stands in its place in an example."""

    latent: LatentItem
    seen: ViTItem


class EncodedMaker(ItemMaker):
    """Makes the items of encoded images."""

    def latent(self, image: Any, *, loss: bool = False, droppable: bool = False) -> LatentItem:
        """Return the latents of an image."""
        return dataclasses.replace(image.latent, loss=loss, droppable=droppable)

    def condition(self, image: Any, *, droppable: bool = True) -> tuple[LatentItem, ViTItem]:
        """Return both views of an image."""
        return self.latent(image, droppable=droppable), dataclasses.replace(image.seen, droppable=droppable)


@dataclass(frozen=True)
class Pooled:
    """Draws the examples of a task from a pool."""

    shapes: Shapes
    examples: Sequence[Example]

    def __call__(self, rng: random.Random) -> Sequence[Item]:
        """Return the items of one example, in words of its own."""
        return self.shapes.items(rng.choice(self.examples), rng)


def write_pool(folder: Path, maker: ItemMaker, vae: Autoencoder, *, blocks: int, side: int) -> None:
    """Write so many files of encoded examples; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    name = sha256(b"".join(p.detach().float().numpy().tobytes() for p in vae.parameters())).hexdigest()
    made_by = folder / "autoencoder.txt"
    if made_by.exists() and made_by.read_text() != name:
        raise SystemExit(f"{folder} holds a pool of another autoencoder; choose another folder, or remove it")
    made_by.write_text(name)
    vae = copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.channels_last)
    for block in range(blocks):
        file = folder / f"{block:04d}.pt"
        if not file.exists():
            torch.save(encoded_block(block, maker, vae, side=side), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        print(f"{block + 1} of {blocks} blocks", end="\r", flush=True)


def read_pool(folder: Path) -> Mapping[str, list[Example]]:
    """Return the examples of each task."""
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise SystemExit(f"{folder} holds no pool: run `train.py pool --out {folder}` first")
    pool: dict[str, list[Example]] = {task: [] for task in DRAWN}
    for file in files:
        for task, example in torch.load(file, weights_only=False):
            pool[task].append(example)
    return pool


def encoded_block(block: int, maker: ItemMaker, vae: Autoencoder, *, side: int) -> list[tuple[str, Example]]:
    """Return the examples of a block, by task, with their images encoded; the same ones whenever it is called."""
    rng, generator = random.Random(f"pool/{block}"), torch.Generator().manual_seed(block)
    examples = []
    for task in rng.choices(list(DRAWN), list(DRAWN.values()), k=BLOCK):
        examples.append((task, Shapes(task, maker, side).example(rng)))
    images = [part for _, e in examples for part in (*e.inputs, *e.outputs) if isinstance(part, Image.Image)]
    views = [maker.condition(image) for image in images]
    pixels = torch.stack([latent.content for latent, _ in views]).to(memory_format=torch.channels_last)
    latents = torch.cat([encode(part, vae, generator) for part in pixels.split(BLOCK // 10)])
    # Views of two tensors: a file then holds two tensors, not thousands.
    tokens = torch.stack([patchify(z, maker.config.latent_patch_size) for z in latents])
    patches = torch.stack([seen.patches for _, seen in views])
    encoded = {
        id(image): Encoded(dataclasses.replace(latent, content=z), dataclasses.replace(seen, patches=x))
        for image, (latent, seen), z, x in zip(images, views, tokens, patches, strict=True)
    }

    def swapped(parts: tuple) -> tuple:
        return tuple(encoded.get(id(part), part) for part in parts)

    return [
        (task, dataclasses.replace(e, inputs=swapped(e.inputs), outputs=swapped(e.outputs))) for task, e in examples
    ]


@torch.inference_mode()
def encode(pixels: torch.Tensor, vae: Autoencoder, generator: torch.Generator) -> torch.Tensor:
    """Return latents of images (n, 3, H, W) in 8 bits, sampled from the posterior."""
    count, down = len(pixels), vae.config.downsample
    shape = (count, vae.config.z_channels, pixels.shape[2] // down, pixels.shape[3] // down)
    return vae.encode(in_unit(pixels), torch.randn(shape, generator=generator)).float()
