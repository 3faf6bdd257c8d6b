"""Draw images from contexts, those of several sessions at once: guidance branches, the flow, the autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from bagel.generation.contexts import Size, branches_of, working
from bagel.generation.reading import catch_up
from bagel.generation.writing import plan_all
from bagel.image import to_image
from bagel.modeling import Denoiser
from bagel.options import DrawOptions, VelocityOptions
from bagel.packing import LatentImage
from bagel.parameters import options_of
from bagel.results import ImageResult
from bagel.sampling import Euler, GuidedVelocity, TaylorSeer, integrate
from bagel.vae import Autoencoder

if TYPE_CHECKING:
    from bagel.generation.session import Session


def check_shared(sessions: Sequence[Session], options: Sequence[DrawOptions]) -> None:
    """Check that sessions can share their evaluations.

    Raises:
        ValueError: a session that is named twice, sessions of several models, options that differ.
    """
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("a session can draw one image at a time: fork it to draw several")
    if any(session.model is not sessions[0].model for session in sessions):
        raise ValueError("sessions that draw together must be of one model")
    for one in options_of(type(options[0])):
        values = [getattr(own, one.name) for own in options]
        if one.per_item is None and any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(f"sessions that draw together share {one.name}, got {values[0]!r} and others")


def draw_all(sessions: Sequence[Session], options: Sequence[DrawOptions]) -> list[ImageResult]:
    """Let each session draw an image; see `Session.draw`.

    Raises:
        ValueError: options that differ, but for those that each session may have of its own.
    """
    if len(sessions) > 1:
        check_shared(sessions, options)
    shared, model, processor = options[0], sessions[0].model, sessions[0].processor
    vae = sessions[0].reader.drawing_vae()
    with working(sessions):
        catch_up(sessions)
        if shared.think:
            plan_all(sessions, shared)
        else:
            model.graphs.decode_step = None  # drawing may need the memory
        sizes = [session.size_of(own) for session, own in zip(sessions, options, strict=True)]
        noise = [start_noise(*each) for each in zip(sessions, sizes, [own.noise for own in options], strict=True)]
        velocity = velocity_of(sessions, options, sizes)
        x = integrate(
            Euler() if shared.solver is None else shared.solver,
            velocity,
            torch.cat(noise),
            shared.timesteps,
            sizes=velocity.sizes,
            on_step=shared.on_step,
            watch=functools.partial(tqdm, desc="drawing", unit="step", disable=not sessions[0].shows_progress),
        )
        latents = [processor.image(z, *size) for z, size in zip(x.split(velocity.sizes), sizes, strict=True)]
        drawn = [(z, decoded(vae, z)) for z in latents]
    for session, image in zip(sessions, drawn, strict=True):
        session.contexts.drawn, session.contexts.answered = image, True
    with torch.inference_mode(False):  # so that the latents may take part in a gradient computation
        results = [
            ImageResult(image, session.contexts.plan, z.cpu().clone(), session.generator.initial_seed())
            for session, (z, image) in zip(sessions, drawn, strict=True)
        ]
    for session in sessions:
        session.contexts.plan = None  # it was that of this image
    return results


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
            "try vae_dtype=torch.float32 or dtype=torch.float32, or check the files with `bagel inspect --verify`"
        )
    return to_image(pixels.cpu())
