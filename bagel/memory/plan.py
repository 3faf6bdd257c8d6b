"""What a limit of memory means, told before anything is loaded: what stays on the device, and what arrives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bagel.memory.choice import chosen, nbytes, needs
from bagel.memory.errors import NotEnoughMemoryError
from bagel.memory.placement import SLACK, experts_of, guests_of, weight_bytes
from bagel.memory.sizes import GIB, said
from bagel.memory.work import Request, Work
from bagel.modeling import Bagel
from bagel.modeling.linear import formats_of
from bagel.vae import Autoencoder

BUS = 25e9
"""Bytes a second that a GPU gets from page-locked memory over sixteen lanes of PCIe 4; twice that with PCIe 5."""


@dataclass(frozen=True)
class Plan:
    """How a model stands within a limit.

    Attributes:
        limit: bytes.
        drawing: bytes of both experts that stay while an image is drawn, and of those that arrive for each evaluation;
            None where it does not fit.
        writing: the same of the und expert and the head, for each token of a text.
    """

    limit: int
    drawing: tuple[int, int] | None
    writing: tuple[int, int] | None

    def sentence(self) -> str:
        """Say what was chosen and what it costs."""
        size = said(self.limit)
        if self.drawing is None and self.writing is None:
            return f"{size}: too little for this model"
        parts = []
        for found, what, each in ((self.drawing, "images", "evaluation"), (self.writing, "texts", "token")):
            if found is None:
                parts.append(f"{what}: do not fit")
            elif found[1]:
                parts.append(
                    f"{what}: {said(found[0])} of the experts stay, {said(found[1])} arrive for each "
                    f"{each}, in {found[1] / BUS:.2f} s at {BUS / 1e9:.0f} GB/s, while others compute"
                )
            else:
                parts.append(f"{what}: all they need stays")
        return f"{size}: " + "; ".join(parts)


class Planner:
    """Plans for a model, which may be on the meta device.

    Args:
        model: its sizes count, not its values.
        vae: its autoencoder.
        device: where it computes; beside a GPU the table of embeddings stays on the host.
    """

    def __init__(self, model: Bagel, vae: Autoencoder | None, device: torch.device) -> None:
        self.layers, self.guests = experts_of(model), guests_of(model, vae)
        self.head = self.guests.get(model.decoder.lm_head) if model.decoder.lm_head is not None else None
        self.painter = 0 if vae is None else self.guests[vae].nbytes
        self.work, self.config = Work(model.config, model.dtype), model.config
        on_gpu = device.type == "cuda"
        self.slack = SLACK if on_gpu else 0
        table = model.decoder.embed_tokens.weight.nbytes if on_gpu and self.head is not None else 0
        moving = [unit for unit in itertools.chain(*self.layers) if unit is not None]
        self.fixed = weight_bytes(model, vae) - table - nbytes([*moving, *self.guests.values()])

    def plan(self, limit: int, request: Request | None = None) -> Plan:
        """Return the plan for a limit in bytes."""
        request = request or Request()
        return Plan(limit, self._drawing(limit, request), self._writing(limit, request))

    def least(self, request: Request | None = None) -> int:
        """Return the smallest limit, to a quarter of a GiB, within which a request can be drawn or answered."""
        steps = range(1, 4 * 256)
        for step in steps:
            found = self.plan(step * GIB // 4, request)
            if found.writing is not None and (found.drawing is not None or not self.config.visual_gen):
                return found.limit
        raise NotEnoughMemoryError("no GPU has memory enough for this request")

    def _drawing(self, limit: int, request: Request) -> tuple[int, int] | None:
        if not self.config.visual_gen:
            return None
        free = limit - self.slack - self.fixed
        if self.painter + self.work.finishing(request) > free:
            return None
        room = free - self.work.drawing(request)
        return _split([unit for experts in self.layers for unit in needs(experts, 1)], room)

    def _writing(self, limit: int, request: Request) -> tuple[int, int] | None:
        head = 0 if self.head is None else self.head.nbytes
        room = limit - self.slack - self.fixed - self.work.writing(request) - head
        found = _split([experts[0] for experts in self.layers], room)
        return None if found is None else (found[0] + head, found[1])


def describe(model: Bagel, vae: Autoencoder | None) -> str:
    """Return a sentence about where the weights of a loaded model are, and what it costs if they do not all stay."""
    supply = model.decoder.supply
    if supply is None:
        return f"all weights stay on {model.device}"
    planner = Planner(model, vae, model.device)
    planner.slack = supply.slack
    return planner.plan(supply.limit).sentence()


def size_of(model: Bagel, vae: Autoencoder | None) -> str:
    """Return the size of a model's weights and how they are stored: "9.0 GiB of weights in bfloat16 and nf4", say."""
    types = [str(model.dtype).removeprefix("torch."), *formats_of(model)]
    return f"{said(weight_bytes(model, vae))} of weights in {' and '.join(types)}"


def _split(order: Sequence, room: int) -> tuple[int, int] | None:
    found = chosen(order, room)
    return None if found is None else (nbytes(found[0]), nbytes(order) - nbytes(found[0]))
