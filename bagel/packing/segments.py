"""Segments: what a sample is made of, in order; each says how many tokens and rotary positions it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bagel.packing.layout import LATENT, TEXT, VIT, Rule

IGNORE = -100
"""Label of a text token that has no loss."""


@dataclass(frozen=True)
class Text:
    """A run of text: causal attention, one rotary position per token.

    Args:
        ids: token ids (n,), long, with bos and eos where they are wanted.
        labels: for training, the id each token should predict (n,), `IGNORE` where there is no loss.
        weights: for training, the weight of each label (n,), float; all one by default.
    """

    ids: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None
    attention: ClassVar[Rule] = "causal"
    end_label: ClassVar[None] = None

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return self.ids.shape[0]

    advance = length  # a rotary position per token

    def runs(self) -> tuple[Part, ...]:
        """Return the runs of tokens that are alike, in order."""
        return ((self, TEXT, self.ids.shape[0], 0),)


@dataclass(frozen=True)
class ViTImage:
    """An image as the understanding expert sees it: full attention, one rotary position for the whole segment.

    Args:
        patches: flattened pixels (n, 588), in [-1, 1] or, as they come, uint8.
        position_ids: cells of the ViT's position grid (n,), long, from `bagel.image.patch_positions`.
        end_label: for training, the id that the closing image token should predict.
    """

    patches: Tensor
    position_ids: Tensor
    end_label: int | None = None
    attention: ClassVar[Rule] = "full"
    advance: ClassVar[int] = 1

    @property
    def length(self) -> int:
        """Tokens of the segment, with the two around the image."""
        return self.patches.shape[0] + 2

    def runs(self) -> tuple[Part, ...]:
        """Return the runs of tokens that are alike, in order."""
        return ((self, VIT, self.patches.shape[0], 0),)


@dataclass(frozen=True)
class LatentImage:
    """An image as autoencoder latents: full attention, one rotary position for the whole segment.

    Args:
        latents: latent patches (n, 64); for a noisy image the mixture (1 - t) z + t noise.
        position_ids: cells of the latent position grid (n,), long.
        timestep: t in [0, 1]; 0 is a clean image.
        noisy: a target that no later segment may see; it does not advance the rotary position.
        velocity: for training, the target noise - z (n, 64).
        end_label: for training, the id that the closing image token should predict.
    """

    latents: Tensor
    position_ids: Tensor
    timestep: float = 0.0
    noisy: bool = False
    velocity: Tensor | None = None
    end_label: int | None = None

    @property
    def attention(self) -> Rule:
        """The attention rule of the segment's tokens."""
        return "noise" if self.noisy else "full"

    @property
    def length(self) -> int:
        """Tokens of the segment, with the two around the image."""
        return self.latents.shape[0] + 2

    @property
    def advance(self) -> int:
        """Rotary positions that the segment takes."""
        return 0 if self.noisy else 1

    def runs(self) -> tuple[Part, ...]:
        """Return the runs of tokens that are alike, in order."""
        return ((self, LATENT, self.latents.shape[0], 0),)


@dataclass(frozen=True)
class Frames:
    """Frames of one video: a single full-attention split that later segments may see, noisy frames too.

    Args:
        images: the frames, in order.
        deltas: rotary distance from each frame to the next; one fewer than frames. What follows is one position after
            the last frame, or at it if that frame is noisy.

    Raises:
        ValueError: no frame, or another number of deltas.
    """

    images: tuple[LatentImage, ...]
    deltas: tuple[int, ...]
    attention: ClassVar[Rule] = "full"

    def __post_init__(self) -> None:
        if not self.images or len(self.deltas) != len(self.images) - 1:
            raise ValueError(
                f"Frames needs at least one frame and one delta fewer than frames, got {len(self.images)} frames "
                f"and {len(self.deltas)} deltas"
            )

    @property
    def length(self) -> int:
        """Tokens of the segment, with the two around each frame."""
        return sum(image.length for image in self.images)

    @property
    def advance(self) -> int:
        """Rotary positions that the segment takes."""
        return sum(self.deltas) + self.images[-1].advance

    def runs(self) -> tuple[Part, ...]:
        """Return the runs of tokens that are alike, in order."""
        offsets = [sum(self.deltas[:index]) for index in range(len(self.images))]
        return tuple(
            (image, LATENT, image.latents.shape[0], offset) for image, offset in zip(self.images, offsets, strict=True)
        )


@dataclass(frozen=True)
class DroppedImage:
    """A condition image left out for classifier-free guidance: no tokens, but it advances the rotary position."""

    attention: ClassVar[Rule] = "full"
    length: ClassVar[int] = 0
    advance: ClassVar[int] = 1

    def runs(self) -> tuple[Part, ...]:
        """Return no runs."""
        return ()


Segment = Text | ViTImage | LatentImage | Frames | DroppedImage
Part = tuple[Text | ViTImage | LatentImage, int, int, int]
"""What holds the tensors of a run, its kind, its tokens without the two around an image, and the distance of its rotary
position from the segment's first."""
