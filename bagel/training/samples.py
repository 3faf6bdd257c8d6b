"""From what a sample says (texts and images, with losses and dropout) to the segments that are packed.

An *item* is one piece of a sample as its author means it; `build` turns a list of items into segments by the rules of
training: the labels of a text, the time of an image, which conditions are dropped. Latents stay clean here: noise is
mixed in on the device, where it costs nothing (`bagel.training.batch.noised`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from bagel.config import BagelConfig
from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Segment, Text, ViTImage
from bagel.processor import Processor
from bagel.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextItem:
    """A text, without bos and eos.

    Args:
        ids: its token ids.
        loss: learn to write it.
        droppable: a condition that is left out now and then, for classifier-free guidance.
        special_label: with `loss`, the id that the closing eos should predict: what follows the text.
    """

    ids: Sequence[int]
    loss: bool = False
    droppable: bool = False
    special_label: int | None = None


@dataclass(frozen=True)
class ViTItem:
    """An image to look at.

    Args:
        patches: (n, patch values), float in [-1, 1] or uint8 in [0, 255].
        position_ids: (n,) long, see `bagel.image.patch_positions`.
        droppable: as for `TextItem`.
        special_label: the id that the closing image token should predict.
    """

    patches: Tensor
    position_ids: Tensor
    droppable: bool = False
    special_label: int | None = None


@dataclass(frozen=True)
class LatentItem:
    """An image as autoencoder latents: a clean condition, or with `loss` the target.

    Args:
        content: latent tokens (n, P) as `Autoencoder.encode` and `patchify` make them, or pixels (3, H, W), float in
            [-1, 1] or uint8 in [0, 255], to be encoded on the device.
        position_ids: (n,) long, cells of the latent grid.
        loss: learn to draw it.
        droppable: as for `TextItem`.
        special_label: the id that the closing image token should predict.
    """

    content: Tensor
    position_ids: Tensor
    loss: bool = False
    droppable: bool = False
    special_label: int | None = None


@dataclass(frozen=True)
class FramesItem:
    """Frames of one video: one full-attention split, and one time for all frames that have a loss.

    Args:
        images: the frames, in order.
        deltas: rotary distance from each frame to the next; one fewer than frames.
    """

    images: tuple[LatentItem, ...]
    deltas: tuple[int, ...]


Item = TextItem | ViTItem | LatentItem | FramesItem


@dataclass(frozen=True)
class PixelImage(LatentImage):
    """Latents that are not there yet: `latents` is a stand-in of the right shape until `pixels` are encoded."""

    pixels: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Dropout:
    """How often a droppable condition is left out."""

    text: float = 0.1
    vae: float = 0.3
    vit: float = 0.3


Times = Literal["logit_normal", "uniform"]


@dataclass(frozen=True)
class Rules:
    """What turns items into segments.

    Args:
        bos: id that opens a text.
        eos: id that closes it.
        latent_dim: values of one latent token.
        timestep_shift: the model's; 1 leaves the drawn times as they are.
        dropout: how often droppable items are dropped.
        weight_by_length: weigh each label of a text by 1 / sqrt(its number of labels), instead of 1.
        times: how times are drawn before the shift: "logit_normal", the sigmoid of a standard normal (the released
            model's way, arXiv 2403.03206), or "uniform", which is how sampling visits them.
    """

    bos: int
    eos: int
    latent_dim: int
    timestep_shift: float = 1.0
    dropout: Dropout = Dropout()
    weight_by_length: bool = False
    times: Times = "logit_normal"

    def __post_init__(self) -> None:
        if self.times not in get_args(Times):
            raise ValueError(f"times must be one of {', '.join(get_args(Times))}, got {self.times!r}")

    @classmethod
    def of(
        cls,
        config: BagelConfig,
        tokenizer: Tokenizer,
        *,
        dropout: Dropout = Dropout(),
        weight_by_length: bool = False,
        times: Times = "logit_normal",
    ) -> Rules:
        """Return the rules of a model and its tokenizer."""
        return cls(
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            latent_dim=config.patch_latent_dim,
            timestep_shift=config.timestep_shift,
            dropout=dropout,
            weight_by_length=weight_by_length,
            times=times,
        )


def timestep(u: float, shift: float) -> float:
    """Return the time sigmoid(u), shifted towards noise: s t / (1 + (s - 1) t)."""
    t = 1 / (1 + math.exp(-u)) if u > -700 else 0.0
    return shift * t / (1 + (shift - 1) * t)


def build(
    items: Sequence[Item], rules: Rules, rng: random.Random, *, draw: Callable[[], float] | None = None
) -> list[Segment]:
    """Turn the items of one sample into segments.

    Args:
        items: in order.
        rules: see `Rules`.
        rng: decides which droppable items are dropped, and the times.
        draw: gives u of the next target in order, its time being sigmoid(u); from `rng`, as the rules say, by default.

    Raises:
        ValueError: an item that contradicts itself; the message says how.
    """
    draw = draw or (lambda: _logistic(rng) if rules.times == "uniform" else rng.gauss(0.0, 1.0))
    segments: list[Segment] = []
    for item in items:
        if isinstance(item, FramesItem):
            t = timestep(draw(), rules.timestep_shift) if any(image.loss for image in item.images) else 0.0
            frames = tuple(_latents(image, rules, t if image.loss else 0.0) for image in item.images)
            segments.append(Frames(frames, item.deltas))
        elif _dropped(item, rules.dropout, rng):
            # An image left out still takes its rotary position; a text leaves no trace.
            segments += [] if isinstance(item, TextItem) else [DroppedImage()]
        elif isinstance(item, TextItem):
            segments.append(_text(item, rules))
        elif isinstance(item, ViTItem):
            segments.append(ViTImage(item.patches, item.position_ids, item.special_label))
        else:
            segments.append(_latents(item, rules, timestep(draw(), rules.timestep_shift) if item.loss else 0.0))
    return segments


def _logistic(rng: random.Random) -> float:
    """Return the u whose sigmoid is uniform."""
    t = max(rng.random(), 1e-12)
    return math.log(t / (1 - t))


def _dropped(item: TextItem | ViTItem | LatentItem, dropout: Dropout, rng: random.Random) -> bool:
    if not item.droppable:
        return False
    if isinstance(item, ViTItem):
        return rng.random() < dropout.vit
    if item.loss:
        raise ValueError(f"a {type(item).__name__} with loss=True cannot be droppable: only conditions are dropped")
    return rng.random() < (dropout.text if isinstance(item, TextItem) else dropout.vae)


def _text(item: TextItem, rules: Rules) -> Text:
    ids = torch.tensor([rules.bos, *item.ids, rules.eos])
    if not item.loss:
        if item.special_label is not None:
            raise ValueError("a text with special_label needs loss=True")
        return Text(ids)
    last = IGNORE if item.special_label is None else item.special_label
    labels = torch.tensor([*item.ids, rules.eos, last])
    if not rules.weight_by_length:
        return Text(ids, labels)
    weights = torch.full(ids.shape, (len(item.ids) + 1) ** -0.5)
    weights[-1] = 1.0
    return Text(ids, labels, weights)


def _latents(item: LatentItem, rules: Rules, t: float) -> LatentImage:
    cells = item.position_ids
    tokens = item.content if item.content.ndim == 2 else torch.zeros(cells.shape[0], rules.latent_dim)
    # The clean latents stand in for the target, too, until noise is mixed in.
    velocity = tokens if item.loss else None
    if item.content.ndim == 2:
        return LatentImage(tokens, cells, t, item.loss, velocity, item.special_label)
    return PixelImage(tokens, cells, t, item.loss, velocity, item.special_label, item.content)


class ItemMaker:
    """Makes items of texts and PIL images for one model: tokenised, resized by its rules, cut into patches.

    Pixels and patches are kept in 8 bits: a quarter of the bytes on their way to the device.

    Args:
        config: the model's.
        tokenizer: the model's.
    """

    def __init__(self, config: BagelConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.processor = Processor(config, tokenizer)

    def text(
        self, text: str, *, loss: bool = False, droppable: bool = False, special_label: int | None = None
    ) -> TextItem:
        """Return a text item."""
        return TextItem(self.processor.tokenizer.encode(text), loss, droppable, special_label)

    def vit(self, image: Image.Image, *, droppable: bool = False) -> ViTItem:
        """Return what the ViT sees of an image."""
        seen = self.processor.see(image)
        return ViTItem(seen.patches, seen.position_ids, droppable)

    def latent(self, image: Image.Image, *, loss: bool = False, droppable: bool = False) -> LatentItem:
        """Return the pixels of an image for the autoencoder."""
        return self._latent(self.processor.pixels(image), loss=loss, droppable=droppable)

    def condition(self, image: Image.Image, *, droppable: bool = True) -> tuple[LatentItem, ViTItem]:
        """Return both views of an input image, in the order in which a model gets them.

        Raises:
            MissingHalfError: the model has no vision half.
        """
        prepared = self.processor.prepare(image)
        seen = self.processor.see(prepared)
        latent = self._latent(prepared.vae_levels, loss=False, droppable=droppable)
        return latent, ViTItem(seen.patches, seen.position_ids, droppable)

    def frames(self, images: Sequence[Image.Image], deltas: Sequence[int], *, loss: bool = True) -> FramesItem:
        """Return the frames of a video as one split."""
        return FramesItem(tuple(self.latent(image, loss=loss) for image in images), tuple(deltas))

    def _latent(self, pixels: Tensor, *, loss: bool, droppable: bool) -> LatentItem:
        step = self.config.latent_downsample
        height, width = pixels.shape[1:]
        if height % step or width % step:
            raise ValueError(f"an image of {width}x{height} pixels does not divide into latent tokens of {step} pixels")
        return LatentItem(pixels, self.processor.grid(height, width), loss, droppable)
