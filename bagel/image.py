"""Images in and out: opening, the resize rule, pixels, patches and their positions.

A PIL image becomes RGB, is resized by a rule (`bagel.config.ImageTransform`), turned into pixels in [-1, 1] and cut
into patches; the way back ends in a PIL image. Sizes of images are (width, height) as in PIL, of tensors and grids
(height, width) or (rows, columns).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from bagel.config import ImageTransform

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> what makes the image upright (EXIF 2.3, table 6)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message names it."""


# Opening ------------------------------------------------------------------------------------------------------------


def open_image(source: str | Path | Image.Image, *, exif: bool = True) -> Image.Image:
    """Open an image as a person would see it: upright and RGB, without metadata.

    `source` is a path or a PIL image (which is left as it is). Of an animated file the first frame is used; of a PIL
    image the frame it stands at. `exif=False` ignores EXIF rotation, as the official code does; EXIF data that cannot
    be read means no rotation. Colours: see `to_rgb`. A file larger than `PIL.Image.MAX_IMAGE_PIXELS` is refused.

    Raises ImageError for a file that is missing, no image, broken, truncated, too large or of size zero.
    """
    if isinstance(source, Image.Image):
        name = f"the given image ({source.mode}, {source.width}x{source.height})"
        return _upright_rgb(source, name, exif=exif)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"an image must be a path or a PIL image, got {type(source).__name__}")
    try:
        with Image.open(source) as image:
            _check_bomb(image, str(source))
            return _upright_rgb(image, str(source), exif=exif)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{source}: there is no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(source)) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{source}: not an image in a format that PIL knows") from error
    except Exception as error:  # PIL's parsers raise anything from SyntaxError to struct.error on broken bytes
        raise _unreadable(str(source), error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with whatever is transparent pasted on white.

    Transparent are alpha channels (RGBA, LA, PA) and a transparency entry (palette, grey or RGB tRNS). Grey of more
    than 8 bits is scaled, not clipped: 16-bit and 32-bit integers (`I;16`, `I`) from 0..65535, floats (`F`) from 0..1.

    Raises ImageError for values outside those ranges and for modes that PIL cannot convert.
    """
    try:
        if image.mode == "F" or image.mode.startswith("I"):
            return _deep_grey_to_rgb(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"an image of mode {image.mode} cannot be converted to RGB ({error})") from error
    return _on_white(rgba, rgba.getchannel("A"))


def _upright_rgb(image: Image.Image, name: str, *, exif: bool) -> Image.Image:
    if min(image.size) < 1:
        raise ImageError(f"{name}: the image is empty, {image.width}x{image.height} pixels")
    try:
        image.load()  # before the orientation is read: some formats turn the image on loading
        upright = _transpose(image) if exif else image
        rgb = to_rgb(upright)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # see open_image
        raise _unreadable(name, error) from error
    rgb.info = {}  # opening the result again must not turn it twice
    return rgb


def _transpose(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # an image is seen as stored when its EXIF block is broken
        return image
    method = UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageError(f"mode {image.mode} must hold values in 0..{top}, got {low}..{high}; scale them first")
    grey = np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    if "transparency" not in image.info:
        return rgb
    opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return _on_white(rgb, Image.fromarray(opaque))


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=alpha)
    return white


def _check_bomb(image: Image.Image, name: str) -> None:
    # PIL itself only warns between one and two times its limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name)


def _too_large(name: str) -> ImageError:
    return ImageError(
        f"{name}: the image has more than {Image.MAX_IMAGE_PIXELS} pixels and may be a decompression bomb; "
        "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _unreadable(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: the image cannot be read, it may be broken or cut short ({error})")


# Sizes --------------------------------------------------------------------------------------------------------------


def resized_size(width: int, height: int, rule: ImageTransform) -> tuple[int, int]:
    """Return the (width, height) in pixels that a rule gives an image; both are multiples of the stride.

    The long side is shrunk to `max_image_size`, then the short side grown to `min_image_size`; an area over
    `max_pixels` and a long side over the maximum are scaled down again, each time rounded to the stride.

    Raises ValueError for sides below 1.
    """
    if min(width, height) < 1:
        raise ValueError(f"an image must have at least 1x1 pixels, got {width}x{height}")
    scale = min(rule.max_image_size / max(width, height), 1.0)
    scale = max(scale, rule.min_image_size / min(width, height))
    width, height = _scaled(width, height, scale, rule.image_stride)
    if width * height > rule.max_pixels:
        # The official rule: the ratio of areas scales the sides, without a square root.
        width, height = _scaled(width, height, rule.max_pixels / (width * height), rule.image_stride)
    if max(width, height) > rule.max_image_size:
        width, height = _scaled(width, height, rule.max_image_size / max(width, height), rule.image_stride)
    return width, height


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    return _to_stride(round(width * scale), stride), _to_stride(round(height * scale), stride)


def _to_stride(side: int, stride: int) -> int:
    return max(stride, round(side / stride) * stride)


def resize(image: Image.Image, rule: ImageTransform) -> Image.Image:
    """Resize an image by a rule, bicubic; an image that has the size already is returned as it is."""
    size = resized_size(image.width, image.height, rule)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# Pixels and patches ---------------------------------------------------------------------------------------------------


def to_pixels(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image as float32 in [-1, 1], shape (3, H, W).

    Raises ImageError for an image of another mode.
    """
    return in_unit(to_levels(image).contiguous())


def to_levels(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image as they are, uint8 (3, H, W); raises as `to_pixels`."""
    if image.mode != "RGB":
        raise ImageError(f"pixels are taken from an RGB image, got mode {image.mode}; open it with open_image")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), as it lies in memory


def in_unit(pixels: Tensor) -> Tensor:
    """Return pixels of any shape as floats in [-1, 1]: uint8 is scaled, floats are so already."""
    return (pixels.float() / 255 - 0.5) / 0.5 if pixels.dtype == torch.uint8 else pixels


def to_image(pixels: Tensor) -> Image.Image:
    """Turn pixels (3, H, W), nominally in [-1, 1], into an RGB image; levels are truncated, not rounded.

    Raises ImageError for another shape and for values that are not finite.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(f"pixels must have shape (3, H, W), got {tuple(pixels.shape)}")
    pixels = pixels.detach().float()
    if not pixels.isfinite().all():
        raise ImageError(
            "the pixels hold NaN or infinite values: the weights are damaged, or the dtype overflows "
            "(try bfloat16 or float32)"
        )
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut (C, H, W) into square patches, shape (N, patch * patch * C), each in the order row, column, channel.

    Raises ValueError where H or W is not a multiple of `patch`.
    """
    _, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch}x{patch} need sides that are multiples of {patch}, got {width}x{height}")
    return rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Tensor, *, height: int, width: int, patch: int) -> Tensor:
    """Put patches (N, patch * patch * C) together again, shape (C, height * patch, width * patch); undoes `patchify`.

    `height` and `width` count patches. Raises ValueError where N is not height * width or the patches do not divide.
    """
    count, values = tokens.shape
    if count != height * width:
        raise ValueError(f"{width}x{height} patches are {height * width} tokens, got {count}")
    if values % patch**2:
        raise ValueError(f"patches of {patch}x{patch} need a multiple of {patch**2} values a token, got {values}")
    return rearrange(tokens, "(h w) (p q c) -> c (h p) (w q)", h=height, w=width, p=patch, q=patch)


def patch_positions(rows: int, cols: int, side: int, *, interpolate: bool = False) -> Tensor:
    """Return where each patch of a rows x cols grid lies in a square table of `side`: `row * side + column`.

    The result is int64 of shape (rows * cols,), row by row. With `interpolate` the grid is spread over the whole table
    (as in NaViT, arXiv 2307.06304, with the table's cells as buckets) and may have any size.

    Raises ValueError for an empty grid, and for one larger than the table unless `interpolate` is set.
    """
    if min(rows, cols) < 1:
        raise ValueError(f"an image needs at least one row and one column of patches, got {rows} rows, {cols} columns")
    if interpolate:
        row, col = _bucketed(rows, side), _bucketed(cols, side)
    elif max(rows, cols) > side:
        raise ValueError(
            f"an image of {rows} rows and {cols} columns of patches does not fit the position table of "
            f"{side}x{side}: make its sides smaller (at most {side} patches), or use a model with interpolate_pos"
        )
    else:
        row, col = torch.arange(rows), torch.arange(cols)
    return (row[:, None] * side + col).flatten()  # (rows, 1) + (cols,) -> (rows * cols,)


def _bucketed(count: int, side: int) -> Tensor:
    # float32 throughout: it decides on which side of a cell's border a coordinate falls
    coordinates = torch.arange(0, 1 - 1e-6, 1 / count, dtype=torch.float32)
    borders = torch.arange(1 / side, 1, 1 / side, dtype=torch.float32)
    return torch.bucketize(coordinates, borders, right=True)


# Inputs of the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedImage:
    """What the model needs of one input image."""

    size: tuple[int, int]
    """(width, height) in pixels after the VAE rule: the size of an edit of this image."""
    vae_image: Image.Image
    vit_patches: Tensor
    """What the ViT gets, uint8 (rows * cols, patch_size * patch_size * 3); see `in_unit`."""
    vit_grid: tuple[int, int]
    """(rows, cols) of ViT patches."""

    @cached_property
    def vae_levels(self) -> Tensor:
        """What the autoencoder gets, uint8 (3, H, W), see `in_unit`; made when asked for: a question never does."""
        return to_levels(self.vae_image).contiguous()


def prepare_input(
    image: Image.Image, *, vae_rule: ImageTransform, vit_rule: ImageTransform, patch_size: int, once: bool = False
) -> PreparedImage:
    """Make the VAE's pixels and the ViT's patches of an RGB image (see `open_image`), in 8 bits both.

    The image is resized by the VAE rule, and both rules are then applied to the result, as in the official inference
    code. `once=True` applies each rule to the image itself, once, as the official benchmarks do.

    Raises ImageError for an image that is not RGB, ValueError where the ViT rule's sides are no multiple of the patch.
    """
    first = resize(image, vae_rule)
    vit_levels = to_levels(resize(image if once else first, vit_rule))
    return PreparedImage(
        size=first.size,
        vae_image=first if once else resize(first, vae_rule),
        vit_patches=patchify(vit_levels, patch_size),
        vit_grid=(vit_levels.shape[1] // patch_size, vit_levels.shape[2] // patch_size),
    )
