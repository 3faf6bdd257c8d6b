"""Checkpoints of a run: the official layout, and beside it what resuming needs.

A folder `0001000` per saved step holds `ema.safetensors` and `model.safetensors` in float32, the configurations, the
tokenizer and `ae.safetensors`, so that it loads like any checkpoint; `train_state.safetensors` has the optimizer's
moments and `train_state.json` the step and where the data stand. The noise of a batch is drawn from the seed and the
batch's number, so there is no state of a generator to keep. A folder appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from bagel.checkpoint.export import official_tensors
from bagel.config import BagelConfig
from bagel.modeling import Bagel
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

STEP_FOLDER = re.compile(r"\d{7,}")
WEIGHTS, MOMENTS, STATE = "model.safetensors", "train_state.safetensors", "train_state.json"


@dataclass(frozen=True)
class Saved:
    """What a resumed run starts from.

    Args:
        weights: the model's state, and
        ema: its moving average, whole float32 tensors by name on the CPU.
        moments: of the optimizer: "exp_avg/NAME" and "exp_avg_sq/NAME".
        state: JSON values as they were given to `save`.
    """

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any]


def newest(out: Path) -> Path | None:
    """Return the folder of the last complete checkpoint of a run, if there is one."""
    found = _step_folders(out) if out.is_dir() else []
    return found[-1] if found else None


def clean(out: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in out.glob(".*.tmp"):
        shutil.rmtree(path)


def save(
    out: Path,
    saved: Saved,
    *,
    config: BagelConfig,
    vae: Autoencoder | None,
    tokenizer: Tokenizer,
    keep: int,
) -> Path:
    """Write a checkpoint of step `saved.state["step"]` and remove all but the `keep` newest ones.

    Returns the folder.
    """

    def write(folder: Path) -> None:
        save_checkpoint(folder, _model(config, saved.ema), vae, config, tokenizer)
        weights = official_tensors(_model(config, saved.weights), config)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        save_file(saved.moments, folder / MOMENTS)
        (folder / STATE).write_text(json.dumps(saved.state), encoding="utf-8")

    return publish(out, saved.state["step"], write, keep=keep)


def publish(out: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Let `write` fill the folder of a step, which appears when it is complete; remove all but the `keep` newest.

    Returns the folder; one that is there already stays as it is.
    """
    folder = out / f"{step:07d}"
    if folder.exists():
        return folder
    temporary = out / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    os.replace(temporary, folder)
    _sync(out)
    for path in _step_folders(out)[:-keep]:
        gone = out / f".{path.name}.tmp"
        os.replace(path, gone)
        shutil.rmtree(gone)
    return folder


def _step_folders(out: Path) -> list[Path]:
    found = [path for path in out.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name))


def load(folder: Path) -> Saved:
    """Read a checkpoint of a run.

    Raises:
        CheckpointError: a folder without the files that resuming needs, or one that is damaged.
    """
    missing = [name for name in (WEIGHTS, MOMENTS, STATE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} cannot be resumed: it has no {', '.join(missing)}; it can still be loaded")
    return Saved(
        weights=read_weights(folder, WEIGHTS),
        ema=read_weights(folder, "ema.safetensors"),
        moments=load_file(folder / MOMENTS),
        state=json.loads((folder / STATE).read_text(encoding="utf-8")),
    )


def read_weights(folder: Path, name: str | None = None) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's file by the names of `Bagel`, in the dtype they are stored in."""
    checkpoint = Checkpoint.open(folder, weights=name)
    with torch.device("meta"):
        model = Bagel(checkpoint.config)
    checkpoint.load(model)
    return dict(model.state_dict())


def _model(config: BagelConfig, weights: Mapping[str, Tensor]) -> Bagel:
    with torch.device("meta"):
        model = Bagel(config)
    model.load_state_dict(weights, assign=True)
    return model


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
