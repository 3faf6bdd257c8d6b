"""Segments of text and pictures, and the one place that packs them into a sequence.

A *sample* is a list of segments. Packing lays the tokens of several samples out as two streams, one for each expert:
all *und* tokens (text, ViT patches, the tokens around every image), then all *gen* tokens (VAE latents). Within a
stream, samples and their segments keep their order, so that an expert's tokens are always one contiguous slice, and
attention finds the tokens of a sample in at most two slices. `Packed.order` gives the order of the sequence back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from bagel.image import in_unit

IGNORE = -100
"""Label of a text token that has no loss."""

Attention = Literal["causal", "full", "noise"]


@dataclass(frozen=True)
class Text:
    """A run of text: causal attention, one rotary position a token.

    Args:
        ids: token ids (n,), long, with bos and eos where they are wanted.
        labels: for training, the id each token should predict (n,), `IGNORE` where there is no loss.
        weights: for training, the weight of each label (n,), float; all one by default.
    """

    ids: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class ViTImage:
    """A picture as the understanding expert sees it: full attention, one rotary position for the whole segment.

    Args:
        patches: flattened pixels (n, 588), in [-1, 1] or, as they come, uint8.
        position_ids: cells of the ViT's position grid (n,), long, from `bagel.image.patch_positions`.
        end_label: for training, the id that the closing image token should predict.
    """

    patches: Tensor
    position_ids: Tensor
    end_label: int | None = None


@dataclass(frozen=True)
class LatentImage:
    """A picture as autoencoder latents: full attention, one rotary position for the whole segment.

    Args:
        latents: latent patches (n, 64); for a noisy picture the mixture (1 - t) z + t noise.
        position_ids: cells of the latent position grid (n,), long.
        timestep: t in [0, 1]; 0 is a clean picture.
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


@dataclass(frozen=True)
class Frames:
    """Frames of one video: a single full-attention split that later segments may see, noisy frames too.

    Args:
        images: the frames, in order.
        deltas: rotary distance from each frame to the next; one fewer than frames. What follows is one position after
            the last frame, or at it if that frame is noisy.
    """

    images: tuple[LatentImage, ...]
    deltas: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.images or len(self.deltas) != len(self.images) - 1:
            raise ValueError(
                f"Frames needs at least one frame and one delta fewer than frames, got {len(self.images)} frames "
                f"and {len(self.deltas)} deltas"
            )


@dataclass(frozen=True)
class DroppedImage:
    """A condition picture left out for classifier-free guidance: no tokens, but it advances the rotary position."""


Segment = Text | ViTImage | LatentImage | Frames | DroppedImage


@dataclass(frozen=True)
class Split:
    """Tokens of a sample that share an attention rule, counted in sequence order."""

    length: int
    attention: Attention


@dataclass(frozen=True)
class PackedSample:
    """Where one sample's tokens are: a slice of each stream, its splits, and the order of its sequence.

    `order` (n,) indexes the sample's tokens laid out as [und slice | gen slice].
    """

    und: slice
    gen: slice
    splits: tuple[Split, ...]
    order: Tensor

    def __len__(self) -> int:
        return sum(split.length for split in self.splits)

    def mask(self) -> Tensor:
        """Return who sees whom, bool (n, n) in sequence order: earlier splits but noisy ones, and within a split."""
        split_of = torch.repeat_interleave(torch.tensor([split.length for split in self.splits]))
        rule = [split.attention for split in self.splits]
        noise = torch.tensor([name == "noise" for name in rule])[split_of]
        causal = torch.tensor([name == "causal" for name in rule])[split_of]
        index = torch.arange(len(self))
        earlier = (split_of[:, None] > split_of[None, :]) & ~noise[None, :]
        within = split_of[:, None] == split_of[None, :]
        return earlier | (within & (~causal[:, None] | (index[:, None] >= index[None, :])))

    def stream_mask(self) -> Tensor:
        """Return the same mask for tokens laid out as [und slice | gen slice]."""
        inverse = torch.argsort(self.order)
        return self.mask()[inverse][:, inverse]


@dataclass(frozen=True)
class Packed:
    """Several samples as two streams of tokens: `Tu` for the und expert, `Tg` for the gen expert."""

    text_ids: Tensor  # (Nt,) long
    text_rows: Tensor  # (Nt,) rows of the und stream
    vit_patches: Tensor  # (Nv, 588)
    vit_position_ids: Tensor  # (Nv,) long
    vit_rows: Tensor  # (Nv,) rows of the und stream
    vit_lengths: tuple[int, ...]
    latents: Tensor  # (Tg, 64)
    latent_position_ids: Tensor  # (Tg,) long
    timesteps: Tensor  # (Tg,) float32 in [0, 1]
    und_positions: Tensor  # (Tu,) rotary positions
    gen_positions: Tensor  # (Tg,)
    label_rows: Tensor  # (Nl,) rows of the und stream that have a label
    labels: Tensor  # (Nl,) long
    label_weights: Tensor  # (Nl,) float32
    target_rows: Tensor  # (Nm,) rows of the gen stream that have a velocity target
    velocity: Tensor  # (Nm, 64)
    samples: tuple[PackedSample, ...]
    next_positions: tuple[int, ...]  # the rotary position that follows each sample

    @property
    def order(self) -> Tensor:
        """Row of [und stream | gen stream] for each token in sequence order, (Tu + Tg,)."""
        num_und = self.und_positions.shape[0]
        rows = []
        for sample in self.samples:
            own = [torch.arange(sample.und.start, sample.und.stop)]
            own.append(torch.arange(sample.gen.start, sample.gen.stop) + num_und)
            rows.append(torch.cat(own)[sample.order])
        return torch.cat(rows)

    def to(self, device: torch.device | str) -> Packed:
        """Return a copy whose tensors are on `device`; a GPU is not waited for."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        gpu = torch.device(device).type == "cuda"
        if gpu:  # copies from page-locked memory wait for nothing
            tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=gpu) for name, tensor in tensors.items()})


@dataclass
class _Streams:
    """What `pack` collects, token by token and segment by segment."""

    image_tokens: tuple[int, int]
    text_ids: list[Tensor] = field(default_factory=list)
    text_rows: list[Tensor] = field(default_factory=list)
    vit: list[ViTImage] = field(default_factory=list)
    vit_rows: list[Tensor] = field(default_factory=list)
    latents: list[LatentImage] = field(default_factory=list)
    und_positions: list[Tensor] = field(default_factory=list)
    gen_positions: list[Tensor] = field(default_factory=list)
    label_rows: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    label_weights: list[Tensor] = field(default_factory=list)
    target_rows: list[Tensor] = field(default_factory=list)
    num_und: int = 0
    num_gen: int = 0
    order: list[tuple[str, int, int]] = field(default_factory=list)  # (stream, start, stop) in sequence order

    def und(self, count: int, positions: Tensor) -> Tensor:
        rows = torch.arange(self.num_und, self.num_und + count)
        self.order.append(("und", self.num_und, self.num_und + count))
        self.und_positions.append(positions)
        self.num_und += count
        return rows

    def image_token(self, which: int, position: int, label: int | None = None) -> None:
        rows = self.und(1, torch.tensor([position]))
        self.text_ids.append(torch.tensor([self.image_tokens[which]]))
        self.text_rows.append(rows)
        if label is not None:
            self.label_rows.append(rows)
            self.labels.append(torch.tensor([label]))
            self.label_weights.append(torch.ones(1))

    def add_text(self, text: Text, position: int) -> None:
        count = text.ids.shape[0]
        rows = self.und(count, torch.arange(position, position + count))
        self.text_ids.append(text.ids)
        self.text_rows.append(rows)
        if text.labels is None:
            return
        kept = text.labels != IGNORE
        weights = torch.ones(count) if text.weights is None else text.weights
        self.label_rows.append(rows[kept])
        self.labels.append(text.labels[kept])
        self.label_weights.append(weights[kept])

    def add_vit(self, image: ViTImage, position: int) -> None:
        count = image.patches.shape[0]
        self.image_token(0, position)
        self.vit.append(image)
        self.vit_rows.append(self.und(count, torch.full((count,), position)))
        self.image_token(1, position, image.end_label)

    def add_latents(self, image: LatentImage, position: int) -> None:
        count = image.latents.shape[0]
        self.image_token(0, position)
        rows = torch.arange(self.num_gen, self.num_gen + count)
        self.order.append(("gen", self.num_gen, self.num_gen + count))
        self.latents.append(image)
        self.gen_positions.append(torch.full((count,), position))
        if image.velocity is not None:
            self.target_rows.append(rows)
        self.num_gen += count
        self.image_token(1, position, image.end_label)

    def add(self, segment: Segment, position: int) -> tuple[Split | None, int]:
        """Append a segment; return its split and the position that follows it."""
        if isinstance(segment, Text):
            self.add_text(segment, position)
            return Split(segment.ids.shape[0], "causal"), position + segment.ids.shape[0]
        if isinstance(segment, ViTImage):
            self.add_vit(segment, position)
            return Split(segment.patches.shape[0] + 2, "full"), position + 1
        if isinstance(segment, LatentImage):
            self.add_latents(segment, position)
            length = segment.latents.shape[0] + 2
            return (Split(length, "noise"), position) if segment.noisy else (Split(length, "full"), position + 1)
        if isinstance(segment, Frames):
            self.add_latents(segment.images[0], position)
            for image, delta in zip(segment.images[1:], segment.deltas, strict=True):
                position += delta
                self.add_latents(image, position)
            length = sum(image.latents.shape[0] + 2 for image in segment.images)
            return Split(length, "full"), position + (not segment.images[-1].noisy)
        return None, position + 1

    def sample_order(self, und_start: int, gen_start: int, num_und: int) -> Tensor:
        rows = [
            torch.arange(start - und_start, stop - und_start)
            if stream == "und"
            else torch.arange(start - gen_start, stop - gen_start) + num_und
            for stream, start, stop in self.order
        ]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)


def pack(
    samples: Sequence[Sequence[Segment]],
    *,
    image_tokens: tuple[int, int],
    starts: Sequence[int] | None = None,
) -> Packed:
    """Pack samples into one `Packed`; tensors stay on the CPU until `Packed.to`.

    Args:
        samples: each a sequence of segments, in order.
        image_tokens: ids of `<|vision_start|>` and `<|vision_end|>`.
        starts: rotary position of each sample's first token; 0 by default.

    Raises:
        ValueError: no samples, a segment whose tensors disagree in length, or pictures that disagree in width.
    """
    if not samples:
        raise ValueError("pack needs at least one sample, got none")
    streams = _Streams(image_tokens)
    packed_samples, next_positions = [], []
    for index, segments in enumerate(samples):
        und_start, gen_start = streams.num_und, streams.num_gen
        position = starts[index] if starts is not None else 0
        streams.order = []
        splits = []
        for segment in segments:
            _check(segment)
            split, position = streams.add(segment, position)
            if split is not None:
                splits.append(split)
        und, gen = slice(und_start, streams.num_und), slice(gen_start, streams.num_gen)
        order = streams.sample_order(und_start, gen_start, und.stop - und.start)
        packed_samples.append(PackedSample(und, gen, tuple(splits), order))
        next_positions.append(position)
    return _finish(streams, tuple(packed_samples), tuple(next_positions))


def _check(segment: Segment) -> None:
    if isinstance(segment, Frames):
        for image in segment.images:
            _check(image)
    elif isinstance(segment, ViTImage | LatentImage):
        rows = segment.patches if isinstance(segment, ViTImage) else segment.latents
        if rows.ndim != 2:
            raise ValueError(f"{type(segment).__name__}: rows must have shape (n, width), got {tuple(rows.shape)}")
        if rows.shape[0] != segment.position_ids.shape[0]:
            raise ValueError(
                f"{type(segment).__name__}: {rows.shape[0]} patches but {segment.position_ids.shape[0]} position ids"
            )
        velocity = segment.velocity if isinstance(segment, LatentImage) else None
        if velocity is not None and velocity.shape != rows.shape:
            raise ValueError(f"LatentImage: latents {tuple(rows.shape)} but velocity {tuple(velocity.shape)}")
    elif isinstance(segment, Text):
        for name in ("labels", "weights"):
            given = getattr(segment, name)
            if given is not None and given.shape != segment.ids.shape:
                raise ValueError(f"Text: {segment.ids.shape[0]} ids but {given.shape[0]} {name}")


def _cat(tensors: list[Tensor], dtype: torch.dtype, *, width: int | None = None) -> Tensor:
    if tensors:
        return torch.cat(tensors)
    return torch.empty((0,) if width is None else (0, width), dtype=dtype)


def patches_of(images: Sequence[ViTImage]) -> list[Tensor]:
    """Return the patches of every picture: all in 8 bits if they are so, else all in [-1, 1]."""
    patches = [image.patches for image in images]
    return patches if len({part.dtype for part in patches}) < 2 else [in_unit(part) for part in patches]


def _pictures(name: str, tensors: list[Tensor]) -> Tensor:
    """Return the rows of all pictures, which must have one width."""
    widths = sorted({tensor.shape[1] for tensor in tensors})
    if len(widths) > 1:
        raise ValueError(f"{name} of one pack must have one width, got {' and '.join(map(str, widths))}")
    return _cat(tensors, torch.float32, width=0)


def _finish(streams: _Streams, samples: tuple[PackedSample, ...], next_positions: tuple[int, ...]) -> Packed:
    long, real = torch.long, torch.float32
    latents = streams.latents
    times = [torch.full((image.latents.shape[0],), image.timestep, dtype=real) for image in latents]
    return Packed(
        text_ids=_cat(streams.text_ids, long),
        text_rows=_cat(streams.text_rows, long),
        vit_patches=_pictures("patches", patches_of(streams.vit)),
        vit_position_ids=_cat([image.position_ids for image in streams.vit], long),
        vit_rows=_cat(streams.vit_rows, long),
        vit_lengths=tuple(image.patches.shape[0] for image in streams.vit),
        latents=_pictures("latents", [image.latents for image in latents]),
        latent_position_ids=_cat([image.position_ids for image in latents], long),
        timesteps=_cat(times, real),
        und_positions=_cat(streams.und_positions, long),
        gen_positions=_cat(streams.gen_positions, long),
        label_rows=_cat(streams.label_rows, long),
        labels=_cat(streams.labels, long),
        label_weights=_cat(streams.label_weights, real),
        target_rows=_cat(streams.target_rows, long),
        velocity=_cat([image.velocity for image in latents if image.velocity is not None], real, width=0),
        samples=samples,
        next_positions=next_positions,
    )
