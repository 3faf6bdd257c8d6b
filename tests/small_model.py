"""A small random model whose sizes are all different, and segments for it: for laws that need no reference numbers."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bagel.config import LAYER_MODULES, BagelConfig, DecoderConfig, VAEConfig, ViTConfig
from bagel.generation.contexts import Contexts
from bagel.kernels import Rotary
from bagel.modeling import Bagel, Branch, Context, Decoder, Denoiser
from bagel.modeling.bagel import TimestepEmbedder
from bagel.packing import LatentImage, Packed, Text, ViTImage, pack

MOT, MOE, DENSE = LAYER_MODULES
VOCAB = 448
IMAGE_TOKENS = (445, 446)


def small_config(
    layer_module: str = MOT, *, visual_gen: bool = True, visual_und: bool = True, **decoder
) -> BagelConfig:
    """Hidden 48 in 6 query and 2 key/value heads of 8; patches of 12 values, latents of 20; grids of 6 and 9."""
    sizes: dict[str, Any] = dict(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        rope_theta=1e4,
        layer_module=layer_module,
    )
    return BagelConfig(
        llm_config=DecoderConfig(**(sizes | decoder)),
        vit_config=ViTConfig(
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=12,
            patch_size=2,
        ),
        vae_config=VAEConfig(z_channels=5),
        visual_gen=visual_gen,
        visual_und=visual_und,
        max_latent_size=9,
        vit_max_num_patch_per_side=6,
    )


def rotary_of(config: DecoderConfig, positions: torch.Tensor) -> Rotary:
    """Return the rotary table of positions (T,) for a decoder of these sizes."""
    with torch.device("meta"):
        decoder = Decoder(dataclasses.replace(config, num_hidden_layers=1))
    return decoder.rotary(positions, positions[:0])[0]


def timestep_features(embedder: TimestepEmbedder, t: torch.Tensor) -> torch.Tensor:
    """Return what an embedder of times (n,) gives its first layer."""
    seen = []
    handle = embedder.fc1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embedder(t)
    handle.remove()
    return seen[0]


@torch.no_grad()
def randomise(module: nn.Module, *, seed: int = 0) -> None:
    """Give every parameter a random value of healthy scale, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("embedding.weight") or "embed_tokens" in name:
            parameter.copy_(value)
        elif parameter.ndim == 2:
            parameter.copy_(1.5 * value / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(0.3 * value + ("norm" in name and name.endswith("weight")))


def new_model(layer_module: str = MOT, *, seed: int = 0, **config) -> Bagel:
    """A small random model of its own, to be changed."""
    model = Bagel(small_config(layer_module, **config))
    randomise(model, seed=seed)
    return model.eval().requires_grad_(False)


@lru_cache
def small_model(layer_module: str = MOT) -> Bagel:
    """The small random model; tests must not change it."""
    return new_model(layer_module)


def text(count: int, *, seed: int = 0) -> Text:
    """A text of random ids."""
    return Text(torch.randint(0, 440, (count,), generator=torch.Generator().manual_seed(seed)))


def vit(count: int, *, seed: int = 0) -> ViTImage:
    """An image of random patches in random cells."""
    generator = torch.Generator().manual_seed(seed)
    return ViTImage(torch.randn(count, 12, generator=generator), torch.randperm(36, generator=generator)[:count])


def latents(count: int, *, seed: int = 0, **options) -> LatentImage:
    """An image of random latents in random cells."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(81, generator=generator)[:count]
    return LatentImage(torch.randn(count, 20, generator=generator), cells, **options)


def packed_of(*samples, **options) -> Packed:
    """Pack for the small model."""
    return packs(samples, **options)


packs = partial(pack, image_tokens=IMAGE_TOKENS)
"""Packs lists of samples for the small model, as `Processor.pack` does."""


def new_contexts(model: Bagel | None = None, *, eager: bool = True) -> Contexts:
    """Contexts of a conversation with the small model, or another of its sizes."""
    return Contexts(model or small_model(), SimpleNamespace(pack=packs), eager=eager)  # pyright: ignore


def in_order(packed: Packed, hidden: tuple[Tensor, Tensor]) -> Tensor:
    """Both streams as one sequence (T, H), sample by sample."""
    return torch.cat(hidden)[packed.order]


def filled(model: Bagel, *segments) -> tuple[Context, Tensor]:
    """A context that read segments one at a time, and all hidden states in sequence order."""
    context, hidden = model.new_context(), [torch.empty(0, 48)]
    for segment in segments:
        packed = packed_of([segment], starts=[context.position])
        hidden.append(in_order(packed, model.prefill(packed, [context])))
    return context, torch.cat(hidden)


def held(context: Context) -> tuple[Tensor, Tensor, int, int]:
    """A copy of all that a context holds."""
    keys, values = context.held()
    return keys.clone(), values.clone(), context.length, context.position


def assert_same(one: tuple, other: tuple) -> None:
    """Assert that both hold the same, to the bit."""
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def denoiser(model: Bagel, *branches: Branch, times: tuple[float, ...] = (1.0, 0.75, 0.3)) -> Denoiser:
    """What evaluates two images, of 3 and 5 latents, at these times."""
    targets = [latents(count, seed=seed, noisy=True) for count, seed in ((3, 20), (5, 21))]
    return Denoiser(model, targets, branches, pack=packs, times=times)


NOISE = torch.cat([latents(3, seed=20).latents, latents(5, seed=21).latents])
"""Latents of both images that `denoiser` evaluates."""
