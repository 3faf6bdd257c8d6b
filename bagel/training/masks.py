"""Attention over a whole packed batch at once: padded dense masks, or one block mask for flex attention.

Both are objects that a model takes as its `attention`, and follow the one rule of `bagel.packing.sees`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bagel.modeling.attention import SDPA, Attend, Heads, Seen
from bagel.modeling.cache import Claim
from bagel.packing import Layout, Tokens, mask_of, sees

Kind = Literal["dense", "flex"]
STEP = 16
"""Dense lengths are multiples of this: what the fused kernels like."""
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for training on GPUs, where every batch has new shapes: cuDNN's plans for each take tens of milliseconds."""
BLOCK = 128
"""Side of a flex block."""


@dataclass(frozen=True)
class DenseAttention(SDPA):
    """Every sample padded to the longest of its bucket, with a dense mask: best for many short samples.

    What runs on top of contexts is left to `SDPA`.

    Args:
        dtype: type of queries, keys and values.
    """

    dtype: torch.dtype = torch.float32

    def plan(
        self, layout: Layout, claims: Sequence[Claim | None] | None = None, *, only_keys_from: int | None = None
    ) -> Attend:
        """Plan a forward of a batch whose layout is on the device; see `bagel.modeling.Attention`."""
        if claims is not None or only_keys_from is not None:
            return super().plan(layout, claims, only_keys_from=only_keys_from)
        return DensePlan(layout, dtype=self.dtype)


@dataclass(frozen=True)
class FlexAttention(SDPA):
    """One block-sparse mask over the whole batch, in the order [und stream | gen stream]: best for long samples.

    What runs on top of contexts is left to `SDPA`.

    Args:
        compiled: compile the kernel, as a GPU needs; a CPU runs it as it is, without gradients, for tests.
    """

    compiled: bool = True

    def plan(
        self, layout: Layout, claims: Sequence[Claim | None] | None = None, *, only_keys_from: int | None = None
    ) -> Attend:
        """Plan a forward of a batch whose layout is on the device; see `bagel.modeling.Attention`."""
        if claims is not None or only_keys_from is not None:
            return super().plan(layout, claims, only_keys_from=only_keys_from)
        return FlexPlan(layout, compiled=self.compiled)


def attention_of(kind: Kind, *, device: torch.device, dtype: torch.dtype) -> DenseAttention | FlexAttention:
    """Return the attention to train with.

    Args:
        kind: "dense" or "flex".
        device: where it will run.
        dtype: type of queries, keys and values.

    Raises:
        ValueError: another kind.
    """
    if kind == "dense":
        return DenseAttention(dtype)
    if kind == "flex":
        return FlexAttention(compiled=device.type == "cuda")
    raise ValueError(f"attention must be 'dense' or 'flex', got {kind!r}")


class DensePlan:
    """The dense attention of one batch.

    Samples are sorted into buckets of lengths up to STEP, 2 STEP, 4 STEP, ..., each one batch. No token is summed into
    another by more than one writer, so results repeat bit for bit.

    Args:
        layout: on the device.
        dtype: type of queries, keys and values.
    """

    def __init__(self, layout: Layout, *, dtype: torch.dtype) -> None:
        self.buckets: list[tuple[int, int]] = []
        lengths = layout.lengths
        sizes = [STEP << max(0, -(-length // STEP) - 1).bit_length() for length in lengths]
        starts, total = [0] * len(sizes), 0
        for size in sorted(set(sizes)):
            own = [index for index, other in enumerate(sizes) if other == size]
            width = -(-max(lengths[index] for index in own) // STEP) * STEP
            for place, index in enumerate(own):
                starts[index] = total + place * width
            self.buckets.append((len(own), width))
            total += len(own) * width
        self.total = total
        slots = _slots(layout, starts)
        self.masks = self._masks(layout.tokens, slots, dtype)
        self.places = torch.empty_like(slots).index_copy(0, layout.tokens.rows, slots)  # of every row of [und | gen]

    def _masks(self, tokens: Tokens, slots: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Additive masks (B, 1, L, L) of the buckets: made once here, not once per layer."""
        # Padding is a sample of its own: none sees it from outside, and it sees itself lest a softmax be empty.
        padded = Tokens(*(values.new_full((self.total,), -1).index_copy(0, slots, values) for values in tokens))
        masks, start = [], 0
        for count, width in self.buckets:
            here = slice(start, start + count * width)
            mask = torch.zeros((count, 1, width, width), dtype=dtype, device=slots.device)
            seen = mask_of(Tokens(*(values[here].view(count, width) for values in padded)))
            masks.append(mask.masked_fill_(~seen[:, None], float("-inf")))
            start += count * width
        return masks

    def __call__(self, layer: int, und: Heads, gen: Heads) -> Seen:
        """Return what the und tokens (Tu, Hq, D) and the gen tokens (Tg, Hq, D) gather."""
        heads, kv_heads = und[0].shape[1], und[1].shape[1]
        joined = torch.cat([torch.cat(und, dim=1), torch.cat(gen, dim=1)])  # (T, Hq + 2 Hkv, D)
        padded = joined.new_zeros((self.total, *joined.shape[1:])).index_copy(0, self.places, joined)
        outs = []
        # Split, not sliced: the gradients of slices would each be padded with zeros to the whole.
        parts = padded.split([count * width for count, width in self.buckets])
        attend = _fused if joined.is_cuda else _grouped
        for part, (count, width), mask in zip(parts, self.buckets, self.masks, strict=True):
            part = part.unflatten(0, (count, width)).transpose(1, 2)
            q, k, v = part.split([heads, kv_heads, kv_heads], dim=1)  # (B, H, L, D)
            outs.append(attend(q, k, v, mask).transpose(1, 2).flatten(0, 1))
        seen = torch.cat(outs).index_select(0, self.places)
        return Seen(*seen.split([und[0].shape[0], gen[0].shape[0]]))


def _slots(layout: Layout, starts: list[int]) -> Tensor:
    """Return the place of every token, in sequence order, in the padded buckets laid end to end."""
    lengths = torch.tensor(layout.lengths)
    offset = torch.tensor(starts) - (lengths.cumsum(0) - lengths)
    sample = layout.tokens.sample
    if sample.is_cuda:  # from page-locked memory, so that the copy does not wait for the GPU
        offset = offset.pin_memory()
    offset = offset.to(sample.device, non_blocking=sample.is_cuda)
    return torch.arange(sample.shape[0], device=sample.device) + offset[sample.long()]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend with torch's fused kernel; q (B, Hq, L, D), k and v (B, Hkv, L, D), additive mask (B, 1, L, L)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernel that takes masks wants as many keys as queries
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    with sdpa_kernel(KERNELS):  # here too: a layer that is computed again for its gradient knows no context around it
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend by matrix products, the queries of a key head as one matrix: faster on a CPU with masks.

    In bfloat16 the scores are rounded too: relative error 4.5e-3, where a fused kernel has 1.6e-3.
    """
    kv_heads, length = k.shape[1], k.shape[2]
    groups = q.shape[1] // kv_heads
    q = (q * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, groups)).flatten(2, 3)  # (B, Hkv, G L, D)
    scores = (q @ k.transpose(-1, -2)).unflatten(2, (groups, length)) + mask[:, :, None]  # (B, Hkv, G, L, L)
    seen = scores.softmax(-1).flatten(2, 3) @ v
    return seen.unflatten(2, (groups, length)).flatten(1, 2)


class FlexPlan:
    """The flex attention of one batch.

    Args:
        layout: on the device.
        compiled: compile the kernel.
    """

    def __init__(self, layout: Layout, *, compiled: bool) -> None:
        count = layout.tokens.rows.shape[0]
        self.padding = -count % BLOCK
        # Padding is a sample of its own.
        tokens = Tokens(*(F.pad(values, (0, self.padding), value=-1) for values in layout.tokens.by_row()))

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(tokens.at(q), tokens.at(k))

        length = count + self.padding
        make: Callable[..., Any] = _compiled(create_block_mask) if compiled else create_block_mask
        self.mask = make(visible, None, None, length, length, device=tokens.rows.device, BLOCK_SIZE=BLOCK)
        self.kernel: Callable[..., Any] = _compiled(flex_attention) if compiled else flex_attention

    def __call__(self, layer: int, und: Heads, gen: Heads) -> Seen:
        """Return what the und tokens (Tu, Hq, D) and the gen tokens (Tg, Hq, D) gather."""
        q, k, v = (
            F.pad(torch.cat([a, b]), (0, 0, 0, 0, 0, self.padding)).transpose(0, 1)[None]  # (1, H, T, D)
            for a, b in zip(und, gen, strict=True)
        )
        out = self.kernel(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        out = out[0].transpose(0, 1)
        und_seen, gen_seen, _ = out.split([und[0].shape[0], gen[0].shape[0], self.padding])
        return Seen(und_seen, gen_seen)


_KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once in a process, for lengths that change from batch to batch."""
    if function not in _KERNELS:
        _KERNELS[function] = torch.compile(function, dynamic=True)
    return _KERNELS[function]
