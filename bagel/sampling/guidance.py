"""Classifier-free guidance (arXiv 2207.12598) over text and images, with renormalisation, and the velocity it makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bagel.parameters import Parameters, described, option
from bagel.sampling.flow import checked
from bagel.sampling.taylorseer import CacheState, Caching

BRANCHES = ("full", "text_dropped", "image_dropped")
"""The velocities that guidance may ask for: with everything, without the last text, without images."""


@runtime_checkable
class GuidanceRule(Protocol):
    """Whatever makes one velocity of the branches' velocities.

    An attribute `names`, which may be missing, lists all branches that it ever asks for.
    """

    def branches(self, t: float, /) -> tuple[str, ...]:
        """Return which of `BRANCHES` it needs at the shifted time t."""
        ...

    def __call__(self, velocities: Mapping[str, Tensor], t: float, /) -> Tensor:
        """Return the velocity (n, P) of one image from those of the branches, each (n, P) float32, by name."""
        ...


def _rising(name: str, pair: tuple[float, ...]) -> tuple[float, ...]:
    if len(pair) != 2 or not pair[0] <= pair[1]:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {pair!r}")
    return pair


@dataclass(frozen=True, kw_only=True)
class Guiding(Parameters):
    """The options of `Guidance`, under their official names."""

    cfg_text_scale: float = option(
        4.0, "how strongly to follow the text; 1 or less is no guidance at all", at_least=0, at_most=1e6, metavar="A"
    )
    cfg_img_scale: float = option(
        1.0,
        "how strongly to follow the input images; 1 or less leaves that step out",
        at_least=0,
        at_most=1e6,
        metavar="B",
    )
    cfg_interval: tuple[float, float] = option(
        (0.4, 1.0), "guidance acts at times low < t <= high, t from 1 to 0", metavar=("LOW", "HIGH"), check=_rising
    )
    cfg_renorm_type: Literal["global", "channel", "text_channel", "local"] = option(
        "global",
        "global keeps the norm of a whole image, channel that of each token, text_channel that of each token after the "
        "text step only; local is an alias of channel",
        metavar="TYPE",
        check=lambda _, kind: "channel" if kind == "local" else kind,
    )
    cfg_renorm_min: float = option(
        0.0, "the least factor of that renormalisation; 1 switches it off", at_least=0, at_most=1, metavar="M"
    )


@dataclass(frozen=True, kw_only=True)
class Guidance(Guiding):
    """How strongly an image follows its text and its input images; the names are the official ones.

    Args:
        cfg_text_scale: weight a of the text; 1 or less is no guidance at all.
        cfg_img_scale: weight b of the images; 1 or less leaves that step out.
        cfg_interval: (low, high): guidance acts where low < t <= high, t the shifted time.
        cfg_renorm_type: "global" keeps the norm of a whole image, "channel" that of each token, "text_channel" that
            of each token after the text step only. "local" is an alias of "channel".
        cfg_renorm_min: least factor of the renormalisation, in [0, 1]; 1 switches it off.

    Raises:
        TypeError: a value of another type, named.
        ValueError: a value out of its range, named.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The branches that are ever needed."""
        if self.cfg_text_scale <= 1:
            return BRANCHES[:1]
        return BRANCHES if self.cfg_img_scale > 1 else BRANCHES[:2]

    def branches(self, t: float, /) -> tuple[str, ...]:
        """Return the branches needed at the shifted time t, which is compared with the interval as float32."""
        now, low, high = torch.tensor((t, *self.cfg_interval), dtype=torch.float32, device="cpu").tolist()
        return self.names if low < now <= high else BRANCHES[:1]

    def __call__(self, velocities: Mapping[str, Tensor], t: float, /) -> Tensor:
        """Return the guided velocity (n, P) of one image; that of the full branch where it stands alone."""
        v, v_text, v_img = velocities["full"], velocities.get("text_dropped"), velocities.get("image_dropped")
        if v_text is None:
            return v
        w = v_text + self.cfg_text_scale * (v - v_text)
        if self.cfg_renorm_type == "text_channel":
            w = w * self._factor(v, w)
        if v_img is not None and self.cfg_text_scale > 1 and self.cfg_img_scale > 1:
            w = v_img + self.cfg_img_scale * (w - v_img)
        return w if self.cfg_renorm_type == "text_channel" else w * self._factor(v, w)

    def _factor(self, v: Tensor, w: Tensor) -> Tensor:
        """Return what brings w to the norm of v, at most 1: one number, or one per token (n, 1)."""
        if self.cfg_renorm_type == "global":
            ratio = v.norm() / (w.norm() + 1e-8)
        else:
            ratio = v.norm(dim=-1, keepdim=True) / (w.norm(dim=-1, keepdim=True) + 1e-8)
        return ratio.clamp(min=self.cfg_renorm_min, max=1.0)


def branch_names(rule: GuidanceRule) -> tuple[str, ...]:
    """Return the branches that a rule may ask for: those it names, or all."""
    return getattr(rule, "names", BRANCHES)


States = Callable[[Tensor, float, tuple[int, ...]], Sequence[Tensor]]
"""(x (N, P) of all images, shifted time, branches to compute) -> last-layer state (n, H) of each branch."""


@dataclass(frozen=True)
class GuidedVelocity:
    """The velocity of all images after guidance, as a function of x and the time; lives for one generation.

    Args:
        states: the model, as a callable.
        head: maps a last-layer state (n, H) to a velocity (n, P) float32.
        sizes: tokens of each image.
        branches: per image the index of each branch, by its name; two names may share one where their contexts are
            the same.
        guidance: makes one velocity of the branches', image by image.
        caching: predicts some evaluations instead of computing them.
    """

    states: States
    head: Callable[[Tensor], Tensor]
    sizes: Sequence[int]
    branches: Sequence[Mapping[str, int]]
    guidance: GuidanceRule
    caching: Caching | None = None
    cached: dict[int, CacheState] = field(default_factory=dict, init=False)

    def __call__(self, x: Tensor, t: float, /) -> Tensor:
        """Return the velocity (N, P) of all images at x (N, P) and the shifted time t.

        Raises:
            ValueError: the guidance asks for a branch that there is not.
            TypeError: the guidance returns something else than a velocity.
        """
        names = self.guidance.branches(t)
        if not names or not (
            isinstance(names, tuple) or (isinstance(names, Collection) and not isinstance(names, str))
        ):
            raise TypeError(f"branches() of the guidance must return names of branches, got {described(names)}")
        if missing := [name for name in names if any(name not in own for own in self.branches)]:
            raise ValueError(f"the guidance asks for the branch {missing[0]!r}; there is {', '.join(self.branches[0])}")
        needed = tuple(dict.fromkeys(own[name] for own in self.branches for name in names))
        states = self.states(x, t, needed) if self.caching is None else self._cached(self.caching, x, t, needed)
        velocity = {branch: self.head(state) for branch, state in zip(needed, states, strict=True)}
        guided = []
        for own, latents in zip(self.branches, x.split(list(self.sizes)), strict=True):
            v = self.guidance({name: velocity[own[name]] for name in names}, t)
            guided.append(checked("the guidance", v, like=latents))
        return guided[0] if len(guided) == 1 else torch.cat(guided)

    def _cached(self, caching: Caching, x: Tensor, t: float, needed: tuple[int, ...]) -> list[Tensor]:
        """Return the last-layer state of each needed branch, computed or predicted."""
        for branch in needed:
            if branch not in self.cached:
                self.cached[branch] = caching.start()
                if not isinstance(state := self.cached[branch], CacheState):
                    wanted = "an object with due, record and predict"
                    raise TypeError(f"start() of the caching must return {wanted}, got {described(state)}")
        due = tuple(branch for branch in needed if self.cached[branch].due)
        found = {branch: self.cached[branch].predict() for branch in needed if branch not in due}
        if wrong := [value for value in found.values() if not isinstance(value, Tensor)]:
            raise TypeError(f"predict() of the caching must return a tensor, got {described(wrong[0])}")
        for branch, state in zip(due, self.states(x, t, due) if due else [], strict=True):
            self.cached[branch].record(state)
            found[branch] = state
        return [found[branch] for branch in needed]
