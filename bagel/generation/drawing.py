"""Draw images from contexts: guidance branches, the flow, the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from bagel.generation.contexts import Size, branches_of
from bagel.image import to_image
from bagel.modeling import Denoiser
from bagel.options import VelocityOptions
from bagel.packing import LatentImage
from bagel.sampling import GuidedVelocity, TaylorSeer
from bagel.vae import Autoencoder

if TYPE_CHECKING:
    from bagel.generation.session import Session


def velocity_of(
    sessions: Sequence[Session], options: Sequence[VelocityOptions], sizes: Sequence[Size]
) -> GuidedVelocity:
    """Return the guided velocity of one image per session, whose contexts stay as they are.

    Args:
        sessions: of one model.
        options: one for each; all but the negative prompts are alike.
        sizes: of the images.
    """
    shared, model, processor = options[0], sessions[0].model, sessions[0].processor
    negatives = [
        None
        if own.negative_prompt is None
        else processor.text(own.negative_prompt, allow_special=session.options.allow_special)
        for session, own in zip(sessions, options, strict=True)
    ]
    branches, names = branches_of([session.contexts for session in sessions], shared, negatives)
    targets = []
    for session, size in zip(sessions, sizes, strict=True):
        cells = processor.grid(*size)
        target = LatentImage(torch.zeros(cells.shape[0], processor.config.patch_latent_dim), cells, noisy=True)
        # Room for the image, behind the context and before it.
        headroom = target.length if len(branches) > len(sessions) else 0
        session.contexts.full.reserve(target.length, headroom=headroom)
        targets.append(target)
    times = shared.timesteps[:-1].tolist()
    denoiser = Denoiser(model, targets, branches, pack=processor.pack, times=times)
    caching = TaylorSeer() if shared.caching is None and shared.taylorseer else shared.caching
    return GuidedVelocity(denoiser.states, model.velocity, denoiser.sizes, names, shared.guide, caching)


def start_noise(session: Session, size: Size, given: Tensor | None = None) -> Tensor:
    """Return the start noise (n, P) float32 of an image on the model's device, drawn on the CPU unless it was given.

    Raises:
        ValueError: a noise of another shape.
    """
    shape = (session.processor.grid(*size).shape[0], session.model.config.patch_latent_dim)
    noise = given
    if noise is None:
        noise = torch.randn(shape, generator=session.generator, dtype=torch.float32, device="cpu")
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise for {size[0]}x{size[1]} pixels must be {shape}, got {tuple(noise.shape)}")
    return noise.float().to(session.model.device)


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
