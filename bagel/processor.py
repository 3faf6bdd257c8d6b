"""From texts and images to segments, and back to latents: all that needs the configuration but no weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from PIL import Image
from torch import Tensor

from bagel.config import BagelConfig, MissingHalfError
from bagel.image import (
    PreparedImage,
    open_image,
    patch_positions,
    patchify,
    prepare_input,
    resize,
    to_levels,
    unpatchify,
)
from bagel.packing import LatentImage, Packed, Text, ViTImage, pack
from bagel.tokenizer import Tokenizer

LARGEST_SIDE = 1024
"""Pixels of the side of the largest images that BAGEL was trained to draw."""


@dataclass(frozen=True)
class Processor:
    """Turns texts and images into segments by the rules of one model; holds no weights and can be pickled.

    Args:
        config: the model's.
        tokenizer: the model's.
    """

    config: BagelConfig
    tokenizer: Tokenizer

    # Texts ----------------------------------------------------------------------------------------------------------

    def text(self, text: str, *, allow_special: bool = True) -> Text:
        """Return a text as a segment: bos, ids, eos. There is no chat template and there are no role names.

        Args:
            text: any text.
            allow_special: let strings that spell special tokens become them.
        """
        ids = self.tokenizer.encode(text, allow_special=allow_special)
        return Text(torch.tensor([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]))

    def written(self, ids: Sequence[int]) -> Text:
        """Return token ids as a segment, between bos and eos: so an answer enters the sequence that it was written in.

        Args:
            ids: n ids without bos and eos.

        Raises:
            ValueError: an id that the model has no embedding for.
            TypeError: something else than whole numbers.
        """
        size, ids = self.config.llm_config.vocab_size, [operator.index(token) for token in ids]
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise ValueError(f"token ids must lie between 0 and {size - 1}, got {wrong[0]}")
        return Text(torch.tensor([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]))

    @cached_property
    def image_tokens(self) -> tuple[int, int]:
        """Ids of the tokens around every image."""
        return self.tokenizer.image_start_id, self.tokenizer.image_end_id

    # Images in ------------------------------------------------------------------------------------------------------

    def prepare(self, image: Image.Image, *, exif: bool = True, once: bool = False) -> PreparedImage:
        """Resize an image for the ViT and for the autoencoder; see `bagel.image.prepare_input`.

        Args:
            image: of any mode and size.
            exif: turn it as its EXIF data say.
            once: apply both resize rules to the image itself, not one after the other.

        Raises:
            MissingHalfError: the model has no vision half.
            ImageError: an image that cannot be used.
        """
        config = self.config
        if config.vit_config is None or not config.visual_und:
            raise MissingHalfError(
                "this model was loaded without its vision half: it cannot see images, so not edit them either; "
                "load a checkpoint that has it, and without visual_und=False"
            )
        return prepare_input(
            open_image(image, exif=exif),
            vae_rule=config.vae_image_transform,
            vit_rule=config.vit_image_transform,
            patch_size=config.vit_config.patch_size,
            once=once,
        )

    def see(self, image: Image.Image | PreparedImage) -> ViTImage:
        """Return an image as the ViT sees it: patches (n, 588) uint8, and their cells of the position grid.

        Raises:
            MissingHalfError: the model has no vision half.
            ImageError: an image that cannot be used.
            ValueError: it has more patches along a side than the position grid.
        """
        prepared = image if isinstance(image, PreparedImage) else self.prepare(image)
        side, interpolate = self.config.vit_max_num_patch_per_side, self.config.interpolate_pos
        return ViTImage(prepared.vit_patches, patch_positions(*prepared.vit_grid, side, interpolate=interpolate))

    def pixels(self, image: Image.Image | PreparedImage, *, exif: bool = True) -> Tensor:
        """Return an image as the autoencoder gets it, uint8 (3, H, W), see `bagel.image.in_unit`; needs no ViT.

        Raises:
            ImageError: an image that cannot be used.
        """
        if isinstance(image, PreparedImage):
            return image.vae_levels
        rule = self.config.vae_image_transform
        return to_levels(resize(resize(open_image(image, exif=exif), rule), rule)).contiguous()

    # Latents --------------------------------------------------------------------------------------------------------

    def latents(self, z: Tensor) -> LatentImage:
        """Return latents of the autoencoder as a clean segment.

        Args:
            z: latents (Z, h, w); h and w must be multiples of `latent_patch_size`.

        Raises:
            ValueError: other sides, or an image that does not fit the position table.
        """
        tokens = patchify(z, self.config.latent_patch_size)
        down = self.config.latent_downsample // self.config.latent_patch_size
        return LatentImage(tokens, self.grid(z.shape[1] * down, z.shape[2] * down))

    def image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return the latents (Z, h, w) of an image of latent tokens (n, P): what the autoencoder decodes.

        Args:
            tokens: latent tokens row by row.
            height: of the image in pixels.
            width: of the image in pixels.

        Raises:
            ValueError: another number of tokens than an image of this size has.
        """
        step = self.config.latent_downsample
        return unpatchify(tokens, height=height // step, width=width // step, patch=self.config.latent_patch_size)

    def grid(self, height: int, width: int) -> Tensor:
        """Return the position cells (n,), long, of the latent tokens of an image of this size in pixels.

        Raises:
            ValueError: a side longer than the position table, naming both and the cure.
        """
        config = self.config
        step = config.latent_downsample
        limit = config.max_latent_size * step
        if not config.interpolate_pos and max(height, width) > limit:
            raise ValueError(
                f"an image of {height}x{width} pixels does not fit this model's table of latent positions: "
                f"make each side at most {limit} pixels"
            )
        rows, cols = height // step, width // step
        return patch_positions(rows, cols, config.max_latent_size, interpolate=config.interpolate_pos)

    def check_size(self, height: int, width: int) -> None:
        """Check that an image of this size in pixels can be drawn.

        Raises:
            ValueError: a side that is no positive multiple of `latent_downsample`, or longer than the position table.
        """
        step = self.config.latent_downsample
        for name, value in (("height", height), ("width", width)):
            if value < step or value % step:
                nearest = max(round(value / step), 1) * step
                raise ValueError(f"{name} must be a positive multiple of {step}, got {value}; the nearest is {nearest}")
        self.grid(height, width)

    @cached_property
    def default_side(self) -> int:
        """Pixels of the side of the square that is drawn where no size is given: as large as was trained."""
        return min(LARGEST_SIDE, self.config.max_latent_size * self.config.latent_downsample)

    # Sequences ------------------------------------------------------------------------------------------------------

    @cached_property
    def pack(self) -> Callable[..., Packed]:
        """Packs samples with this model's image tokens: `bagel.packing.pack` with all of its other arguments."""
        return partial(pack, image_tokens=self.image_tokens)
