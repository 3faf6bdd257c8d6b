"""The autoencoder of FLUX.1: convolutional encoder and decoder around a latent of 16 channels, 8 times smaller.

Attribute names are the keys of `ae.safetensors`. With torch's operations every block keeps the memory format it is
given, so that channels-last weights and inputs stay so; kernels return channels-last images.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bagel.config import VAEConfig
from bagel.kernels import add_biased, convolve, doubled, group_norm_silu


class Autoencoder(nn.Module):
    """Turn images into scaled latents and back; the latents' scale and shift live in here and nowhere else.

    Letters in shapes: B images, Z = `config.z_channels` (16), h = H/8 and w = W/8 (`config.downsample`).
    Pixels are in [-1, 1], channels first.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior, before scale and shift, each (B, Z, h, w).

        pixels: (B, 3, H, W), sides multiples of `config.downsample`; cast to the weights' type, which is the result's.

        Raises ValueError for any other shape.
        """
        channels, stride = self.config.in_channels, self.config.downsample
        if pixels.ndim != 4 or pixels.shape[1] != channels or pixels.shape[2] % stride or pixels.shape[3] % stride:
            raise ValueError(
                f"pixels must have shape (B, {channels}, H, W) with H and W multiples of {stride}, "
                f"got {tuple(pixels.shape)}; resize the image first"
            )
        mean, logvar = self.encoder(pixels.to(next(self.encoder.parameters()).dtype)).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Return latents as the model sees them, `scale * (z - shift)`, (B, Z, h, w) in at least float32.

        pixels: as for `moments`.
        noise: standard normal, (B, Z, h, w), to sample the posterior, z = mean + exp(logvar/2) * noise; None takes
            its mean.

        Raises ValueError if pixels or noise have another shape.
        """
        mean, logvar = self.moments(pixels)
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean, logvar = mean.to(wide), logvar.to(wide)
        if noise is not None and noise.shape != mean.shape:
            raise ValueError(
                f"noise must have the latents' shape {tuple(mean.shape)}, got {tuple(noise.shape)}; "
                f"draw it in that shape, or give None for the posterior's mean"
            )
        z = mean if noise is None else mean + torch.exp(logvar / 2) * noise.to(mean)
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, (B, 3, H, W) in the weights' type, about [-1, 1] but not clamped.

        latents: (B, Z, h, w), as `encode` returns them.

        Raises ValueError for any other shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.z_channels:
            raise ValueError(f"latents must have shape (B, {self.config.z_channels}, h, w), got {tuple(latents.shape)}")
        wide = torch.promote_types(latents.dtype, torch.float32)
        z = latents.to(wide) / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z.to(next(self.decoder.parameters()).dtype))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to mean and log-variance side by side, (B, 2Z, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(in_width, width, blocks=config.num_res_blocks, resize=level < last)
            for level, (in_width, width) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return both moments."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(group_norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Unscaled latents (B, Z, h, w) to pixels (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        # Levels are numbered as in the encoder, from the largest size: the last runs first, number 0 keeps the size.
        self.up = nn.ModuleList(
            UpLevel(in_width, width, blocks=config.num_res_blocks + 1, resize=level > 0)
            for level, (in_width, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(group_norm_silu(self.norm_out, x))


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


def middle(channels: int) -> nn.Sequential:
    """Return what both halves do at the smallest size: residual block, attention, residual block."""
    blocks = ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)
    return nn.Sequential(OrderedDict(zip(("block_1", "attn_1", "block_2"), blocks, strict=True)))


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
