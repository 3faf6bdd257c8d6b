"""SigLIP's vision transformer (arXiv 2303.15343) over packed images of any size (arXiv 2307.06304)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bagel.config import ViTConfig
from bagel.embedding import Embedding

THETA = 10000.0
"""Base of the frequencies of the 2-D rotary embedding."""


class SiglipViT(nn.Module):
    """Encode packed patches into features; images may have any sizes and never see each other.

    `attention` gathers values, a function of q, k and v (B, n, heads, head_dim) and the number of the layer; any
    attention of the decoder may stand there too.

    The layers that released weights hold (`config.num_layers`), then the final LayerNorm; no pooling head. Positions
    are a learned table (`position_embedding`) or, with `config.rope`, a 2-D rotary embedding without parameters.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.attention: Any = attend
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        if not config.rope:
            self.position_embedding = Embedding(config.num_patches_per_side**2, config.hidden_size)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the features of every patch, (N, hidden_size) in the weights' type.

        patches: (N, patch_dim), pixels in [-1, 1], each patch flattened as (row, column, channel); cast to the
            weights' type.
        position_ids: (N,) integers, `row * num_patches_per_side + column`, in [0, num_patches_per_side**2).
        lengths: patches of each image, in order; host integers, so that no device has to be waited for.

        Raises ValueError if these shapes contradict each other.
        """
        self._check(patches, position_ids, lengths)
        config = self.config
        x = self.patch_embedding(patches.to(next(self.parameters()).dtype))  # (N, hidden)
        rotary = None
        if config.rope:
            rotary = rotary_table(position_ids, side=config.num_patches_per_side, head_dim=config.head_dim)
        else:
            x = x + self.position_embedding(position_ids)
        x = x.float() if x.dtype == torch.float16 else x  # too narrow for the sums of all layers
        for index, layer in enumerate(self.layers):
            x = layer(x, lengths, rotary, functools.partial(self.attention, layer=index))
        return self.norm(x)

    def _check(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> None:
        if patches.ndim != 2 or patches.shape[1] != self.config.patch_dim:
            raise ValueError(
                f"patches must have shape (N, {self.config.patch_dim}), got {tuple(patches.shape)}; "
                f"flatten {self.config.patch_size}x{self.config.patch_size} pixel patches as (row, column, channel)"
            )
        count = patches.shape[0]
        if position_ids.shape != (count,):
            raise ValueError(f"position_ids must have shape ({count},), one a patch, got {tuple(position_ids.shape)}")
        if not lengths or min(lengths) < 1 or sum(lengths) != count:
            raise ValueError(
                f"lengths must be at least 1 each and sum to the {count} patches given, "
                f"got {list(lengths)} with sum {sum(lengths)}"
            )


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, but with float16 weights it takes inputs of a wider type too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., n); float16 weights do so in the input's type, and return their own."""
        if self.weight.dtype != torch.float16:
            return super().forward(input)
        weight, bias = (part.to(input.dtype) for part in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class SiglipLayer(nn.Module):
    """One pre-norm transformer layer: attention within each image, then the MLP."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = LayerNorm(hidden, eps=config.layer_norm_eps)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden)  # rows: q, then k, then v
        self.o_proj = nn.Linear(hidden, hidden)
        self.norm2 = LayerNorm(hidden, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        rotary: tuple[Tensor, Tensor] | None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the layer's output, (N, hidden); `rotary` is a table of `rotary_table`, or None."""
        qkv = self.qkv_proj(self.norm1(x))
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = x + self.o_proj(attend_within(attend, q, k, v, lengths))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def attend(q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> Tensor:
    """Attend from all of q to all of k and v, each (B, n, heads, head_dim), with torch's fused attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, n, head_dim)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_within(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Attend fully inside each image and not between images.

    q, k, v: (N, heads, head_dim), the images one after the other. Returns (N, heads * head_dim).
    """
    if len(set(lengths)) == 1:  # images of one length are a batch
        images = [x.unflatten(0, (len(lengths), -1)) for x in (q, k, v)]
        return attend(*images).flatten(-2).flatten(0, 1)
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x[None] for x in part))[0].flatten(-2) for part in parts])


def rotary_table(position_ids: Tensor, *, side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that `rotate` takes, computed in float32.

    The first half of a head turns with the patch's row (`id // side`), the second with its column (`id % side`), each
    with head_dim/4 frequencies THETA^(-4i/head_dim), i = 0, 1, ...

    position_ids: (N,) integers, `row * side + column`.
    Returns cos and sin, each (N, 1, 2, head_dim/4) in float32: patch, head (broadcast), row or column, frequency.
    """
    exponents = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=position_ids.device)
    coordinates = torch.stack([position_ids // side, position_ids % side], dim=-1)  # (N, 2)
    angles = coordinates[:, None, :, None] * THETA**-exponents  # (N, 1, 2, head_dim/4)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their patch's row and column; computed in float32, rounded to x's type once.

    x: (N, heads, head_dim); channel i of a half-head is paired with channel i + head_dim/4.
    table: cos and sin of `rotary_table`.
    """
    cos, sin = table
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (N, heads, 2, head_dim/4) each
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return turned.flatten(-3).to(x.dtype)
