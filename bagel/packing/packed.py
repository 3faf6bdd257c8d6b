"""The one place that packs segments into a sequence, for inference and for training.

A *sample* is a list of segments. Packing lays the tokens of several samples out as two streams, one for each expert:
all *und* tokens (text, ViT patches, the tokens around every image), then all *gen* tokens (VAE latents). Within a
stream, samples and their segments keep their order, so that an expert's tokens are always one contiguous slice, and
attention finds the tokens of a sample in at most two slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel.image import in_unit
from bagel.packing.layout import LATENT, RULES, TEXT, VIT, Layout, Run, SampleRows, moved
from bagel.packing.segments import IGNORE, LatentImage, Segment, Text, ViTImage

Piece = Text | ViTImage | LatentImage


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
    layout: Layout

    @property
    def samples(self) -> tuple[SampleRows, ...]:
        """Where each sample is."""
        return self.layout.samples

    @property
    def next_positions(self) -> tuple[int, ...]:
        """The rotary position that follows each sample."""
        return self.layout.next_positions

    @property
    def order(self) -> Tensor:
        """Row of [und stream | gen stream] for each token in sequence order, (Tu + Tg,)."""
        return self.layout.tokens.rows

    def to(self, device: torch.device | str) -> Packed:
        """Return a copy whose tensors are on `device`; a GPU is not waited for."""
        if torch.device(device).type == self.text_ids.device.type == self.latents.device.type == "cpu":
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: moved(value, device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, layout=self.layout.to(device), **tensors)


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
        ValueError: no samples, a segment whose tensors disagree in length, or images that disagree in width.
    """
    if not samples:
        raise ValueError("pack needs at least one sample, got none")
    pieces: list[Piece] = []
    runs: list[Run] = []
    table: list[tuple[int, ...]] = []  # of each run: kind, count, rotary position, und tokens, ids
    next_positions: list[int] = []
    for sample, segments in enumerate(samples):
        position = starts[sample] if starts is not None else 0
        split = 0
        for segment in segments:
            found = segment.runs()
            rule = RULES.index(segment.attention)
            for piece, kind, count, offset in found:
                pieces.append(piece)
                runs.append((kind, count, sample, split, rule))
                ids = count if kind == TEXT else 2  # an image has one before and one behind
                table.append((kind, count, position + offset, count + 2 if kind == VIT else ids, ids))
            split += bool(found)
            position += segment.advance
        next_positions.append(position)
    _check(pieces)
    # All runs at once, in arrays: tensor by tensor, many small segments take longer than a training step.
    kind, count, position, und, ids = np.array(table, dtype=np.int64).reshape(-1, 5).T
    latent = kind == LATENT
    return Packed(
        **_und(pieces, kind, position, und, ids, image_tokens),
        **_images(pieces, count[latent], position[latent]),
        layout=Layout(tuple(runs), tuple(next_positions)),
    )


def _check(pieces: list[Piece]) -> None:
    for piece in pieces:
        if isinstance(piece, Text):
            for name, given in (("labels", piece.labels), ("weights", piece.weights)):
                if given is not None and given.shape != piece.ids.shape:
                    raise ValueError(f"Text: {piece.ids.shape[0]} ids but {given.shape[0]} {name}")
            continue
        name = "ViTImage" if isinstance(piece, ViTImage) else "LatentImage"
        rows = piece.patches if isinstance(piece, ViTImage) else piece.latents
        if rows.ndim != 2:
            raise ValueError(f"{name}: rows must have shape (n, width), got {tuple(rows.shape)}")
        if rows.shape[0] != piece.position_ids.shape[0]:
            raise ValueError(f"{name}: {rows.shape[0]} patches but {piece.position_ids.shape[0]} position ids")
        velocity = piece.velocity if isinstance(piece, LatentImage) else None
        if velocity is not None and velocity.shape != rows.shape:
            raise ValueError(f"LatentImage: latents {tuple(rows.shape)} but velocity {tuple(velocity.shape)}")


def _und(
    pieces: list[Piece],
    kind: np.ndarray,
    position: np.ndarray,
    und: np.ndarray,
    ids: np.ndarray,
    image_tokens: tuple[int, int],
) -> dict[str, Any]:
    """Return the rows and positions of the und stream, and the ids and labels of what is no patch in it."""
    text, stop = kind == TEXT, und.cumsum()
    first, rows = stop - und, np.arange(stop[-1] if stop.size else 0)
    # A text takes a position per token, all tokens of an image share one.
    positions = (position - text * first).repeat(und) + text.repeat(und) * rows
    text_rows, vit_rows = rows, rows[:0]
    vit = kind == VIT
    if np.count_nonzero(vit):
        patches = vit.repeat(und)
        patches[first[vit]] = patches[stop[vit] - 1] = False
        text_rows, vit_rows = rows[~patches], rows[patches]
    labelled, labels, weights = _labels(pieces, ids)
    return {
        "text_ids": _ids(pieces, text.repeat(ids), image_tokens),
        "text_rows": torch.from_numpy(text_rows),
        "vit_rows": torch.from_numpy(vit_rows),
        "und_positions": torch.from_numpy(positions),
        "label_rows": torch.from_numpy(text_rows[labelled]),
        "labels": torch.from_numpy(labels),
        "label_weights": torch.from_numpy(weights),
    }


def _ids(pieces: list[Piece], text: np.ndarray, image_tokens: tuple[int, int]) -> Tensor:
    """Return the ids of texts and of the tokens around images; `text` tells which are of a text."""
    ids = [piece.ids for piece in pieces if isinstance(piece, Text)]
    around = np.array(image_tokens * (len(pieces) - len(ids)), dtype=np.int64)
    if not around.size:
        return _cat(ids, torch.long)
    both = np.empty(text.shape, dtype=np.int64)
    both[~text] = around
    if ids:
        both[text] = _cat(ids, torch.long).numpy()
    return torch.from_numpy(both)


def _labels(pieces: list[Piece], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which of the ids have a label, the labels and their weights; `lengths` are the ids of each piece."""
    texts = [piece for piece in pieces if isinstance(piece, Text) and piece.labels is not None]
    ends = [index for index, piece in enumerate(pieces) if piece.end_label is not None]
    if not texts and not ends:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    total = int(lengths.sum())
    labels, weights = np.full(total, IGNORE), np.ones(total, dtype=np.float32)
    if texts:
        own = np.repeat([isinstance(piece, Text) and piece.labels is not None for piece in pieces], lengths)
        labels[own] = torch.cat([text.labels for text in texts if text.labels is not None]).numpy()
        given = [torch.ones(text.length) if text.weights is None else text.weights for text in texts]
        weights[own] = torch.cat(given).numpy()
    labels[lengths.cumsum()[ends] - 1] = [pieces[index].end_label for index in ends]
    (rows,) = (labels != IGNORE).nonzero()
    return rows, labels[rows], weights[rows]


def _images(pieces: list[Piece], count: np.ndarray, position: np.ndarray) -> dict[str, Any]:
    """Return what the ViT sees, all in 8 bits if all images are so, else all in [-1, 1]; and the gen stream.

    `count` and `position` are the tokens and the rotary position of each image of latents.
    """
    seen = [piece for piece in pieces if isinstance(piece, ViTImage)]
    patches = [image.patches for image in seen]
    if len({part.dtype for part in patches}) > 1:
        patches = [in_unit(part) for part in patches]
    images = [piece for piece in pieces if isinstance(piece, LatentImage)]
    times = np.array([image.timestep for image in images], dtype=np.float32)
    targets = [image.velocity for image in images if image.velocity is not None]
    aimed = np.repeat([image.velocity is not None for image in images], count) if targets else count[:0]
    return {
        "vit_patches": _cat(patches, torch.float32, name="patches"),
        "vit_position_ids": _cat([image.position_ids for image in seen], torch.long),
        "vit_lengths": tuple(part.shape[0] for part in patches),
        "latents": _cat([image.latents for image in images], torch.float32, name="latents"),
        "latent_position_ids": _cat([image.position_ids for image in images], torch.long),
        "timesteps": torch.from_numpy(times.repeat(count)),
        "gen_positions": torch.from_numpy(position.repeat(count)),
        "target_rows": torch.from_numpy(aimed.nonzero()[0]),
        "velocity": _cat(targets, torch.float32, name="velocities"),
    }


def _cat(tensors: list[Tensor], dtype: torch.dtype, *, name: str | None = None) -> Tensor:
    """Join tensors (n,), or where they have a name the rows (n, width) of images, which must have one width."""
    if not tensors:
        return torch.empty(0, dtype=dtype) if name is None else torch.empty(0, 0, dtype=dtype)
    if len(tensors) == 1:
        return tensors[0]
    if name is not None and len(widths := {tensor.shape[1] for tensor in tensors}) > 1:
        raise ValueError(f"{name} of one pack must have one width, got {' and '.join(map(str, sorted(widths)))}")
    return torch.cat(tensors)


torch.export.register_dataclass(Packed, serialized_type_name="bagel.packing.Packed")
