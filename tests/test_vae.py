"""The autoencoder against the reference numbers, diffusers' AutoencoderKL and its own laws."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import REFERENCE, golden
from safetensors.torch import load_file
from torch import Tensor

from bagel.config import VAEConfig
from bagel.vae import Autoencoder

SMALL = VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=5, scale_factor=0.7, shift_factor=0.2)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Every element within `tolerance` of the largest one."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_vae() -> Autoencoder:
    """A small autoencoder with weights large enough for every block to matter."""
    vae = Autoencoder(SMALL)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in vae.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        offset = float("norm" in name and name.endswith("weight"))
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + offset
    return vae.requires_grad_(False)


def reference_vae(variant: str) -> Autoencoder:
    folder = REFERENCE / variant / "checkpoint"
    values = json.loads((folder / "config.json").read_text())["vae_config"]
    values = {key: value for key, value in values.items() if key in VAEConfig.__dataclass_fields__}
    values["ch_mult"] = tuple(values["ch_mult"])
    vae = Autoencoder(VAEConfig(**values))
    weights = load_file(str(folder / "ae.safetensors"))
    vae.load_state_dict({key: value.float() for key, value in weights.items()})
    return vae.requires_grad_(False)


def test_moments_match_the_reference(variant):
    want = golden(variant, "components")
    mean, logvar = reference_vae(variant).moments(want["vae.pixels"])
    assert_close(mean, want["vae.mean"])
    assert_close(logvar, want["vae.logvar"])


def test_sampled_latents_match_the_reference(variant):
    want = golden(variant, "components")
    assert_close(reference_vae(variant).encode(want["vae.pixels"], want["vae.posterior_noise"]), want["vae.latent"])


def test_decoded_pixels_match_the_reference(variant):
    want = golden(variant, "components")
    assert_close(reference_vae(variant).decode(want["vae.latent"]), want["vae.decoded"])


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The same tensors under the names of AutoencoderKL, which numbers the decoder's levels in running order."""
    parts = {
        "mid.block_1": "mid_block.resnets.0",
        "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
        "mid.attn_1.q": "mid_block.attentions.0.to_q",
        "mid.attn_1.k": "mid_block.attentions.0.to_k",
        "mid.attn_1.v": "mid_block.attentions.0.to_v",
        "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
        "norm_out": "conv_norm_out",
        "nin_shortcut": "conv_shortcut",
        "downsample.conv": "downsamplers.0.conv",
        "upsample.conv": "upsamplers.0.conv",
    }
    for i in range(levels):
        parts[f"down.{i}"] = f"down_blocks.{i}"
        parts[f"up.{i}"] = f"up_blocks.{levels - 1 - i}"
    out = {}
    for key, value in state.items():
        for ours, theirs in parts.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        key = key.replace(".block.", ".resnets.")
        out[key] = value.flatten(1) if ".to_" in key and key.endswith("weight") else value
    return out


@pytest.fixture(scope="module")
def pair():
    """Our autoencoder and diffusers' with the same random weights."""
    from diffusers import AutoencoderKL

    vae = random_vae()
    levels = len(SMALL.ch_mult)
    oracle = AutoencoderKL(
        block_out_channels=tuple(SMALL.ch * m for m in SMALL.ch_mult),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=SMALL.num_res_blocks,
        latent_channels=SMALL.z_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    oracle.load_state_dict(to_diffusers(vae.state_dict(), levels))
    return vae, oracle.requires_grad_(False)


def test_moments_match_diffusers(pair):
    vae, oracle = pair
    pixels = randn(2, 3, 24, 40)
    posterior = oracle.encode(pixels).latent_dist
    mean, logvar = vae.moments(pixels)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)


def test_decoded_pixels_match_diffusers(pair):
    vae, oracle = pair
    z = randn(2, 5, 6, 10)
    assert_close(vae.decode(0.7 * (z - 0.2)), oracle.decode(z).sample)


def test_encode_without_noise_is_the_scaled_mean():
    vae, pixels = random_vae(), randn(2, 3, 16, 28)
    mean, _ = vae.moments(pixels)
    assert_close(vae.encode(pixels, None), 0.7 * (mean - 0.2))
    assert_close(vae.encode(pixels, torch.zeros_like(mean)), 0.7 * (mean - 0.2))


def test_noise_scales_with_the_standard_deviation():
    vae, pixels, noise = random_vae(), randn(1, 3, 16, 28), randn(1, 5, 4, 7)
    _, logvar = vae.moments(pixels)
    assert_close(vae.encode(pixels, noise) - vae.encode(pixels, None), 0.7 * torch.exp(logvar / 2) * noise)


def test_decode_undoes_the_sizes_of_encode():
    vae = random_vae()
    latents = vae.encode(randn(2, 3, 16, 28), None)
    assert latents.shape == (2, 5, 4, 7)
    assert vae.decode(latents).shape == (2, 3, 16, 28)


def test_images_of_a_batch_do_not_meet():
    vae, pixels = random_vae(), randn(2, 3, 16, 28)
    latents = vae.encode(pixels, None)
    assert_close(latents, torch.cat([vae.encode(one[None], None) for one in pixels]))
    assert_close(vae.decode(latents), torch.cat([vae.decode(one[None]) for one in latents]))


def test_channels_last_changes_no_value():
    vae, pixels = random_vae(), randn(1, 3, 16, 28)
    want_latents = vae.encode(pixels, None)
    want_pixels = vae.decode(want_latents)
    vae = vae.to(memory_format=torch.channels_last)
    latents = vae.encode(pixels.to(memory_format=torch.channels_last), None)
    assert_close(latents, want_latents)
    assert_close(vae.decode(latents.to(memory_format=torch.channels_last)), want_pixels)


def test_bfloat16_weights_give_float32_latents_and_bfloat16_pixels():
    vae, pixels = random_vae(), randn(1, 3, 16, 28)
    want = vae.encode(pixels, None)
    vae = vae.to(torch.bfloat16)
    latents = vae.encode(pixels, None)
    assert latents.dtype == torch.float32
    assert_close(latents, want, tolerance=0.05)
    assert vae.decode(latents).dtype == torch.bfloat16


def test_gradients_reach_every_parameter():
    vae = random_vae().requires_grad_(True)
    vae.decode(vae.encode(randn(1, 3, 8, 12), randn(1, 5, 2, 3))).square().sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        # A bias on every key shifts all scores of a query alike: its gradient is zero in theory.
        assert name.endswith("attn_1.k.bias") or parameter.grad.abs().max() > 0, name


def test_released_sizes_match_the_published_table():
    table = json.loads((REFERENCE / "official_7b.json").read_text())["vae"]
    with torch.device("meta"):
        vae = Autoencoder(VAEConfig())
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == table
    assert len(table) == 244


@pytest.mark.parametrize("shape", [(1, 3, 16, 30), (1, 3, 18, 28), (1, 4, 16, 28), (3, 16, 28)])
def test_pixels_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"\(B, 3, H, W\) with H and W multiples of 4, got \(" + ", ".join(map(str, shape))
    ):
        random_vae().encode(torch.zeros(shape), None)


def test_noise_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 5, 4, 7\), got \(1, 5, 7, 4\)"):
        random_vae().encode(randn(1, 3, 16, 28), randn(1, 5, 7, 4))


@pytest.mark.parametrize("shape", [(1, 4, 4, 7), (5, 4, 7)])
def test_latents_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 5, h, w\), got \(" + ", ".join(map(str, shape))):
        random_vae().decode(torch.zeros(shape))
