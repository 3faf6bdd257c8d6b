"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ImageResult:
    """An image.

    `image` PIL RGB; `text` the plan of `think`, else None; `latents` (16, h/8, w/8) float32 on the CPU, as the flow
    left them; `seed` the initial seed of its generator. It draws the image again, unless a generator was given that
    had been drawn from before.
    """

    image: Image.Image
    text: str | None
    latents: Tensor
    seed: int


@dataclass(frozen=True)
class TextResult:
    """An answer: its text, its token ids without bos and eos, why it ended ("stop" or "length"), its seed.

    The seed is the initial one of its generator, as in `ImageResult`. `logprobs` holds the log-probability of each
    token under the model, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    seed: int
    logprobs: tuple[float, ...] | None = None
