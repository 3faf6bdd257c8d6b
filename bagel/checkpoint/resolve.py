"""One configuration from two witnesses: the weights' shapes and the JSON files.

Sizes come from the weights, the counts of layers and what shapes cannot tell from `llm_config.json` and
`vit_config.json`, the rest from `config.json`, which is the least reliable; every disagreement is noted. Where no file
says it, the released 7B's value is taken only if the weights have the released 7B's sizes, or is noted.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.measure import Measured
from bagel.checkpoint.stated import Stated, StatedFiles
from bagel.config import BAGEL_7B, BagelConfig, ConfigError, DecoderConfig, ImageTransform, VAEConfig, ViTConfig

T = TypeVar("T")

MOST_LACKING = 1000
"""Layers that a file may say beyond those that there are; more would take long to list as missing."""
ZEBRA_WEIGHTS = "model_bf16.safetensors"
ZEBRA_VIT_TRANSFORM = ImageTransform(980, 512, 14)
"""The ViT's resize rule of Bagel-Zebra-CoT, which its files do not state."""


@dataclass
class Resolver:
    """Collects the configuration of one checkpoint and the notes on what its files disagree about."""

    measured: Measured
    stated: StatedFiles
    notes: list[str] = field(default_factory=list)

    def config(self, vae: VAEConfig | None, *, weights_name: str) -> BagelConfig:
        """Return the configuration of all that the weights hold; `vae` is the autoencoder's, if there is one."""
        try:
            return self._config(vae, weights_name)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    def _config(self, vae: VAEConfig | None, weights_name: str) -> BagelConfig:
        measured, model = self.measured, self.stated.model
        gen = self._has_gen()
        und = measured.has_vision
        self._note_half("visual_gen", gen)
        self._note_half("visual_und", und)
        values: dict[str, Any] = {}
        if und:
            values["vit_config"] = self._vit()
            values["vit_max_num_patch_per_side"] = self._side("vit_max_num_patch_per_side", "vit_table")
        else:
            values["vit_config"] = None
        patch = self._default(model.integer("latent_patch_size"), BAGEL_7B.latent_patch_size)
        if gen:
            latent = measured.size("latent")
            values["vae_config"] = vae or VAEConfig(z_channels=max((latent or 0) // patch**2, 1))
            values["max_latent_size"] = self._side("max_latent_size", "latent_table")
        else:
            values["vae_config"] = None
        config = BagelConfig(
            llm_config=self._decoder(gen=gen),
            visual_gen=gen,
            visual_und=und,
            latent_patch_size=patch,
            connector_act=self._default(model.text("connector_act"), BAGEL_7B.connector_act),
            interpolate_pos=self._default(model.boolean("interpolate_pos"), BAGEL_7B.interpolate_pos),
            timestep_shift=self._default(model.number("timestep_shift"), BAGEL_7B.timestep_shift),
            **values,
        )
        if not _has_released_sizes(config):
            self._check_unstated()
        return dataclasses.replace(
            config,
            vae_image_transform=self._transform("vae_image_transform", config, weights_name),
            vit_image_transform=self._transform("vit_image_transform", config, weights_name),
        )

    def _check_unstated(self) -> None:
        # The released values fit the released sizes; elsewhere a guess could draw wrong images without a word.
        if self.stated.unreadable is not None:
            raise CheckpointError(
                f"{self.stated.unreadable}, and these are not the released 7B's sizes, whose values could stand in: "
                "repair it, or delete it to use the defaults"
            )
        if self.stated.model.get("interpolate_pos") is None:
            self.notes.append("no config.json says interpolate_pos: it is taken to be false, as in the released model")

    def _has_gen(self) -> bool:
        # A run trained for understanding only may keep idle gen experts, but never the glue around latents.
        said = self.stated.model.boolean("visual_gen")
        if self.measured.has_gen_glue or not self.measured.has_gen:
            return self.measured.has_gen_glue
        if said is not None and said[0]:
            return True
        self.notes.append("the gen experts are passed over: the weights have none of the tensors around latents")
        return False

    def _note_half(self, name: str, there: bool) -> None:
        said = self.stated.model.boolean(name)
        if said is not None and said[0] != there:
            holds = "hold" if there else "do not hold"
            self.notes.append(f"{said[1]} says {name} {str(said[0]).lower()}, but the weights {holds} that half")

    def _decoder(self, *, gen: bool) -> DecoderConfig:
        measured, stated = self.measured, self.stated.decoder
        sizes = {
            "hidden_size": self._size("hidden_size", "hidden", stated),
            "intermediate_size": self._size("intermediate_size", "mlp", stated),
            "vocab_size": self._size("vocab_size", "vocab", stated),
            "num_hidden_layers": self._layers(stated, measured.decoder_layers),
        }
        released = all(getattr(BAGEL_7B.llm_config, name) == size for name, size in sizes.items())
        heads, kv_heads = self._heads(sizes["hidden_size"], released)
        if stated.get("rope_scaling") is not None:
            value, label = stated.get("rope_scaling") or (None, "")
            raise CheckpointError(f"{label}: rope_scaling {value!r} is not supported; only plain rotary embedding is")
        rope = stated.number("rope_theta") or stated.part("rope_parameters").number("rope_theta")
        return DecoderConfig(
            **sizes,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=self._default(stated.number("rms_norm_eps"), BAGEL_7B.llm_config.rms_norm_eps),
            rope_theta=self._needed("rope_theta", rope, BAGEL_7B.llm_config.rope_theta, released, "llm_config.json"),
            hidden_act=self._default(stated.text("hidden_act"), "silu"),
            tie_word_embeddings=self._tied(),
            qk_norm=self._default(stated.boolean("qk_norm"), measured.has_qk_norm),
            layer_module=self._layer_module(gen=gen),
        )

    def _layers(self, stated: Stated, held: int) -> int:
        """Return the layers stated; too few or too many are told by their tensors, but absurd numbers at once."""
        count, label = stated.integer("num_hidden_layers") or (held, "")
        if count > held + MOST_LACKING:
            raise CheckpointError(
                f"{label} says num_hidden_layers {count}, but the weights hold {held}; fetch it again"
            )
        return count

    def _heads(self, hidden: int, released: bool) -> tuple[int, int]:
        stated, default = self.stated.decoder, BAGEL_7B.llm_config
        head = self.measured.size("head")
        said = stated.integer("num_attention_heads")
        if head:
            heads = max(hidden // head, 1)
            if said is not None and said[0] != heads:
                self._note("num_attention_heads", said, heads)
        else:
            heads = self._needed("num_attention_heads", said, default.num_attention_heads, released, "llm_config.json")
            head = max(hidden // heads, 1)
        said = stated.integer("num_key_value_heads")
        rows = self.measured.size("kv", said[0] * head if said else None)
        kv_heads = max((rows or hidden) // head, 1)
        if said is not None and said[0] != kv_heads:
            self._note("num_key_value_heads", said, kv_heads)
        return heads, kv_heads

    def _tied(self) -> bool:
        said = self.stated.decoder.boolean("tie_word_embeddings")
        if said is None or (said[0] and self.measured.has_head):
            if said is not None:
                self.notes.append(f"{said[1]} says tie_word_embeddings true, but the weights hold a head of their own")
            return not self.measured.has_head
        return said[0]

    def _layer_module(self, *, gen: bool) -> str:
        said = self.stated.decoder.text("layer_module") or self.stated.model.text("layer_module")
        if said is not None:
            return said[0]
        if self.measured.has_gen_attention:
            return "Qwen2MoTDecoderLayer"
        return "Qwen2MoEDecoderLayer" if self.measured.has_gen_mlp else "Qwen2DecoderLayer"

    def _vit(self) -> ViTConfig:
        measured, stated, default = self.measured, self.stated.vit, ViTConfig()
        sizes = {
            "hidden_size": self._size("hidden_size", "vit", stated),
            "intermediate_size": self._size("intermediate_size", "vit_mlp", stated),
            "num_hidden_layers": self._layers(stated, measured.vit_layers + 1),
        }
        released = all(getattr(default, name) == size for name, size in sizes.items())
        channels = self._default(stated.integer("num_channels"), default.num_channels)
        said = stated.integer("patch_size")
        patch_dim = measured.size("patch", said[0] ** 2 * channels if said else None) or default.patch_dim
        patch = max(math.isqrt(patch_dim // channels), 1)
        if said is not None and said[0] != patch:
            self._note("patch_size", said, patch)
        heads = stated.integer("num_attention_heads")
        return ViTConfig(
            **sizes,
            num_attention_heads=self._needed(
                "num_attention_heads", heads, default.num_attention_heads, released, "vit_config.json"
            ),
            image_size=self._image_size(patch),
            patch_size=patch,
            num_channels=channels,
            hidden_act=self._default(stated.text("hidden_act"), default.hidden_act),
            layer_norm_eps=self._default(stated.number("layer_norm_eps"), default.layer_norm_eps),
            rope=self._default(stated.boolean("rope"), default.rope),
        )

    def _image_size(self, patch: int) -> int:
        said = self.stated.vit.integer("image_size")
        rows = self.measured.size("vit_positions") or self.measured.size("vit_table")
        side = math.isqrt(rows or 0)
        square = side > 0 and side * side == rows
        if said is None:
            return max(side, 1) * patch
        if square and self.measured.has_positions and said[0] // patch != side:
            self._note("image_size", said, side * patch)
            return side * patch
        return said[0]

    def _side(self, name: str, table: str) -> int:
        said = self.stated.model.integer(name)
        rows = self.measured.size(table)
        side = math.isqrt(rows or 0)
        if rows and side * side == rows:
            if said is not None and said[0] != side:
                self._note(name, said, side)
            return side
        return said[0] if said is not None else max(side, 1)

    def _size(self, name: str, measured_name: str, stated: Stated) -> int:
        said = stated.integer(name)
        size = self.measured.size(measured_name, said[0] if said else None)
        if size is None:
            if said is None:
                raise CheckpointError(f"the weights have no tensor that tells {name}; they are not BAGEL's")
            return said[0]
        if said is not None and said[0] != size:
            self._note(name, said, size)
        return max(size, 1)

    def _transform(self, name: str, config: BagelConfig, weights_name: str) -> ImageTransform:
        stated = self.stated.model.part(name)
        if not stated.sources:
            if name == "vit_image_transform" and weights_name == ZEBRA_WEIGHTS:
                self.notes.append(
                    f"{weights_name} is the layout of Bagel-Zebra-CoT: its ViT resize rule (980, 512, 14) is used; "
                    "write vit_image_transform into config.json for another"
                )
                return ZEBRA_VIT_TRANSFORM
            return self._fitted(name, config)
        values = {f.name: stated.integer(f.name) for f in dataclasses.fields(ImageTransform)}
        absent = [key for key in ("max_image_size", "min_image_size", "image_stride") if values[key] is None]
        if absent:
            raise CheckpointError(f"{stated.sources[0].label} does not say {', '.join(absent)}; add it")
        return ImageTransform(**{key: value[0] for key, value in values.items() if value is not None})

    def _fitted(self, name: str, config: BagelConfig) -> ImageTransform:
        """Return the released rule, cut down to what the model's own stride and position table take."""
        rule: ImageTransform = getattr(BAGEL_7B, name)
        if name == "vae_image_transform":
            stride, side = config.latent_downsample, config.max_latent_size
        elif config.vit_config is not None:
            stride, side = config.vit_config.patch_size, config.vit_max_num_patch_per_side
        else:
            return rule
        limit = max(rule.max_image_size // stride, 1) * stride
        if not config.interpolate_pos:
            limit = min(limit, side * stride)
        fitted = dataclasses.replace(
            rule, max_image_size=limit, min_image_size=min(rule.min_image_size, limit), image_stride=stride
        )
        if fitted != rule:
            self.notes.append(
                f"no config.json says {name}: the released rule is cut down to sides of {fitted.min_image_size} to "
                f"{limit} pixels in steps of {stride}, so that images fit this model"
            )
        return fitted

    def _note(self, name: str, said: tuple[Any, str], actual: Any) -> None:
        self.notes.append(f"{said[1]} says {name} {said[0]}, the weights hold {actual}: the weights are right")

    @staticmethod
    def _default(said: tuple[T, str] | None, default: T) -> T:
        return default if said is None else said[0]

    @staticmethod
    def _needed(name: str, said: tuple[T, str] | None, default: T, released: bool, file: str) -> T:
        if said is not None:
            return said[0]
        if released:
            return default
        raise CheckpointError(
            f"no file says {name}, and these are not the released 7B's sizes: add {file} with it to the folder, "
            "or name a folder that has it with base=..."
        )


def _has_released_sizes(config: BagelConfig) -> bool:
    """Whether the weights, as far as there are any of a part, have the sizes of the released 7B."""

    def sizes(part: object, *names: str) -> list[object]:
        return [getattr(part, name) for name in names]

    layers = ("hidden_size", "intermediate_size", "num_hidden_layers")
    same = sizes(config.llm_config, *layers, "vocab_size") == sizes(BAGEL_7B.llm_config, *layers, "vocab_size")
    if config.vit_config is not None:
        same &= sizes(config.vit_config, *layers, "patch_size") == sizes(BAGEL_7B.vit_config, *layers, "patch_size")
        same &= config.vit_max_num_patch_per_side == BAGEL_7B.vit_max_num_patch_per_side
    if config.visual_gen:
        same &= config.max_latent_size == BAGEL_7B.max_latent_size
    return same
