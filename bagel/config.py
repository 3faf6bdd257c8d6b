"""Configurations as frozen dataclasses; their fields keep the JSON names of the released checkpoint.

Sizes in comments are those of BAGEL-7B-MoT. How a checkpoint folder is turned into one of these, and what wins when
its files disagree, is told in `bagel.checkpoint`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

LAYER_MODULES = ("Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer")


class ConfigError(ValueError):
    """A configuration value that is missing, unsupported or contradicts another; the message names its file."""


class MissingHalfError(ValueError):
    """The model was built without the half that this call needs (vision or generation)."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_sizes(config: object, file: str) -> None:
    """Check that every whole number of a configuration is one, and positive."""
    for size in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        values = getattr(config, size.name)
        if size.type in ("int", "tuple[int, ...]"):
            for value in values if isinstance(values, tuple) else (values,):
                whole = isinstance(value, int) and not isinstance(value, bool)
                _require(whole and value > 0, f"{file}: {size.name} must be a positive whole number, got {value!r}")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language model (`llm_config.json`, the names of Qwen2)."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    layer_module: str = "Qwen2MoTDecoderLayer"

    def __post_init__(self) -> None:
        _require_sizes(self, "llm_config")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(self.hidden_act == "silu", f"llm_config: hidden_act must be 'silu', got {self.hidden_act!r}")
        _require(
            self.layer_module in LAYER_MODULES,
            f"llm_config: layer_module must be one of {', '.join(LAYER_MODULES)}, got {self.layer_module!r}",
        )
        _require(
            self.hidden_size % heads == 0,
            f"llm_config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}",
        )
        _require(
            heads % kv_heads == 0,
            f"llm_config: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"llm_config: the head size {self.head_dim} must be even for rotary embedding")

    @cached_property
    def head_dim(self) -> int:
        """Channels of one attention head (128)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_gen_expert(self) -> bool:
        """Whether layers hold a second, generating set of weights (MoT and MoE variants)."""
        return self.layer_module != "Qwen2DecoderLayer"

    @property
    def has_gen_attention(self) -> bool:
        """Whether the generating expert has norms and attention projections of its own (MoT only)."""
        return self.layer_module == "Qwen2MoTDecoderLayer"


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the vision encoder (`vit_config.json`, the names of SigLIP).

    `num_hidden_layers` is the number the file states (27); the last layer is never used and released weights do not
    hold it, so the encoder has `num_layers` = one fewer.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 980
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    rope: bool = False

    def __post_init__(self) -> None:
        _require_sizes(self, "vit_config")
        _require(
            self.hidden_act == "gelu_pytorch_tanh",
            f"vit_config: hidden_act must be 'gelu_pytorch_tanh', got {self.hidden_act!r}",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vit_config: hidden_size {self.hidden_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )
        _require(
            not self.rope or self.head_dim % 4 == 0,
            f"vit_config: 2-D rotary embedding needs a head size divisible by 4, got {self.head_dim}",
        )

    @property
    def num_layers(self) -> int:
        """Layers that are run and stored (26)."""
        return self.num_hidden_layers - 1

    @cached_property
    def head_dim(self) -> int:
        """Channels of one attention head (72)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches_per_side(self) -> int:
        """Side of the square position grid (70)."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch (588)."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the FLUX.1 autoencoder (no file in the official layout; `vae_config` in our exports)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        _require_sizes(self, "vae_config")
        _require(len(self.ch_mult) > 0, "vae_config: ch_mult must hold at least one number, got none")

    @cached_property
    def downsample(self) -> int:
        """Pixels per latent along a side (8)."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ImageTransform:
    """The resize rule of one image path: sides in pixels, area in pixels. See `bagel.image.resized_size`."""

    max_image_size: int
    min_image_size: int
    image_stride: int
    max_pixels: int = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class BagelConfig:
    """The whole model (`config.json`). `vit_config` or `vae_config` is None where the checkpoint has no such half."""

    llm_config: DecoderConfig = field(default_factory=DecoderConfig)
    vit_config: ViTConfig | None = field(default_factory=ViTConfig)
    vae_config: VAEConfig | None = field(default_factory=VAEConfig)
    visual_gen: bool = True
    visual_und: bool = True
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    vae_image_transform: ImageTransform = ImageTransform(1024, 512, 16)
    vit_image_transform: ImageTransform = ImageTransform(980, 224, 14)

    def __post_init__(self) -> None:
        _require_sizes(self, "config.json")
        _require(
            self.connector_act == "gelu_pytorch_tanh",
            f"config.json: connector_act must be 'gelu_pytorch_tanh', got {self.connector_act!r}",
        )
        _require(
            not self.visual_und or self.vit_config is not None,
            "config.json: visual_und is true but there is no vit_config; set one of them right",
        )

    @cached_property
    def latent_downsample(self) -> int:
        """Pixels per latent token along a side (16); image sides must be multiples of it."""
        vae = self.vae_config or VAEConfig()
        return vae.downsample * self.latent_patch_size

    @cached_property
    def patch_latent_dim(self) -> int:
        """Values of one latent token (64)."""
        vae = self.vae_config or VAEConfig()
        return self.latent_patch_size**2 * vae.z_channels

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values, every field written out."""
        return dataclasses.asdict(self)


BAGEL_7B = BagelConfig()
"""BAGEL-7B-MoT as released (arXiv 2505.14683; `ByteDance-Seed/BAGEL-7B-MoT`)."""
