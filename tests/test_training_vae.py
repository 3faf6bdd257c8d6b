"""Training of the autoencoder: its terms, that it learns, its statistics, and that it resumes bit for bit."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from bagel.config import VAEConfig
from bagel.training.config import TrainConfig
from bagel.training.vae_training import VAELossWeights, VAETrainer, latent_statistics, vae_losses
from bagel.vae import Autoencoder

CONFIG = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image(rng: random.Random) -> torch.Tensor:
    """Two halves of flat colours."""
    left, right = (torch.tensor([rng.randrange(256) for _ in range(3)], dtype=torch.uint8) for _ in range(2))
    pixels = left[:, None, None].repeat(1, 8, 12)
    pixels[:, :, rng.randrange(1, 11) :] = right[:, None, None]
    return pixels


def new_vae(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(CONFIG)


def one_of_eight(rng: random.Random) -> torch.Tensor:
    return image(random.Random(rng.randrange(8)))


def trainer(out, *, vae=None, images=image, decoder_only=False, latent_noise=0.0, **settings) -> VAETrainer:
    settings = {"steps": 4, "lr": 2e-3, "warmup": 2, "log_every": 1, **settings}
    rest = {"decoder_only": decoder_only, "latent_noise": latent_noise, "progress": False}
    return VAETrainer(vae or new_vae(), images, TrainConfig(**settings), batch_size=4, out=out, **rest)


def test_terms_are_what_they_say():
    vae = new_vae()
    pixels, noise = torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 4, 4, 6)
    terms = vae_losses(vae, pixels, noise)
    mean, logvar = vae.moments(pixels)
    found = vae.decoder(mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(terms["l1"], (found - pixels).abs().mean())
    torch.testing.assert_close(terms["l2"], ((found - pixels) ** 2).mean())
    error = found - pixels
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    torch.testing.assert_close(terms["gradient"], across + down)
    posterior = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(terms["kl"], torch.distributions.kl_divergence(posterior, normal).mean())


def test_it_learns_to_reconstruct(tmp_path):
    trainer(tmp_path, images=one_of_eight, steps=250, log_every=5).fit()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["l1"] > 0.35
    assert sum(line["l1"] for line in log[-5:]) / 5 < 0.2


def test_statistics_give_latents_mean_zero_and_deviation_one():
    pixels = torch.stack([image(random.Random(i)) for i in range(64)]).float() / 127.5 - 1
    config = latent_statistics(new_vae(), pixels.split(16), torch.Generator().manual_seed(0))
    vae = Autoencoder(config)
    vae.load_state_dict(new_vae().state_dict())
    with torch.no_grad():
        latents = vae.encode(pixels, torch.randn((64, 4, 4, 6), generator=torch.Generator().manual_seed(1)))
    assert abs(latents.mean().item()) < 0.05
    assert latents.std().item() == pytest.approx(1, abs=0.05)


def test_the_result_is_the_average_with_its_statistics_written_beside_it(tmp_path):
    done = trainer(tmp_path).fit()
    folder = tmp_path / "0000004"
    stored = load_file(folder / "ae.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in done.state_dict().items())
    written = json.loads((folder / "vae_config.json").read_text())
    assert VAEConfig(**{**written, "ch_mult": tuple(written["ch_mult"])}) == done.config
    assert done.config.scale_factor != CONFIG.scale_factor


def test_a_decoder_trained_on_noisy_latents_forgives_noise_and_leaves_the_latents(tmp_path):
    vae = trainer(tmp_path / "vae", images=one_of_eight, steps=150, log_every=50, ema_decay=0.9).fit()
    pixels = torch.stack([one_of_eight(random.Random(i)) for i in range(16)]).float() / 127.5 - 1
    latents = vae.encode(pixels, None)
    noisy = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    before = (vae.decode(noisy) - pixels).square().mean()
    settings = {"decoder_only": True, "latent_noise": 2.0, "steps": 150, "log_every": 50, "ema_decay": 0.9}
    done = trainer(tmp_path / "decoder", vae=vae, images=one_of_eight, **settings).fit()
    assert done.config == vae.config
    assert torch.equal(done.encode(pixels, None), latents)
    assert (done.decode(noisy) - pixels).square().mean() < 0.7 * before


@pytest.mark.parametrize("settings", [{}, {"decoder_only": True, "latent_noise": 0.5}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_equal_weights(tmp_path, workers, settings):
    straight = trainer(tmp_path / "straight", **settings)
    straight.fit()
    killed = trainer(tmp_path / "killed", save_every=2, **settings)
    for index in range(3):
        if index == 2:
            killed.save()
        killed.step(killed.batches[index])
    again = trainer(tmp_path / "killed", vae=new_vae(9), workers=workers, **settings)
    assert again.done == 2
    again.fit()
    for name, tensor in straight.vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[name], tensor), name
    for name, tensor in straight.optimiser.average.items():
        assert torch.equal(again.optimiser.average[name], tensor), name


def test_weights_of_zero_switch_terms_off(tmp_path):
    config = TrainConfig(steps=1)
    weights = VAELossWeights(l1=0, l2=0, gradient=0, kl=1)
    training = VAETrainer(new_vae(), image, config, batch_size=2, out=tmp_path, weights=weights, progress=False)
    terms = training.step(torch.stack([image(random.Random(i)) for i in range(2)]))
    torch.testing.assert_close(terms["loss"], terms["kl"])
