"""The jobs: what each of them runs through the public pipeline, and the work counted for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from bagel.image import patch_positions, resized_size
from bagel.options import THINK_GENERATE
from bagel.results import TextResult
from benchmarks.bench import Bench
from benchmarks.floors import Phase, Tokens

PROMPT = "A red circle to the left of a blue square, on a white background."
INSTRUCTION = "Make the circle green."
QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Job:
    """One line of the table.

    `sizes`: what is run, in words; `run`: does it once; `work`: what was done, counted from the result of `run`.
    `first`: the same up to the first token, and `tokens`: how many a result of either holds, for jobs that write.
    """

    name: str
    sizes: str
    run: Callable[[], Any]
    work: Callable[[Any], list[Phase]]
    first: Callable[[], Any] | None = None
    tokens: Callable[[Any], int] = lambda _: 0


def draw(bench: Bench, name: str, *, side: int, timesteps: int, images: int = 1) -> Job:
    """Draw from a short text, one image or several together."""
    pipe, side, length = bench.pipe, bench.side(side), bench.length(PROMPT)
    options = _drawing(bench, timesteps, height=side, width=side)
    prompts, seeds = [PROMPT] * images, list(range(images))
    work = [
        bench.read_text(length, *[0] * images),
        *bench.evaluations("text_to_image", options, [length, 0], side=side, images=images),
        bench.autoencoding(side, decode=True, images=images),
    ]
    return Job(
        name,
        f"{images} x {side}x{side}, {options['num_timesteps']} timesteps",
        lambda: pipe.text_to_image(prompts, seed=seeds, **options),
        lambda _: work,
    )


def draw_with_plan(bench: Bench, name: str, *, side: int, timesteps: int, tokens: int) -> Job:
    """Write a plan of so many tokens, then draw."""
    pipe, side, limit = bench.pipe, bench.side(side), bench.tokens(tokens)
    options = _drawing(bench, timesteps, height=side, width=side, seed=0)
    system, prompt = bench.length(THINK_GENERATE), bench.length(PROMPT)
    start = system + prompt

    def work(_: Any) -> list[Phase]:
        # The pipeline keeps the plan's text alone; the same words in the same order write the same plan again.
        plan = pipe.generate([PROMPT], output="text", system_prompt=THINK_GENERATE, max_new_tokens=limit)
        read = bench.length(plan.text)
        return [
            bench.read_text(system, 0),
            bench.read_text(prompt, system),
            bench.decoding([start], _steps(plan)),
            bench.read_text(read, start),
            *bench.evaluations("text_to_image", options, [start + read, system], side=side),
            bench.autoencoding(side, decode=True),
        ]

    return Job(
        name,
        f"plan of {limit} tokens, {side}x{side}, {options['num_timesteps']} timesteps",
        lambda: pipe.text_to_image(PROMPT, think=True, max_think_tokens=limit, **options),
        work,
    )


def edit(bench: Bench, name: str, *, side: int, timesteps: int) -> Job:
    """Change an image, with all three guidance branches at every evaluation."""
    pipe, image = bench.pipe, _image(bench.side(side))
    options = _drawing(bench, timesteps, seed=0)
    side, patches = _seen(bench, image)
    text, latents = bench.length(INSTRUCTION), bench.latent_tokens(side)
    shown = latents + 2 + patches + 2
    work = [
        bench.autoencoding(side, decode=False),
        bench.prefill(Tokens(und=2, gen=latents)),
        bench.vision(patches),
        bench.prefill(Tokens(und=patches + 2, start=latents + 2)),
        bench.read_text(text, shown, 0),
        *bench.evaluations("edit", options, [shown + text, shown, text], side=side),
        bench.autoencoding(side, decode=True),
    ]
    return Job(
        name,
        f"{side}x{side}, {options['num_timesteps']} timesteps",
        lambda: pipe.edit(image, INSTRUCTION, **options),
        lambda _: work,
    )


def understand(bench: Bench, name: str, *, side: int, tokens: int) -> Job:
    """Answer a question about an image in so many tokens."""
    pipe, image, limit = bench.pipe, _image(bench.side(side)), bench.tokens(tokens)
    _, patches = _seen(bench, image)
    text = bench.length(QUESTION)

    def ask(limit: int) -> TextResult:
        return pipe.understand(image, QUESTION, max_new_tokens=limit)

    def work(answer: TextResult) -> list[Phase]:
        return [
            bench.vision(patches),
            bench.prefill(Tokens(und=patches + 2)),
            bench.read_text(text, patches + 2),
            bench.decoding([patches + 2 + text], _steps(answer)),
        ]

    return Job(
        name,
        f"{image.width}x{image.height}, up to {limit} tokens",
        lambda: ask(limit),
        work,
        first=lambda: ask(1),
        tokens=lambda answer: len(answer.token_ids),
    )


def decode(bench: Bench, name: str, *, texts: int, tokens: int) -> Job:
    """Continue several short texts together, each by so many tokens."""
    pipe, limit, length = bench.pipe, bench.tokens(tokens), bench.length(PROMPT)

    def write(limit: int) -> list[TextResult]:
        return pipe.generate_batch([[PROMPT]] * texts, output="text", max_new_tokens=limit)

    def work(answers: list[TextResult]) -> list[Phase]:
        steps = max(_steps(answer) for answer in answers)
        return [bench.read_text(length, *[0] * texts), bench.decoding([length] * texts, steps)]

    return Job(
        name,
        f"{texts} x up to {limit} tokens",
        lambda: write(limit),
        work,
        first=lambda: write(1),
        tokens=lambda answers: sum(len(answer.token_ids) for answer in answers),
    )


def vae(bench: Bench, name: str, *, side: int, decodes: bool) -> Job:
    """Run half the autoencoder on one image."""
    model, side = bench.vae, bench.side(side)
    down, generator = model.config.downsample, torch.Generator().manual_seed(0)
    shape = (model.config.z_channels, side // down, side // down) if decodes else (3, side, side)
    x = torch.randn(1, *shape, generator=generator).clamp(-1, 1).to(bench.pipe.device)
    work = [bench.autoencoding(side, decode=decodes)]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model.decode(x) if decodes else model.encode(x, None)

    return Job(name, f"{side}x{side}", run, lambda _: work)


def vit(bench: Bench, name: str, *, side: int) -> Job:
    """Encode one image for the language model."""
    model, config = bench.pipe.model, bench.vit
    cells = min(bench.side(side), side, config.image_size) // config.patch_size
    patches = cells**2
    x = torch.randn(patches, config.patch_dim, generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = patch_positions(cells, cells, bench.config.vit_max_num_patch_per_side).to(model.device)
    work = [bench.vision(patches)]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model.embed_patches(x, positions, (patches,))

    return Job(name, f"{cells * config.patch_size}x{cells * config.patch_size}, {patches} patches", run, lambda _: work)


JOBS: dict[str, Callable[[Bench, str], Job]] = {
    "t2i-1024-50": lambda bench, name: draw(bench, name, side=1024, timesteps=50),
    "t2i-512-20": lambda bench, name: draw(bench, name, side=512, timesteps=20),
    "t2i-512-20-x4": lambda bench, name: draw(bench, name, side=512, timesteps=20, images=4),
    "think-1024-50": lambda bench, name: draw_with_plan(bench, name, side=1024, timesteps=50, tokens=300),
    "edit-1024-50": lambda bench, name: edit(bench, name, side=1024, timesteps=50),
    "understand-1024": lambda bench, name: understand(bench, name, side=1024, tokens=128),
    "decode-1": lambda bench, name: decode(bench, name, texts=1, tokens=128),
    "decode-8": lambda bench, name: decode(bench, name, texts=8, tokens=128),
    "vae-encode-1024": lambda bench, name: vae(bench, name, side=1024, decodes=False),
    "vae-decode-1024": lambda bench, name: vae(bench, name, side=1024, decodes=True),
    "vit-980": lambda bench, name: vit(bench, name, side=980),
}
"""Every job by its name, to be made for a pipeline; a model that is too small runs the sizes it can take."""


def _drawing(bench: Bench, timesteps: int, **given: Any) -> dict[str, Any]:
    return {"num_timesteps": bench.steps(timesteps), "taylorseer": bench.taylorseer, "progress": False, **given}


def _image(side: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _seen(bench: Bench, image: Image.Image) -> tuple[int, int]:
    """Return the side in pixels that the autoencoder sees of a square image, and the patches that the ViT sees."""
    side, _ = resized_size(*image.size, bench.config.vae_image_transform)
    width, height = resized_size(side, side, bench.config.vit_image_transform)
    patch = bench.vit.patch_size
    return side, (width // patch) * (height // patch)


def _steps(answer: TextResult) -> int:
    """Return how many tokens were decoded: one more than kept where the text ended by itself."""
    return len(answer.token_ids) + (answer.finish_reason == "stop")
