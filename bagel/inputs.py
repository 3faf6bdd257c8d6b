"""From what a caller types and shows to the entries of a context: one `Job` a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.contexts import Entry, GuidanceContexts
from bagel.image import in_unit, open_image, patch_positions, patchify, prepare_input
from bagel.modeling import Bagel, MissingHalfError
from bagel.modeling.decoding import DecodeSteps
from bagel.modeling.graphs import GraphMemory
from bagel.options import THINK_GENERATE, THINK_UNDERSTAND, Options, Output, described
from bagel.packing import LatentImage, Text, ViTImage
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

Input = str | Image.Image
"""One piece of a prompt: a text, or a picture."""


def check_inputs(inputs: Any) -> None:
    """Check that inputs are a list of texts and PIL pictures.

    Raises:
        TypeError: they are no list, or one of them is something else.
        ValueError: the list is empty.
    """
    if not _is_list(inputs):
        raise TypeError(
            f"the inputs must be a list of texts and PIL pictures, got {described(inputs)}; put one alone in a list too"
        )
    if not inputs:
        raise ValueError("there is nothing to read: give at least one text or picture")
    for piece in inputs:
        if not isinstance(piece, str | Image.Image):
            raise TypeError(f"an input must be a text or a PIL picture, got {described(piece)}{_opened(piece)}")


def check_texts(name: str, texts: Any) -> bool:
    """Check that an argument is a text or a list of texts and return whether it is a single one.

    Raises:
        TypeError: it is something else; says so under the argument's name.
    """
    if isinstance(texts, str):
        return True
    if not _is_list(texts) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, got {described(texts)}")
    return False


def with_pictures(images: Any, texts: str | Sequence[str], *, needed: bool) -> list[list[Input]]:
    """Return the inputs of each request: its pictures, then its text.

    Args:
        images: for a single text a picture or a list of them, for a list of texts a list of those.
        texts: one, or a list of them; see `check_texts`.
        needed: whether a request without pictures makes no sense.

    Raises:
        TypeError: something else than PIL pictures among the images.
        ValueError: not as many entries as texts, or no picture where one is needed.
    """
    if isinstance(texts, str):
        return [[*_pictures(images, needed=needed), texts]]
    if not isinstance(images, Image.Image) and not _is_list(images):
        raise _no_picture(images)
    count = 1 if isinstance(images, Image.Image) else len(images)
    if isinstance(images, Image.Image) or count != len(texts):
        raise ValueError(f"a batch of {len(texts)} texts needs {len(texts)} pictures or lists of pictures, got {count}")
    return [[*_pictures(own, needed=needed), text] for own, text in zip(images, texts, strict=True)]


def _pictures(images: Any, *, needed: bool) -> list[Image.Image]:
    pictures = [images] if isinstance(images, Image.Image) or not _is_list(images) else list(images)
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise _no_picture(picture)
    if needed and not pictures:
        raise ValueError("there is no picture to edit: give at least one, or draw with text_to_image")
    return pictures


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _no_picture(value: Any) -> TypeError:
    return TypeError(f"a picture must be a PIL picture, got {described(value)}{_opened(value)}")


def _opened(value: Any) -> str:
    return "; open it with bagel.image.open_image" if isinstance(value, str | PathLike) else ""


@dataclass(frozen=True)
class Parts:
    """The loaded model and what belongs to it; `vae` is None where nothing can be drawn.

    `decode_steps` and `graph_memory` keep scratch memory, on whose contents no result depends.
    """

    model: Bagel
    vae: Autoencoder | None
    tokenizer: Tokenizer
    attention: str = "sdpa"
    decode_steps: DecodeSteps = field(default_factory=DecodeSteps, compare=False, repr=False)
    graph_memory: GraphMemory = field(default_factory=GraphMemory, compare=False, repr=False)

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Ids of the tokens around every picture."""
        return self.tokenizer.image_start_id, self.tokenizer.image_end_id

    def drawing_vae(self) -> Autoencoder:
        """Return the autoencoder.

        Raises:
            MissingHalfError: the checkpoint has no generating half, or was loaded without it.
        """
        if self.vae is None:
            raise MissingHalfError(
                "this model was loaded without its generating half: it cannot draw or edit; "
                "load a checkpoint that has it, with ae.safetensors, and without visual_gen=False"
            )
        return self.vae

    def latent_cells(self, height: int, width: int) -> Tensor:
        """Return the position cells (n,) of the latent tokens of a picture of this size in pixels.

        Raises:
            ValueError: a side longer than the position table, naming both and the cure.
        """
        config = self.model.config
        step = config.latent_downsample
        limit = config.max_latent_size * step
        if not config.interpolate_pos and max(height, width) > limit:
            raise ValueError(
                f"a picture of {height}x{width} pixels does not fit this model's table of latent positions: "
                f"make each side at most {limit} pixels"
            )
        rows, cols = height // step, width // step
        return patch_positions(rows, cols, config.max_latent_size, interpolate=config.interpolate_pos)

    def text(self, text: str, *, allow_special: bool = True) -> Text:
        """Return a text segment: bos, ids, eos. There is no chat template and there are no role names."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, allow_special=allow_special)
        return Text(torch.tensor([tokenizer.bos_id, *ids, tokenizer.eos_id]))


@dataclass
class Job:
    """One request on its way; nothing of it outlives the call but its result.

    `size` is (height, width) in pixels of the picture to draw, `plan` the text that `think` wrote.
    """

    options: Options
    generator: torch.Generator
    entries: list[Entry] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    plan: str | None = None
    contexts: GuidanceContexts | None = None


def prepare(parts: Parts, inputs: Sequence[Input], options: Options, output: Output) -> Job:
    """Turn inputs, checked by `check_inputs`, into a job; the posterior noise of its pictures is drawn in order.

    Raises:
        ValueError: a picture or size that does not fit, posterior noise of another number or shape.
        MissingHalfError: a picture for a model that cannot see, a drawing asked of one that cannot draw.
    """
    job = Job(options, options.new_generator())
    system = options.system_prompt
    if system is None and options.think:
        system = THINK_UNDERSTAND if output == "text" else THINK_GENERATE
    if system is not None:
        job.entries.append(Entry(parts.text(system), "system"))
    pictures: list[Image.Image] = []
    for piece in inputs:
        if isinstance(piece, str):
            job.entries.append(Entry(parts.text(piece, allow_special=options.allow_special), "text"))
        else:
            _add_picture(parts, job, piece, output, index=len(pictures))
            pictures.append(piece)
    given = options.posterior_noise
    if given is not None and len(given) != len(pictures):
        raise ValueError(
            f"posterior_noise needs one tensor for each of {len(pictures)} input pictures, got {len(given)}"
        )
    if output == "image":
        parts.drawing_vae()
        job.size = _output_size(parts, job)
    return job


def _add_picture(parts: Parts, job: Job, picture: Image.Image, output: Output, *, index: int) -> None:
    config = parts.model.config
    if config.vit_config is None or not config.visual_und:
        raise MissingHalfError(
            "this model was loaded without its vision half: it cannot see pictures, so not edit them either; "
            "load a checkpoint that has it, and without visual_und=False"
        )
    prepared = prepare_input(
        open_image(picture, exif=job.options.exif),
        vae_rule=config.vae_image_transform,
        vit_rule=config.vit_image_transform,
        patch_size=config.vit_config.patch_size,
        once=job.options.resize_once,
    )
    if output == "image":
        width, height = prepared.size
        latents = _encode(parts, job, prepared.vae_levels, index)
        tokens = patchify(latents, config.latent_patch_size)
        job.entries.append(Entry(LatentImage(tokens, parts.latent_cells(height, width)), "image"))
        job.size = height, width
    side = config.vit_max_num_patch_per_side
    cells = patch_positions(*prepared.vit_grid, side, interpolate=config.interpolate_pos)
    job.entries.append(Entry(ViTImage(prepared.vit_patches, cells), "image"))


def _encode(parts: Parts, job: Job, pixels: Tensor, index: int) -> Tensor:
    """Return the latents (z, h, w) of pixels (3, H, W), sampled from the posterior unless its mean is wanted."""
    vae, options = parts.drawing_vae(), job.options
    down = vae.config.downsample
    shape = (1, vae.config.z_channels, pixels.shape[1] // down, pixels.shape[2] // down)
    noise = None
    if options.posterior_noise is not None:
        noise = options.posterior_noise[index]
        if tuple(noise.shape) not in (shape, shape[1:]):
            raise ValueError(f"posterior_noise[{index}] must be {shape[1:]}, got {tuple(noise.shape)}")
        noise = noise.reshape(shape)
    elif options.posterior == "sample":
        noise = torch.randn(shape, generator=job.generator)
    return vae.encode(in_unit(pixels[None].to(parts.model.device)), noise)[0]


def _output_size(parts: Parts, job: Job) -> tuple[int, int]:
    """Return (height, width) to draw: as asked, else the last picture's, else a square as large as was trained."""
    config, options = parts.model.config, job.options
    step = config.latent_downsample
    side = min(1024, config.max_latent_size * step)
    height = (job.size[0] or side) if options.height is None else options.height
    width = (job.size[1] or side) if options.width is None else options.width
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            nearest = max(round(value / step), 1) * step
            raise ValueError(f"{name} must be a positive multiple of {step}, got {value}; the nearest is {nearest}")
    parts.latent_cells(height, width)  # a size over the position table is refused here, before any work
    return height, width


def begin(parts: Parts, job: Job, *, text_tokens: int, image_dropped: bool) -> GuidanceContexts:
    """Give a job its contexts, with room for its entries, for `text_tokens` to be written, and for its picture."""
    block = 2 + parts.latent_cells(*job.size).shape[0] if job.size != (0, 0) else 0
    job.contexts = GuidanceContexts(
        parts.model,
        capacity=sum(len(entry) for entry in job.entries) + text_tokens + block,
        headroom=block,
        image_dropped=image_dropped,
    )
    return job.contexts
