"""Building blocks of the autoencoder; attribute names are the keys of `ae.safetensors`.

With torch's operations every block keeps the memory format it is given, so that channels-last weights and inputs stay
so; kernels return channels-last images.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bagel.kernels import add_biased, convolve, doubled, group_norm_silu


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the normalisation used everywhere: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, silu, 3x3, twice, added to the input; (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h, bias = convolve(self.conv1, group_norm_silu(self.norm1, x))
        h, bias = convolve(self.conv2, group_norm_silu(self.norm2, h, plus=bias))
        return add_biased(self.nin_shortcut(x), h, bias)


class AttentionBlock(nn.Module):
    """Single-head attention over all pixels, added to the input; (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.norm(x)
        # The fused kernels need the channels of a token side by side; without, the H*W x H*W scores are stored. A copy
        # is made only of channels-first tensors.
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c").contiguous() for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    """What both halves do at the smallest size: residual block, attention, residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of the input's shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve both sides: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller image; padded on the right and at the bottom only, as the weights were trained."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger image: each pixel four times, then a convolution."""
        return self.conv(doubled(x))


class DownLevel(nn.Module):
    """Residual blocks at one size of the encoder, then (`resize`) half the sides."""

    def __init__(self, in_channels: int, out_channels: int, *, blocks: int, resize: bool):
        super().__init__()
        self.block = residual_blocks(in_channels, out_channels, blocks)
        self.downsample = Downsample(out_channels) if resize else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output."""
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks at one size of the decoder, then (`resize`) twice the sides."""

    def __init__(self, in_channels: int, out_channels: int, *, blocks: int, resize: bool):
        super().__init__()
        self.block = residual_blocks(in_channels, out_channels, blocks)
        self.upsample = Upsample(out_channels) if resize else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


def residual_blocks(in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
    """Return `count` residual blocks, the first of which changes the channels."""
    first = ResidualBlock(in_channels, out_channels)
    return nn.ModuleList([first, *(ResidualBlock(out_channels, out_channels) for _ in range(count - 1))])
