"""Guided velocities of several pictures: which branches each evaluation needs, computed together or predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bagel.sampling.guidance import Guidance, guide
from bagel.sampling.taylorseer import TaylorSeer

States = Callable[[list[Tensor], int, tuple[int, ...]], list[Tensor]]
"""(x of each picture, index of the evaluation, branches to compute) -> last-layer state (n, H) of each branch."""


@dataclass(frozen=True)
class PictureBranches:
    """Indices of one picture's guidance branches.

    Two may be the same branch where their contexts are the same; None where guidance never uses it.
    """

    full: int
    text_dropped: int | None = None
    image_dropped: int | None = None


class GuidedVelocity:
    """The velocity of every picture at every evaluation, after guidance; lives for one generation.

    Args:
        states: the model, as a callable.
        head: maps a last-layer state (n, H) to a velocity (n, P) float32.
        pictures: the branches of each picture.
        guidance: the same for all pictures.
        timesteps: from `flow_timesteps`.
        taylorseer: predict most evaluations instead of computing them.
    """

    def __init__(
        self,
        states: States,
        head: Callable[[Tensor], Tensor],
        pictures: Sequence[PictureBranches],
        *,
        guidance: Guidance,
        timesteps: Tensor,
        taylorseer: bool = False,
    ) -> None:
        self.states, self.head, self.guidance = states, head, guidance
        self.pictures = tuple(pictures)
        self.guided = guidance.active(timesteps)
        self.seers: dict[int, TaylorSeer] | None = {} if taylorseer else None

    def __call__(self, x: list[Tensor], index: int) -> list[Tensor]:
        """Return the velocity (n, P) of each picture at evaluation `index`."""
        guided = self.guided[index]
        needed = dict.fromkeys(branch for picture in self.pictures for branch in _branches(picture, guided))
        velocity = {branch: self.head(state) for branch, state in self._states(x, index, tuple(needed)).items()}
        out = []
        for picture in self.pictures:
            v = velocity[picture.full]
            if guided and picture.text_dropped is not None:
                dropped = picture.image_dropped
                v = guide(
                    v, velocity[picture.text_dropped], velocity[dropped] if dropped is not None else None, self.guidance
                )
            out.append(v)
        return out

    def _states(self, x: list[Tensor], index: int, needed: tuple[int, ...]) -> dict[int, Tensor]:
        if self.seers is None:
            return dict(zip(needed, self.states(x, index, needed), strict=True))
        seers = {branch: self.seers.setdefault(branch, TaylorSeer()) for branch in needed}
        due = tuple(branch for branch in needed if seers[branch].due)
        found = {branch: seers[branch].predict() for branch in needed if branch not in due}
        for branch, state in zip(due, self.states(x, index, due) if due else [], strict=True):
            seers[branch].record(state)
            found[branch] = state
        return found


def _branches(picture: PictureBranches, guided: bool) -> list[int]:
    every = (picture.full, picture.text_dropped, picture.image_dropped) if guided else (picture.full,)
    return [branch for branch in every if branch is not None]
