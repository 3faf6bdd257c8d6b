"""Training of the autoencoder: reconstruction, its gradients, and the posterior's distance from a normal.

No other network judges the images: what a perceptual term would add at edges comes from comparing the differences
between neighbouring pixels.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bagel.config import VAEConfig
from bagel.image import in_unit
from bagel.training import state
from bagel.training.config import TrainConfig
from bagel.training.logs import Log
from bagel.training.optimiser import Optimiser
from bagel.vae import Autoencoder

Images = Callable[[random.Random], Tensor]
"""Makes one image (3, H, W), uint8 in [0, 255], or float in [-1, 1]; those of a batch have one size."""


@dataclass(frozen=True)
class VAELossWeights:
    """Weights of the terms: absolute and squared error, error of the image's gradients, divergence."""

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0
    kl: float = 1e-6


def vae_losses(vae: Autoencoder, pixels: Tensor, noise: Tensor, extra: Tensor | None = None) -> dict[str, Tensor]:
    """Return the terms of the loss of images, each a mean.

    Args:
        vae: differentiable.
        pixels: (B, 3, H, W) in [-1, 1].
        noise: standard normal, of the latents' shape.
        extra: added to the latents that are decoded, in the unit of `Autoencoder.encode`.

    Returns:
        "l1", "l2" and "gradient" a pixel and channel; "kl" a latent and channel, against the standard normal
        (arXiv 1312.6114).
    """
    mean, logvar = (moment.float() for moment in vae.moments(pixels))
    z = mean + (logvar / 2).exp() * noise
    if extra is not None:
        z = z + extra / vae.config.scale_factor
    found = vae.decoder(z.to(vae.decoder.conv_in.weight.dtype)).float()
    error = found - pixels.float()
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "gradient": across + down, "kl": kl}


@torch.no_grad()
def latent_statistics(vae: Autoencoder, batches: Iterable[Tensor], generator: torch.Generator) -> VAEConfig:
    """Return the configuration with the scale and shift that give these images' latents mean zero and deviation one.

    Args:
        vae: trained; its own scale and shift play no part.
        batches: of images (B, 3, H, W) in [-1, 1].
        generator: of the posterior's noise, on the images' device.
    """
    total, squares, count = 0.0, 0.0, 0
    for pixels in batches:
        mean, logvar = (moment.double() for moment in vae.moments(pixels))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + (logvar / 2).exp() * noise
        total, squares, count = total + z.sum().item(), squares + z.square().sum().item(), count + z.numel()
    shift = total / count
    deviation = (squares / count - shift**2) ** 0.5
    return dataclasses.replace(vae.config, scale_factor=1 / deviation, shift_factor=shift)


class _Batches(Dataset):
    """The batch of every step, by the step's number."""

    def __init__(self, images: Images, size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, step: int) -> Tensor:
        return torch.stack([self.images(random.Random(f"{self.seed}/{step}/{i}")) for i in range(self.size)])


class VAETrainer:
    """Trains an autoencoder on one device; goes on where an earlier run in its folder stopped.

    Its checkpoints hold `ae.safetensors` (the moving average), `vae_config.json` with the scale and shift measured on
    images, and what resuming needs.

    Args:
        vae: float32 weights; moved to the device.
        images: makes training images.
        config: `ce_weight`, `mse_weight`, `freeze`, `attention`, `batches`, `activation_checkpointing` and `compile`
            play no part.
        batch_size: images of a step.
        out: the run's folder.
        weights: of the loss.
        decoder_only: keep the encoder, the scale and the shift as they are, and so the latents on which a model was
            trained.
        latent_noise: deviation of the noise on the latents that are decoded, of each image drawn evenly up to this,
            in the unit of `Autoencoder.encode`: what a model draws is not exact either.
        device: where to train.
        progress: show a progress bar on a terminal.
    """

    def __init__(
        self,
        vae: Autoencoder,
        images: Images,
        config: TrainConfig,
        *,
        batch_size: int,
        out: str | Path,
        weights: VAELossWeights = VAELossWeights(),
        decoder_only: bool = False,
        latent_noise: float = 0.0,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> None:
        self.vae, self.config, self.weights = vae.to(device).train().requires_grad_(True), config, weights
        self.batches = _Batches(images, batch_size, config.seed)
        self.out, self.device, self.progress = Path(out), torch.device(device), progress
        self.decoder_only, self.latent_noise = decoder_only, latent_noise
        self.vae.encoder.requires_grad_(not decoder_only)
        self.parameters = {name: p for name, p in self.vae.named_parameters() if p.requires_grad}
        self.optimiser = Optimiser(self.parameters, config)
        self.done = 0
        self.loss = torch.zeros(())
        self.reported = 0, time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        state.clean(self.out)
        folder = state.newest(self.out)
        if folder is not None:
            self._resume(folder)

    def fit(self, *, time_limit: float | None = None) -> Autoencoder:
        """Train to the end, or for `time_limit` seconds, save, and return the average with its scale and shift set.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        config = self.config
        log = Log(self.out, steps=config.steps, done=self.done, progress=self.progress)
        self.reported = self.done, time.monotonic()
        end = time.monotonic() + (float("inf") if time_limit is None else time_limit)
        steps = range(self.done, config.steps)
        feed = DataLoader(
            self.batches,
            batch_size=None,
            sampler=steps,
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for pixels in feed:
                terms = self.step(pixels)
                log.step()
                if self.done % config.log_every == 0 or self.done == config.steps:
                    self._report(log, terms, pixels.shape[0])
                if config.save_every and self.done % config.save_every == 0:
                    self.save()
                if time.monotonic() >= end:
                    break
        finally:
            log.close()
        return self.save()

    def step(self, pixels: Tensor) -> dict[str, Tensor]:
        """Do one optimizer step on images (B, 3, H, W); return the terms of the loss."""
        config, vae = self.config, self.vae
        pixels = self._unit(pixels)
        generator = self._generator(self.done)
        down = vae.config.downsample
        shape = (pixels.shape[0], vae.config.z_channels, pixels.shape[2] // down, pixels.shape[3] // down)
        noise = torch.randn(shape, generator=generator, device=self.device)
        extra = None
        if self.latent_noise:
            most = torch.rand((shape[0], 1, 1, 1), generator=generator, device=self.device) * self.latent_noise
            extra = most * torch.randn(shape, generator=generator, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = vae_losses(vae, pixels, noise, extra)
        loss = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        loss.backward()
        self.loss = loss.detach()
        self.optimiser.step(self.done)
        self.done += 1
        return {"loss": self.loss, **{name: term.detach() for name, term in terms.items()}}

    def averaged(self) -> Autoencoder:
        """Return the averaged autoencoder, its scale and shift measured on 16 batches of images unless they stay."""
        weights = self.vae.state_dict() | self.optimiser.average
        vae = Autoencoder(self.vae.config).to(self.device)
        vae.load_state_dict(weights)
        if not self.decoder_only:
            batches = (self._unit(self.batches[-1 - index]) for index in range(16))
            vae = Autoencoder(latent_statistics(vae, batches, self._generator(-1))).to(self.device)
            vae.load_state_dict(weights)
        return vae.eval().requires_grad_(False)

    def save(self) -> Autoencoder:
        """Write a checkpoint of this step, if there is none; return the averaged autoencoder."""
        self._check()
        vae = self.averaged()
        weights = {f"weights/{name}": parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        average = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
        moments = self.optimiser.moments()
        values = {"step": self.done, "train": self.config.to_dict()}

        def write(folder: Path) -> None:
            save_file(average, folder / "ae.safetensors")
            save_file(weights | moments, folder / state.MOMENTS)
            (folder / "vae_config.json").write_text(json.dumps(dataclasses.asdict(vae.config)), encoding="utf-8")
            (folder / state.STATE).write_text(json.dumps(values), encoding="utf-8")

        state.publish(self.out, self.done, write, keep=self.config.keep)
        return vae

    def _resume(self, folder: Path) -> None:
        tensors, average = load_file(folder / state.MOMENTS), load_file(folder / "ae.safetensors")
        self.done = json.loads((folder / state.STATE).read_text(encoding="utf-8"))["step"]
        self.vae.load_state_dict(average | {name: tensors[f"weights/{name}"] for name in self.parameters})
        self.optimiser.restore(tensors, average, steps=self.done)

    def _report(self, log: Log, terms: dict[str, Tensor], count: int) -> None:
        self._check()
        (step, began), now = self.reported, time.monotonic()
        self.reported = self.done, now
        values = {name: term.item() for name, term in terms.items()}
        values |= {"lr": self.config.lr_at(self.done - 1)}
        values |= {"pictures_per_s": count * (self.done - step) / (now - began)}
        log.write(self.done, values)

    def _check(self) -> None:
        if not bool(torch.isfinite(self.loss)):
            raise FloatingPointError(f"the autoencoder's loss is not finite by step {self.done}: lower lr or clip_norm")

    def _unit(self, pixels: Tensor) -> Tensor:
        return in_unit(pixels.to(self.device, non_blocking=True))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(random.Random(f"{self.config.seed}/{number}").getrandbits(63))
