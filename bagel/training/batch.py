"""Packed training batches: many samples at once, in one piece of memory, finished on the device.

Noise and encoded images join on the device (`on_device`): there they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bagel.image import in_unit
from bagel.packing import LATENT, Packed, Segment, pack
from bagel.training.samples import PixelImage
from bagel.vae import Autoencoder


@dataclass(frozen=True)
class Batch:
    """One packed batch, with the tokens of its layout computed, and the images still to encode.

    Args:
        packed: latents clean, and in the place of the velocities; see `on_device`.
        pixels: images to encode (n, 3, H, W), a tensor for each size;
        pixel_rows: (m,) long, the rows of the gen stream where their latent tokens begin, and
        pixel_of: (m,) long, whose they are: an image that several segments show is encoded once.
    """

    packed: Packed
    pixels: tuple[Tensor, ...] = ()
    pixel_rows: tuple[Tensor, ...] = ()
    pixel_of: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of both streams."""
        return self.packed.und_positions.shape[0] + self.packed.gen_positions.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy whose tensors are on `device`."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), self)

    def flat(self) -> FlatBatch:
        """Return the same batch in one piece of memory."""
        slots: list[tuple[_Slot, Tensor]] = []
        end = 0

        def place(tensor: Tensor) -> _Slot:
            nonlocal end
            slots.append((_Slot(tensor.dtype, tensor.shape, end), tensor))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return slots[-1][0]

        skeleton = tree_map_only(Tensor, place, self)
        buffer = torch.empty(end, dtype=torch.uint8)
        for slot, tensor in slots:
            slot.of(buffer).copy_(tensor)
        return FlatBatch(buffer, skeleton)


torch.export.register_dataclass(Batch, serialized_type_name="bagel.training.Batch")  # a tree of tensors

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
        return tree_map_only(_Slot, lambda slot: slot.of(buffer), self.skeleton)


def collate(samples: Sequence[Sequence[Segment]], *, image_tokens: tuple[int, int]) -> Batch:
    """Pack samples into one batch on the CPU.

    Args:
        samples: each a sequence of segments, in order, from `bagel.training.samples.build`.
        image_tokens: ids of `<|vision_start|>` and `<|vision_end|>`.

    Raises:
        ValueError: no tokens at all; otherwise as `bagel.packing.pack`.
    """
    packed = pack(samples, image_tokens=image_tokens)
    if not packed.layout.tokens.rows.shape[0]:
        raise ValueError("a batch needs at least one token, got none")
    alike: dict[tuple, dict[int, tuple[Tensor, list[int]]]] = {}  # by shape and type, then by identity
    row = 0
    for segments in samples:
        for segment in segments:
            for piece, kind, count, _ in segment.runs():
                if isinstance(piece, PixelImage):
                    group = alike.setdefault((piece.pixels.shape, piece.pixels.dtype), {})
                    group.setdefault(id(piece.pixels), (piece.pixels, []))[1].append(row)
                row += count if kind == LATENT else 0
    groups = [list(group.values()) for group in alike.values()]
    return Batch(
        packed,
        pixels=tuple(torch.stack([pixels for pixels, _ in group]) for group in groups),
        pixel_rows=tuple(torch.tensor([row for _, rows in group for row in rows]) for group in groups),
        pixel_of=tuple(torch.tensor([i for i, (_, rows) in enumerate(group) for _ in rows]) for group in groups),
    )


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
    """Finish a batch that is on the device: encode its images, sampled from the posterior, and mix in the noise.

    Args:
        batch: on the device of `vae` and `generator`.
        vae: the autoencoder; only needed where images came as pixels.
        patch: side of a latent token (`latent_patch_size`).
        generator: gives the posterior's noise of all images, then the flow's.
    """
    packed = replace(batch.packed, vit_patches=in_unit(batch.packed.vit_patches))
    if batch.pixels:
        if vae is None:
            raise ValueError("this batch holds images as pixels: give the trainer the autoencoder, or encode before")
        packed = replace(packed, latents=_encoded(batch, vae, patch, generator))
    shape, device = packed.latents.shape, packed.latents.device
    return noised(packed, torch.randn(shape, generator=generator, device=device))


def padding(count: int) -> int:
    """Return how many images to add, an eighth at most, so that few different numbers come: cuDNN plans for each."""
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
