"""The autoencoder of FLUX.1: convolutional encoder and decoder around a 16-channel latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bagel.config import VAEConfig
from bagel.kernels import group_norm_silu
from bagel.vae.blocks import DownLevel, Middle, UpLevel, group_norm


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
        self.mid = Middle(widths[-1])
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
        self.mid = Middle(widths[-1])
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
