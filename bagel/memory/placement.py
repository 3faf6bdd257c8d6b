"""A model and its autoencoder put on a device within a limit: what stays there, what comes and goes, what stays behind.

Three things stay behind on the host or come when they are needed: the table of embeddings, of which a text needs a few
rows; guests (the head, the vision encoder, the autoencoder), each used by itself; and the experts' large matrices, see
`bagel.memory.supply`. All else is small and always on the device.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bagel.memory.choice import Experts
from bagel.memory.host import lock_pages, unlock_pages
from bagel.memory.movers import FileMover
from bagel.memory.supply import Supply
from bagel.memory.units import SMALLEST, Pieces, Unit
from bagel.memory.work import Work
from bagel.modeling import Bagel
from bagel.vae import Autoencoder

SLACK = 384 * 2**20
"""Bytes of a GPU left free for what torch's allocator cannot use between its blocks."""

PROCESS = 2**30
"""Bytes that a process takes beside weights on a CPU: Python, torch, pages of files."""


def left_in_files(model: Bagel, dtype: torch.dtype, *, smallest: int = SMALLEST) -> list[str]:
    """Return the names of the parameters that may be read from files each time: the experts' matrices and the head.

    Args:
        model: on the meta device.
        dtype: in which it will be loaded.
        smallest: bytes of the smallest of them.
    """
    head = "decoder.lm_head.weight"
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() * dtype.itemsize >= smallest and (name.startswith("decoder.layers.") or name == head)
    ]


def experts_of(model: Bagel, *, pieces: Pieces | None = None, smallest: int = SMALLEST) -> list[Experts]:
    """Return the units of every decoder layer."""
    found = []
    layer: Any
    for index, layer in enumerate(model.decoder.layers):
        und, gen = (
            None if expert is None else Unit(f"{name} of layer {index}", [expert], pieces=pieces, smallest=smallest)
            for name, expert in (("und expert", layer.und), ("gen expert", layer.gen))
        )
        found.append((und, gen))
    return found


def guests_of(
    model: Bagel, vae: Autoencoder | None, *, pieces: Pieces | None = None, smallest: int = SMALLEST
) -> dict[nn.Module, Unit]:
    """Return the units that are needed now and then, by their modules."""
    modules: dict[str, Any] = {"head": model.decoder.lm_head, "vision encoder": getattr(model, "vit", None)}
    modules["autoencoder"] = vae
    return {
        module: Unit(name, [module], pieces=pieces, smallest=smallest)
        for name, module in modules.items()
        if module is not None
    }


def tensors_of(*modules: nn.Module | None) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every tensor of modules once, with the module that holds it and its name there."""
    for module in modules:
        for owner in module.modules() if module is not None else ():
            for leaf, tensor in itertools.chain(owner._parameters.items(), owner._buffers.items()):
                if tensor is not None:
                    yield owner, leaf, tensor


def weight_bytes(model: Bagel, vae: Autoencoder | None) -> int:
    """Return the bytes of all weights."""
    return sum({id(tensor): tensor.nbytes for _, _, tensor in tensors_of(model, vae)}.values())


def place(
    model: Bagel,
    vae: Autoencoder | None,
    device: torch.device,
    *,
    limit: int,
    pieces: Pieces | None = None,
    smallest: int = SMALLEST,
) -> Supply:
    """Put a model that is in the host's memory on a device within a limit, and return what supplies it with weights.

    Args:
        model: complete, on the host; it computes on the device from now on.
        vae: its autoencoder, likewise.
        device: a CUDA GPU, or the host itself.
        limit: bytes.
        pieces: parameters that are read from files whenever they are needed, and are on the meta device; see `Unit`.
        smallest: bytes of the smallest tensor that does not stay on the device for good.
    """
    if vae is not None and device.type == "cuda":  # laid out as the GPU's convolutions like it
        vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    layers = experts_of(model, pieces=pieces, smallest=smallest)
    guests = guests_of(model, vae, pieces=pieces, smallest=smallest)
    if device.type == "cpu" and pieces:  # what is in memory already need not be copied within it
        guests = {module: unit for module, unit in guests.items() if any(part.pieces for part in unit.parts)}
    units = [unit for unit in (*itertools.chain(*layers), *guests.values()) if unit is not None]
    moving = {(id(part.owner), part.leaf) for unit in units for part in unit.parts}
    head = model.decoder.lm_head
    if device.type == "cuda" and head is not None:
        moving.add((id(model.decoder.embed_tokens), "weight"))
    fixed = 0
    for owner, leaf, tensor in tensors_of(model, vae):
        if (id(owner), leaf) not in moving:
            fixed += tensor.nbytes
            if leaf in owner._parameters:
                tensor.data = tensor.data.to(device)
            else:
                owner._buffers[leaf] = tensor.to(device)
    work = Work(model.config, model.dtype)
    slack = SLACK if device.type == "cuda" else min(PROCESS, limit // 10) if pieces else 0
    supply = Supply(device, layers, guests, limit=limit, fixed=fixed, work=work, slack=slack)
    if device.type == "cuda" and pieces:
        supply.mover = FileMover(device)
    model.decoder.supply = supply
    if device.type == "cuda":
        homes = [part.home for unit in units for part in unit.parts if not part.pieces]
        homes += [] if head is None else [model.decoder.embed_tokens.weight.detach()]
        weakref.finalize(supply, unlock_pages, lock_pages(homes), homes)
    watch(supply, model, vae)
    return supply


def take_home(model: Bagel) -> None:
    """Have all weights of a model where they are kept, so that they can be exported.

    Raises:
        ValueError: some are kept in files alone.
    """
    if model.decoder.supply is not None:
        model.decoder.supply.release()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("this model reads its weights from its files: copy those, or use `bagel convert`")


def watch(supply: Supply, model: Bagel, vae: Autoencoder | None) -> None:
    """Have the vision encoder and the autoencoder brought whenever they are called, and stay until they are done."""
    if hasattr(model, "vit"):
        _watch(supply, model.vit, model.vit, lambda x: supply.work.seeing(x))
    if vae is not None:
        _watch(supply, vae.encoder, vae, lambda x: supply.work.encoding(x))
        _watch(supply, vae.decoder, vae, lambda x: supply.work.decoding(x))


def _watch(supply: Supply, module: nn.Module, guest: nn.Module, work: Callable[[Tensor], int]) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def run(x: Tensor, *rest: Any) -> Any:
        with supply.using(guest, work(x)):
            return forward(x, *rest)

    module.forward = run
