"""Draw pictures from prepared contexts: guidance branches, the flow, the autoencoder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from bagel.contexts import GuidanceContexts, copied, extend
from bagel.image import to_image, unpatchify
from bagel.inputs import Job, Parts
from bagel.modeling import Branch, Context, Denoiser
from bagel.sampling import FlowStep, Guidance, GuidedVelocity, PictureBranches, euler


def draw(parts: Parts, jobs: Sequence[Job]) -> list[tuple[Image.Image, Tensor]]:
    """Return picture and latents (z, h, w) float32 of each job, drawn together; the contexts stay as they are."""
    noise = [_noise(parts, job).to(parts.model.device) for job in jobs]
    velocity, timesteps = plan_flow(parts, jobs)
    with tqdm(total=len(timesteps) - 1, desc="drawing", unit="step", disable=not _shows_progress(jobs)) as bar:
        latents = euler(velocity, noise, timesteps, on_step=_observer(jobs, bar))
    return [_finish(parts, job, tokens) for job, tokens in zip(jobs, latents, strict=True)]


def plan_flow(parts: Parts, jobs: Sequence[Job]) -> tuple[GuidedVelocity, Tensor]:
    """Return the guided velocity of all jobs' pictures on their prefilled contexts, and the times of the flow."""
    options = jobs[0].options
    timesteps = options.timesteps
    branches, pictures = _branches(parts, jobs, options.guidance)
    denoiser = Denoiser(
        parts.model,
        branches,
        position_ids=[parts.latent_cells(*job.size) for job in jobs],
        timesteps=timesteps[:-1],
        image_tokens=parts.image_tokens,
        attention=parts.attention,
        graph_memory=parts.graph_memory,
    )
    velocity = GuidedVelocity(
        denoiser.hidden,
        denoiser.velocity,
        pictures,
        guidance=options.guidance,
        timesteps=timesteps[:-1],
        taylorseer=options.taylorseer,
    )
    return velocity, timesteps


def _noise(parts: Parts, job: Job) -> Tensor:
    """Return the start noise (tokens, P) float32, drawn on the CPU unless it was given."""
    config = parts.model.config
    shape = (parts.latent_cells(*job.size).shape[0], config.patch_latent_dim)
    given = job.options.noise
    if given is None:
        return torch.randn(shape, generator=job.generator)
    if tuple(given.shape) != shape:
        raise ValueError(f"noise for {job.size[0]}x{job.size[1]} pixels must be {shape}, got {tuple(given.shape)}")
    return given.float()


def _branches(parts: Parts, jobs: Sequence[Job], guidance: Guidance) -> tuple[list[Branch], list[PictureBranches]]:
    """List the branches of all pictures; contexts that hold the same tokens share one."""
    branches: list[Branch] = []
    pictures = []
    for number, job in enumerate(jobs):
        contexts = job.contexts
        assert contexts is not None
        own: list[int] = []

        def index(
            context: Context, own: list[int] = own, contexts: GuidanceContexts = contexts, n: int = number
        ) -> int:
            for known in own:
                if branches[known].context.same_as(context):
                    return known
            branches.append(Branch(n, context, contexts.place(context)))
            own.append(len(branches) - 1)
            return own[-1]

        full = index(contexts.full)
        text = index(_text_dropped(parts, job)) if guidance.uses_text else None
        image = index(contexts.image_dropped) if guidance.uses_image else None
        pictures.append(PictureBranches(full, text, image))
    return branches, pictures


def _text_dropped(parts: Parts, job: Job) -> Context:
    """Return the context without the last text, or ending in the negative prompt in its place."""
    assert job.contexts is not None
    dropped, negative = job.contexts.text_dropped, job.options.negative_prompt
    if negative is None:
        return dropped
    replaced = copied(parts.model, dropped)
    segment = parts.text(negative, allow_special=job.options.allow_special)
    extend(parts.model, [replaced], [[segment]], image_tokens=parts.image_tokens, attention=parts.attention)
    return replaced


def _observer(jobs: Sequence[Job], bar: tqdm) -> Callable[[FlowStep], None]:
    def observe(step: FlowStep) -> None:
        if step.picture == 0:
            bar.update()
        on_step = jobs[step.picture].options.on_step
        if on_step is not None:
            on_step(step)

    return observe


def _shows_progress(jobs: Sequence[Job]) -> bool:
    """Whether a bar is wanted and somebody can see it: on a terminal or in a notebook."""
    notebook = "ipykernel" in sys.modules
    return jobs[0].options.progress and (notebook or sys.stderr.isatty())


def _finish(parts: Parts, job: Job, tokens: Tensor) -> tuple[Image.Image, Tensor]:
    config = parts.model.config
    side = config.latent_downsample
    latents = unpatchify(tokens, height=job.size[0] // side, width=job.size[1] // side, patch=config.latent_patch_size)
    pixels = parts.drawing_vae().decode(latents[None])[0].float()
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(
            "the picture came out as NaN or infinity; the weights are damaged or the type overflows: "
            "try dtype=torch.float32, or check the files with `bagel inspect --verify`"
        )
    return to_image(pixels.cpu()), latents.cpu()
