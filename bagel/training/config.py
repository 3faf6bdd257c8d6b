"""How to train: one frozen dataclass, read from JSON as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

PARTS = ("und", "gen", "vit", "connector")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Args:
        steps: optimizer steps of the whole run.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: "constant" or "cosine" after the warm-up.
        min_lr: what "cosine" ends at, as a fraction of `lr`.
        optimizer: "adamw", or "muon" for the matrices of the layers, see `bagel.training.optimiser`.
        betas, eps: of AdamW.
        weight_decay: of both.
        clip_norm: largest norm of the gradient; 0 does not clip.
        batches: packed batches of one step, over all processes; more than there are processes accumulates gradients.
        ce_weight, mse_weight: of the two losses.
        ema_decay: of the exponential moving average of the weights.
        ema_warmup: let the average forget faster at first, by the decay (1 + step) / (10 + step) while that is smaller.
        freeze: parts that are not trained, of "und", "gen", "vit", "connector".
        attention: "dense" or "flex", see `bagel.training.masks`.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        activation_checkpointing: compute each layer again for its gradient instead of keeping it.
        compile: compile the experts of the decoder.
        seed: of the noise.
        workers: processes that make batches ahead; 0 makes them in between.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep: checkpoints kept, the newest.
        log_every: steps between lines of the log.
    """

    steps: int
    lr: float = 1e-4
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batches: int = 1
    ce_weight: float = 1.0
    mse_weight: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    freeze: tuple[str, ...] = ()
    attention: Literal["dense", "flex"] = "dense"
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 0
    keep: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        choices = {"schedule": ("constant", "cosine"), "attention": ("dense", "flex")}
        choices |= {"precision": ("float32", "bfloat16"), "optimizer": ("adamw", "muon")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("steps", "batches", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = [part for part in self.freeze if part not in PARTS]
        if unknown:
            raise ValueError(f"freeze takes {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a JSON object.

        Raises:
            ValueError: a name that is no setting, or a value that is not allowed.
        """
        known = {f.name for f in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown or "steps" not in values:
            raise ValueError(f"training settings need steps and take {', '.join(sorted(known))}; got {sorted(values)}")
        tuples = {name: tuple(values[name]) for name in ("betas", "freeze") if name in values}
        return cls(**{**values, **tuples})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.lr * (self.min_lr + (1 - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def ema_decay_at(self, step: int) -> float:
        """Return the decay of the average after a step, counted from 0."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay
