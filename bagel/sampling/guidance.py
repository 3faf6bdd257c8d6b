"""Classifier-free guidance (arXiv 2207.12598) over text and pictures, with renormalisation, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RENORM_TYPES = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its text and its pictures; the names are the official ones.

    Args:
        cfg_text_scale: weight a of the text; 1 or less is no guidance at all.
        cfg_img_scale: weight b of the pictures; 1 or less leaves that step out.
        cfg_interval: (low, high): guidance acts where low < t <= high, t the shifted time.
        cfg_renorm_type: "global" keeps the norm of a whole picture, "channel" that of each token, "text_channel" that
            of each token after the text step only. "local" is an alias of "channel".
        cfg_renorm_min: least factor of the renormalisation, in [0, 1]; 1 switches it off.

    Raises:
        ValueError: a value out of its range, named.
    """

    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: str = "global"
    cfg_renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.cfg_renorm_type == "local":
            object.__setattr__(self, "cfg_renorm_type", "channel")
        if self.cfg_renorm_type not in RENORM_TYPES:
            raise ValueError(
                f"cfg_renorm_type must be one of {', '.join(RENORM_TYPES)} or local, got {self.cfg_renorm_type!r}"
            )
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min must lie in [0, 1], got {self.cfg_renorm_min}")
        for name in ("cfg_text_scale", "cfg_img_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        interval = tuple(self.cfg_interval)
        if len(interval) != 2 or not interval[0] <= interval[1]:
            raise ValueError(f"cfg_interval must be a pair (low, high) with low <= high, got {self.cfg_interval!r}")

    @property
    def uses_text(self) -> bool:
        """Whether the text-dropped branch is ever needed."""
        return self.cfg_text_scale > 1

    @property
    def uses_image(self) -> bool:
        """Whether the image-dropped branch is ever needed."""
        return self.uses_text and self.cfg_img_scale > 1

    def active(self, timesteps: Tensor) -> list[bool]:
        """Return for each time (N,) float32 whether guidance acts there, all compared as float32."""
        low, high = torch.tensor(self.cfg_interval, dtype=torch.float32)
        inside = (timesteps > low) & (timesteps <= high)
        return [self.uses_text and bool(x) for x in inside]


def guide(v: Tensor, v_text: Tensor, v_img: Tensor | None, guidance: Guidance) -> Tensor:
    """Combine the velocities of one picture, each (n, P) float32.

    Args:
        v: with everything.
        v_text: with the text dropped.
        v_img: with the pictures dropped; None where that branch is not used.
        guidance: scales and renormalisation; the interval is the caller's to check.
    """
    w = v_text + guidance.cfg_text_scale * (v - v_text)
    if guidance.cfg_renorm_type == "text_channel":
        w = w * _factor(v, w, guidance.cfg_renorm_min, per_token=True)
    if v_img is not None and guidance.uses_image:
        w = v_img + guidance.cfg_img_scale * (w - v_img)
    if guidance.cfg_renorm_type == "text_channel":
        return w
    return w * _factor(v, w, guidance.cfg_renorm_min, per_token=guidance.cfg_renorm_type == "channel")


def _factor(v: Tensor, w: Tensor, least: float, *, per_token: bool) -> Tensor:
    if per_token:
        ratio = v.norm(dim=-1, keepdim=True) / (w.norm(dim=-1, keepdim=True) + 1e-8)
    else:
        ratio = v.norm() / (w.norm() + 1e-8)
    return ratio.clamp(min=least, max=1.0)
