"""The autoencoder's sizes, read off its file, which comes without a configuration in the official layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorFiles
from bagel.checkpoint.sources.base import Source
from bagel.checkpoint.stated import Stated
from bagel.config import ConfigError, VAEConfig
from bagel.vae import Autoencoder

Shapes = dict[str, tuple[int, ...]]


def autoencoder_shapes(config: VAEConfig) -> Shapes:
    """Return every key and shape of `ae.safetensors`; nothing is allocated."""
    with torch.device("meta"):
        vae = Autoencoder(config)
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def resolve_vae_config(weights: TensorFiles, stated: Stated) -> tuple[VAEConfig, tuple[str, ...]]:
    """Return the configuration of an autoencoder file and notes on what its `vae_config` says otherwise.

    The sizes are those that explain more of the file's tensors: read off the tensors, or as `vae_config` states them.
    Scale and shift are stated or FLUX.1's. Raises CheckpointError for tensors that are missing, unknown or misshapen.
    """
    shapes = weights.shapes
    candidates = [config for config in (_from_shapes(shapes), _from_json(stated)) if config is not None]
    if not candidates:
        raise CheckpointError(f"{weights.files[0]} is not an autoencoder file: its encoder's first layers are missing")
    wanted = [_wanted(config, weights) for config in candidates]
    misfits = [sum(shapes.get(key) != shape for key, shape in want.items()) for want in wanted]
    best = misfits.index(min(misfits))
    check_shapes(weights, wanted[best])
    config = candidates[best]
    for field in ("scale_factor", "shift_factor"):
        said = stated.number(field, positive=field == "scale_factor")  # latents may lie on either side of zero
        if said is not None:
            config = dataclasses.replace(config, **{field: said[0]})
    return config, _disagreements(config, stated)


def _wanted(config: VAEConfig, weights: TensorFiles) -> Shapes:
    try:
        return autoencoder_shapes(config)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:  # torch has several for what is too large
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{weights.files[0]}, or what is said of it, has sizes that no autoencoder has: {reason}"
        ) from error


def check_shapes(weights: TensorFiles | Source, wanted: Shapes, hint: str = "") -> None:
    """Raise one CheckpointError for keys that are missing, unknown or of the wrong shape or dtype."""
    where = weights.files[0] if len(weights.files) == 1 else weights.files[0].parent / weights.label
    problems = [
        f"{where} lacks {key}, wanted with shape {_s(wanted[key])}" for key in wanted if key not in weights.entries
    ]
    for key, entry in weights.entries.items():
        if key not in wanted:
            problems.append(f"{entry.file} holds {key} {_s(entry.shape)}, which the model does not know")
        elif entry.shape != wanted[key]:
            problems.append(f"{entry.file} holds {key} with shape {_s(entry.shape)}, wanted {_s(wanted[key])}")
        elif entry.dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{entry.file} holds {key} as {entry.dtype}, wanted floating point (F32, BF16 or F16)")
    if problems:
        more = f"; and {len(problems) - 5} more tensors do not fit" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more + (f". {hint}" if hint else ""))


def _s(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _from_shapes(shapes: Shapes) -> VAEConfig | None:
    def size(key: str, axis: int = 0) -> int:
        return shapes[key][axis]

    def count(pattern: str) -> int:
        number = 0
        while pattern.format(number) in shapes:
            number += 1
        return number

    try:
        base = size("encoder.conv_in.weight")
        levels = count("encoder.down.{}.block.0.conv1.weight")
        mult = tuple(size(f"encoder.down.{level}.block.0.conv1.weight") // base for level in range(levels))
        return VAEConfig(
            in_channels=size("encoder.conv_in.weight", 1),
            out_ch=size("decoder.conv_out.weight"),
            ch=base,
            ch_mult=mult,
            num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
            z_channels=size("decoder.conv_in.weight", 1),
        )
    except (KeyError, IndexError, ZeroDivisionError, ConfigError):
        return None


def _from_json(stated: Stated) -> VAEConfig | None:
    values: dict[str, Any] = {}
    for field in ("in_channels", "out_ch", "ch", "num_res_blocks", "z_channels"):
        said = stated.integer(field)
        if said is None:
            return None
        values[field] = said[0]
    said = stated.get("ch_mult")
    if said is None:
        return None
    mult, label = said
    if not isinstance(mult, list) or not mult or not all(isinstance(m, int) and m > 0 for m in mult):
        raise CheckpointError(f"{label}: ch_mult must be a list of positive whole numbers, got {mult!r}")
    return VAEConfig(ch_mult=tuple(mult), **values)


def _disagreements(config: VAEConfig, stated: Stated) -> tuple[str, ...]:
    notes = []
    for field in ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels"):
        said, value = stated.get(field), getattr(config, field)
        value = list(value) if isinstance(value, tuple) else value
        if said is not None and said[0] != value:
            notes.append(f"{said[1]} says {field} {said[0]}, the autoencoder's file holds {value}: the file is right")
    return tuple(notes)
