"""Packed training batches: many samples at once, with what their attention needs.

`collate` gives the tensors that `bagel.packing.pack` gives, in a twentieth of the time: it loops over segments only to
note their sizes, and lays out all tokens at once. Noise and encoded pictures join on the device (`on_device`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bagel.image import in_unit
from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Packed, Segment, Text, ViTImage, patches_of
from bagel.training.samples import PixelImage
from bagel.vae import Autoencoder

TEXT, IMAGE_TOKEN, VIT, LATENT = range(4)


@dataclass(frozen=True)
class Layout:
    """Who sees whom, for each token in sequence order, samples one after the other.

    A token sees those of its sample that are in an earlier split, unless that is noise, and those of its own split,
    up to itself where that is causal.

    Args:
        lengths: tokens of each sample; host integers.
        sample: (T,) int32, number of the sample.
        split: (T,) int32, number of the split within the sample.
        causal: (T,) bool.
        noise: (T,) bool.
        rows: (T,) long, row of the token in [und stream | gen stream].
    """

    lengths: tuple[int, ...]
    sample: Tensor
    split: Tensor
    causal: Tensor
    noise: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Batch:
    """One packed batch: `packed` without `samples`, the layout for its attention, and pictures still to encode.

    Args:
        packed: latents clean, and in the place of the velocities; see `on_device`.
        layout: see `Layout`.
        pixels: pictures to encode (n, 3, H, W), a tensor for each size;
        pixel_rows: (m,) long, the rows of the gen stream where their latent tokens begin, and
        pixel_of: (m,) long, whose they are: a picture that several segments show is encoded once.
    """

    packed: Packed
    layout: Layout
    pixels: tuple[Tensor, ...] = ()
    pixel_rows: tuple[Tensor, ...] = ()
    pixel_of: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of both streams."""
        return self.layout.rows.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy whose tensors are on `device`."""
        return _map(self, lambda tensor: tensor.to(device), Tensor)

    def flat(self) -> FlatBatch:
        """Return the same batch in one piece of memory."""
        slots: list[tuple[_Slot, Tensor]] = []
        end = 0

        def place(tensor: Tensor) -> _Slot:
            nonlocal end
            slots.append((_Slot(tensor.dtype, tensor.shape, end), tensor))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return slots[-1][0]

        skeleton = _map(self, place, Tensor)
        buffer = torch.empty(end, dtype=torch.uint8)
        for slot, tensor in slots:
            slot.of(buffer).copy_(tensor)
        return FlatBatch(buffer, skeleton)


ALIGNMENT = 16
"""Bytes; what vectorised loads on a GPU want."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in a buffer."""

    dtype: torch.dtype
    shape: torch.Size
    start: int

    def of(self, buffer: Tensor) -> Tensor:
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatBatch:
    """A batch in one piece of memory: it crosses from a worker, and to a GPU, in one copy instead of thirty.

    Args:
        buffer: (n,) uint8.
        skeleton: the batch with places in the buffer instead of tensors; their shapes can be asked for.
    """

    buffer: Tensor
    skeleton: Batch

    def pin_memory(self) -> FlatBatch:
        """Return a copy in page-locked memory, from which a GPU copies while it computes."""
        return FlatBatch(self.buffer.pin_memory(), self.skeleton)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch, its tensors views of one piece of memory on `device`."""
        buffer = self.buffer.to(device, non_blocking=True)
        return _map(self.skeleton, lambda slot: slot.of(buffer), _Slot)


def _map(value: Any, move: Callable[[Any], Any], kind: type) -> Any:
    """Apply `move` to everything of a kind in a batch or a part of it."""
    if isinstance(value, kind):
        return move(value)
    if isinstance(value, Batch | Layout | Packed):
        return replace(value, **{f.name: _map(getattr(value, f.name), move, kind) for f in fields(value)})
    if isinstance(value, tuple) and value and isinstance(value[0], kind):
        return tuple(move(entry) for entry in value)
    return value


@dataclass
class _Pieces:
    """Runs of tokens that are alike, in sequence order, and the tensors they hold."""

    image_tokens: tuple[Tensor, Tensor]
    unlabelled: Tensor = field(default_factory=lambda: torch.tensor([IGNORE]))
    one: Tensor = field(default_factory=lambda: torch.ones(1))
    rows: list[tuple[int, ...]] = field(default_factory=list)  # kind, count, position, sample, split, causal, noise
    text_ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    vit: list[ViTImage] = field(default_factory=list)
    latents: list[LatentImage] = field(default_factory=list)
    sample: int = 0
    split: int = 0
    num_gen: int = 0
    pixels: dict[tuple, dict[int, tuple[Tensor, list[int]]]] = field(default_factory=dict)  # by shape and type, by id

    def add(self, segment: Segment, position: int) -> int:
        """Note a segment and return the rotary position that follows it."""
        if isinstance(segment, DroppedImage):
            return position + 1
        if isinstance(segment, Text):
            position = self._text(segment, position)
        elif isinstance(segment, ViTImage):
            self.vit.append(segment)
            self._image(VIT, segment.patches.shape[0], position, segment.end_label, noise=0)
            position += 1
        elif isinstance(segment, LatentImage):
            self._latents(segment, position, noise=int(segment.noisy))
            position += 0 if segment.noisy else 1
        else:
            position = self._frames(segment, position)
        self.split += 1
        return position

    def _text(self, text: Text, position: int) -> int:
        count = text.ids.shape[0]
        self.rows.append((TEXT, count, position, self.sample, self.split, 1, 0))
        self.text_ids.append(text.ids)
        self.labels.append(self.unlabelled.expand(count) if text.labels is None else text.labels)
        self.weights.append(self.one.expand(count) if text.weights is None else text.weights)
        return position + count

    def _image(self, kind: int, count: int, position: int, end_label: int | None, *, noise: int) -> None:
        place = position, self.sample, self.split, 0, noise
        self.rows += [(IMAGE_TOKEN, 1, *place), (kind, count, *place), (IMAGE_TOKEN, 1, *place)]
        self.text_ids += self.image_tokens
        self.labels += [self.unlabelled, self.unlabelled if end_label is None else torch.tensor([end_label])]
        self.weights += [self.one, self.one]

    def _latents(self, image: LatentImage, position: int, *, noise: int) -> None:
        if isinstance(image, PixelImage):
            alike = self.pixels.setdefault((image.pixels.shape, image.pixels.dtype), {})
            _, rows = alike.setdefault(id(image.pixels), (image.pixels, []))
            rows.append(self.num_gen)
        self.latents.append(image)
        count = image.latents.shape[0]
        self.num_gen += count
        self._image(LATENT, count, position, image.end_label, noise=noise)

    def _frames(self, frames: Frames, position: int) -> int:
        for image, delta in zip(frames.images, (0, *frames.deltas), strict=True):
            position += delta
            self._latents(image, position, noise=0)
        return position + (not frames.images[-1].noisy)


def collate(samples: Sequence[Sequence[Segment]], *, image_tokens: tuple[int, int]) -> Batch:
    """Pack samples into one batch on the CPU.

    Args:
        samples: each a sequence of segments, in order, from `bagel.training.samples.build`.
        image_tokens: ids of `<|vision_start|>` and `<|vision_end|>`.

    Raises:
        ValueError: no tokens at all.
    """
    pieces = _Pieces((torch.tensor([image_tokens[0]]), torch.tensor([image_tokens[1]])))
    next_positions = []
    for segments in samples:
        position = pieces.split = 0
        for segment in segments:
            position = pieces.add(segment, position)
        next_positions.append(position)
        pieces.sample += 1
    if not pieces.rows:
        raise ValueError("a batch needs at least one token, got none")
    kind, count, start, sample, split, causal, noise = torch.tensor(pieces.rows).unbind(1)
    offset = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    kinds = kind.repeat_interleave(count)
    position = start.repeat_interleave(count) + offset * (kinds == TEXT)
    und = kinds != LATENT
    num_und = int(und.sum())
    layout = Layout(
        lengths=tuple(torch.zeros(len(samples), dtype=torch.long).index_add_(0, sample, count).tolist()),
        sample=sample.repeat_interleave(count).int(),
        split=split.repeat_interleave(count).int(),
        causal=causal.repeat_interleave(count).bool(),
        noise=noise.repeat_interleave(count).bool(),
        rows=torch.where(und, und.cumsum(0) - 1, num_und + (~und).cumsum(0) - 1),
    )
    packed = _packed(pieces, kinds[und], position[und], position[~und], tuple(next_positions))
    groups = [list(alike.values()) for alike in pieces.pixels.values()]
    return Batch(
        packed,
        layout,
        pixels=tuple(torch.stack([pixels for pixels, _ in group]) for group in groups),
        pixel_rows=tuple(torch.tensor([row for _, rows in group for row in rows]) for group in groups),
        pixel_of=tuple(torch.tensor([i for i, (_, rows) in enumerate(group) for _ in rows]) for group in groups),
    )


def _packed(
    pieces: _Pieces, kinds: Tensor, und_positions: Tensor, gen_positions: Tensor, next_positions: tuple[int, ...]
) -> Packed:
    text_rows = (kinds != VIT).nonzero().flatten()
    labels, weights = torch.cat(pieces.labels or [torch.empty(0)]), torch.cat(pieces.weights or [torch.empty(0)])
    labelled = labels != IGNORE
    latents = pieces.latents
    sizes = torch.tensor([image.latents.shape[0] for image in latents], dtype=torch.long)
    times = torch.tensor([image.timestep for image in latents], dtype=torch.float32).repeat_interleave(sizes)
    aimed = torch.tensor([image.velocity is not None for image in latents], dtype=torch.bool).repeat_interleave(sizes)
    return Packed(
        text_ids=_cat(pieces.text_ids, torch.long),
        text_rows=text_rows,
        vit_patches=_cat(patches_of(pieces.vit), torch.float32, width=0),
        vit_position_ids=_cat([image.position_ids for image in pieces.vit], torch.long),
        vit_rows=(kinds == VIT).nonzero().flatten(),
        vit_lengths=tuple(image.patches.shape[0] for image in pieces.vit),
        latents=_cat([image.latents for image in latents], torch.float32, width=0),
        latent_position_ids=_cat([image.position_ids for image in latents], torch.long),
        timesteps=times,
        und_positions=und_positions,
        gen_positions=gen_positions,
        label_rows=text_rows[labelled],
        labels=labels[labelled],
        label_weights=weights[labelled],
        target_rows=aimed.nonzero().flatten(),
        velocity=_cat([image.velocity for image in latents if image.velocity is not None], torch.float32, width=0),
        samples=(),
        next_positions=next_positions,
    )


def _cat(tensors: list[Tensor], dtype: torch.dtype, *, width: int | None = None) -> Tensor:
    return torch.cat(tensors) if tensors else torch.empty((0,) if width is None else (0, width), dtype=dtype)


def noised(packed: Packed, noise: Tensor) -> Packed:
    """Mix noise into clean latents: x_t = (1 - t) z + t noise, with the velocities noise - z at the targets.

    Args:
        packed: with clean latents.
        noise: standard normal, of the latents' shape.
    """
    t, clean = packed.timesteps[:, None], packed.latents.float()
    rows = packed.target_rows
    return replace(packed, latents=(1 - t) * clean + t * noise, velocity=(noise - clean).index_select(0, rows))


def on_device(batch: Batch, *, vae: Autoencoder | None, patch: int, generator: torch.Generator) -> Packed:
    """Finish a batch that is on the device: encode its pictures, sampled from the posterior, and mix in the noise.

    Args:
        batch: on the device of `vae` and `generator`.
        vae: the autoencoder; only needed where pictures came as pixels.
        patch: side of a latent token (`latent_patch_size`).
        generator: gives the posterior's noise of all pictures, then the flow's.
    """
    packed = replace(batch.packed, vit_patches=in_unit(batch.packed.vit_patches))
    if batch.pixels:
        if vae is None:
            raise ValueError("this batch holds pictures as pixels: give the trainer the autoencoder, or encode before")
        packed = replace(packed, latents=_encoded(batch, vae, patch, generator))
    shape, device = packed.latents.shape, packed.latents.device
    return noised(packed, torch.randn(shape, generator=generator, device=device))


def padding(count: int) -> int:
    """Return how many pictures to add, an eighth at most, so that few different numbers come: cuDNN plans for each."""
    return -count % (1 << max(0, count.bit_length() - 4))


@torch.no_grad()
def _encoded(batch: Batch, vae: Autoencoder, patch: int, generator: torch.Generator) -> Tensor:
    latents = batch.packed.latents.float()
    for pixels, starts, whose in zip(batch.pixels, batch.pixel_rows, batch.pixel_of, strict=True):
        (count, _, height, width), down = pixels.shape, vae.config.downsample
        shape = (count, vae.config.z_channels, height // down, width // down)
        noise = torch.randn(shape, generator=generator, device=pixels.device)
        pixels = in_unit(pixels)
        if pixels.is_cuda and (extra := padding(count)):
            pixels, noise = (F.pad(x, (*[0] * 7, extra)) for x in (pixels, noise))
        z = vae.encode(pixels, noise)[:count].float()
        tokens = rearrange(z, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        rows = starts[:, None] + torch.arange(tokens.shape[1], device=starts.device)
        latents = latents.index_copy(0, rows.flatten(), tokens[whose].flatten(0, 1))
    return latents
