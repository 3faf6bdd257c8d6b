"""SigLIP's vision transformer (arXiv 2303.15343) over packed pictures: patches of all of them in one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bagel.config import ViTConfig
from bagel.embedding import Embedding
from bagel.vit.rope import rotary_table, rotate


class SiglipViT(nn.Module):
    """Encode packed patches into features; pictures may have any sizes and never see each other.

    The layers that released weights hold (`config.num_layers`), then the final LayerNorm; no pooling head. Positions
    are a learned table (`position_embedding`) or, with `config.rope`, a 2-D rotary embedding without parameters.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        if not config.rope:
            self.position_embedding = Embedding(config.num_patches_per_side**2, config.hidden_size)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the features of every patch, (N, hidden_size) in the weights' type.

        patches: (N, patch_dim), pixels in [-1, 1], each patch flattened as (row, column, channel); cast to the
            weights' type.
        position_ids: (N,) integers, `row * num_patches_per_side + column`, in [0, num_patches_per_side**2).
        lengths: patches of each picture, in order; host integers, so that no device has to be waited for.

        Raises ValueError if these shapes contradict each other.
        """
        self._check(patches, position_ids, lengths)
        config = self.config
        x = self.patch_embedding(patches.to(self.norm.weight.dtype))  # (N, hidden)
        rotary = None
        if config.rope:
            rotary = rotary_table(position_ids, side=config.num_patches_per_side, head_dim=config.head_dim)
        else:
            x = x + self.position_embedding(position_ids)
        for layer in self.layers:
            x = layer(x, lengths, rotary)
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


class SiglipLayer(nn.Module):
    """One pre-norm transformer layer: attention within each picture, then the MLP."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden)  # rows: q, then k, then v
        self.o_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)

    def forward(self, x: Tensor, lengths: Sequence[int], rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the layer's output, (N, hidden); `rotary` is a table of `rotary_table`, or None."""
        qkv = self.qkv_proj(self.norm1(x))
        q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, heads=self.num_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = x + self.o_proj(attend_within(q, k, v, lengths))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def attend_within(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend fully inside each picture and not between pictures.

    q, k, v: (N, heads, head_dim), the pictures one after the other. Returns (N, heads * head_dim).
    """
    if len(set(lengths)) == 1:
        return attend_equal(q, k, v, pictures=len(lengths))
    parts = zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True)
    return torch.cat([attend_equal(*part, pictures=1) for part in parts])


def attend_equal(q: Tensor, k: Tensor, v: Tensor, *, pictures: int) -> Tensor:
    """Attend inside each of several pictures of one length, in one call; shapes as in `attend_within`."""
    q, k, v = (rearrange(t, "(pictures n) heads d -> pictures heads n d", pictures=pictures) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "pictures heads n d -> (pictures n) (heads d)")
