"""Draw images from contexts: guidance branches, the flow, the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.generation.contexts import Contexts, read_ahead, read_behind
from bagel.image import to_image
from bagel.modeling import Bagel, Branch, Context, Denoiser
from bagel.packing import LatentImage, Text
from bagel.processor import Processor
from bagel.sampling import GuidedVelocity
from bagel.sampling.guidance import branch_names
from bagel.vae import Autoencoder

Size = tuple[int, int]
"""Height and width in pixels."""


def velocity_of(
    model: Bagel,
    processor: Processor,
    conversations: Sequence[Contexts],
    sizes: Sequence[Size],
    options: Any,
    negatives: Sequence[Text | None],
) -> GuidedVelocity:
    """Return the guided velocity of one image per conversation, whose contexts stay as they are.

    Args:
        model: with its generating half.
        processor: that of the model.
        conversations: what each image is drawn from.
        sizes: of the images.
        options: guidance, caching and times; see `bagel.options.VelocityOptions`.
        negatives: a text for each image that stands in the place of the dropped one, or None.
    """
    contexts = branch_contexts(model, processor, conversations, options, negatives)
    branches, names = shared_branches(contexts, len(conversations))
    targets = []
    for size in sizes:
        cells = processor.grid(*size)
        blank = torch.zeros(cells.shape[0], processor.config.patch_latent_dim)
        targets.append(LatentImage(blank, cells, noisy=True))
    times = options.timesteps[:-1].tolist()
    for own, target in zip(conversations, targets, strict=True):  # for the image, behind the context and before it
        own.full.reserve(target.length, headroom=target.length if len(branches) > len(targets) else 0)
    denoiser = Denoiser(model, targets, branches, pack=processor.pack, times=times)
    return GuidedVelocity(denoiser.states, model.velocity, denoiser.sizes, names, options.guide, options.cache)


def branch_contexts(
    model: Bagel,
    processor: Processor,
    conversations: Sequence[Contexts],
    options: Any,
    negatives: Sequence[Text | None],
) -> dict[str, list[Context]]:
    """Return the contexts of every branch that guidance may ask for, by the branch's name, one for each image."""
    wanted, pack = branch_names(options.guide), processor.pack
    found = {"full": [contexts.full for contexts in conversations]}
    if "text_dropped" in wanted:
        dropped = [own.without_text(options.drop, text) for own, text in zip(conversations, negatives, strict=True)]
        found["text_dropped"] = read_ahead(model, pack, dropped)
    if "image_dropped" in wanted:
        read_behind(model, pack, conversations)
        dropped = [own.without_images(with_plan=options.plan_in_image_dropped) for own in conversations]
        found["image_dropped"] = read_ahead(model, pack, dropped)
    return found


def shared_branches(contexts: dict[str, list[Context]], images: int) -> tuple[list[Branch], list[dict[str, int]]]:
    """Return the branches of all images, and for each image which it is by name; the same tokens share one."""
    branches: list[Branch] = []
    names: list[dict[str, int]] = [{} for _ in range(images)]
    for image, known in enumerate(names):
        for name, own in contexts.items():
            alike = [index for index in known.values() if branches[index].context.same_as(own[image])]
            if not alike:
                branches.append(Branch(image, own[image]))
            known[name] = alike[0] if alike else len(branches) - 1
    return branches, names


def start_noise(processor: Processor, size: Size, generator: torch.Generator, given: Tensor | None = None) -> Tensor:
    """Return the start noise (n, P) float32 of an image, drawn on the CPU unless it was given.

    Raises:
        ValueError: a noise of another shape.
    """
    shape = (processor.grid(*size).shape[0], processor.config.patch_latent_dim)
    if given is None:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if tuple(given.shape) != shape:
        raise ValueError(f"noise for {size[0]}x{size[1]} pixels must be {shape}, got {tuple(given.shape)}")
    return given.float()


def decoded(vae: Autoencoder, latents: Tensor) -> Image.Image:
    """Return the image of latents (Z, h, w).

    Raises:
        FloatingPointError: it came out as NaN or infinity.
    """
    pixels = vae.decode(latents[None])[0].float()
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(
            "the image came out as NaN or infinity; the weights are damaged or the type overflows: "
            "try dtype=torch.float32, or check the files with `bagel inspect --verify`"
        )
    return to_image(pixels.cpu())
