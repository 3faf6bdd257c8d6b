"""Checkpoint folders made from the small reference one, for the tests of `bagel.checkpoint`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import REFERENCE
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel.checkpoint import Checkpoint
from bagel.modeling import Bagel
from bagel.vae import Autoencoder

TINY = REFERENCE / "tiny" / "checkpoint"
MOE = REFERENCE / "variant_moe" / "checkpoint"
Tensors = dict[str, Tensor]


def weights_of(source: Path = TINY, name: str = "ema") -> Tensors:
    """All tensors of a reference file."""
    return load_file(str(source / f"{name}.safetensors"))


def make_folder(
    folder: Path,
    *,
    source: Path = TINY,
    change: Callable[[Tensors], Tensors] | None = None,
    name: str | None = "ema.safetensors",
    without: tuple[str, ...] = (),
) -> Path:
    """Copy a reference checkpoint, its weights changed and renamed (name None: left out), some files left out."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "ema.safetensors" and file.name not in without:
            shutil.copy(file, folder / file.name)
    if name is not None:
        tensors = weights_of(source)
        save_file(change(tensors) if change else tensors, folder / name, {"format": "pt"})
    return folder


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def without_keys(*parts: str) -> Callable[[Tensors], Tensors]:
    """Drop all tensors whose key holds one of the parts."""
    return lambda tensors: {key: t for key, t in tensors.items() if not any(part in key for part in parts)}


def without_gen(tensors: Tensors) -> Tensors:
    """Keep what an understanding-only run stores."""
    return without_keys("_moe_gen", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed")(tensors)


def without_vision(tensors: Tensors) -> Tensors:
    """Keep what a text-to-image-only run stores."""
    return without_keys("vit_model", "connector", "vit_pos_embed")(tensors)


def build(checkpoint: Checkpoint) -> tuple[Bagel, Autoencoder | None]:
    """Build the models of a checkpoint on the meta device."""
    config = checkpoint.config
    with torch.device("meta"):
        return Bagel(config), Autoencoder(config.vae_config) if config.vae_config else None


def load(checkpoint: Checkpoint, **options) -> tuple[Bagel, Autoencoder | None]:
    """Build and fill the models of a checkpoint."""
    model, vae = build(checkpoint)
    checkpoint.load(model, vae, **options)
    return model, vae


def open_and_load(folder: Path, **options) -> Bagel:
    """Open a folder and return its model."""
    return load(Checkpoint.open(folder, **options))[0]
