"""Weights that come and go together: where they are kept, and the modules that are given them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST = 64 * 2**10
"""Bytes of the smallest tensor that is worth moving; smaller ones (norms, biases) stay on the device."""
READ_BYTES = 64 * 2**20
"""Most bytes of a file that are read at once."""
ALIGNMENT = 512
"""Bytes to whose multiples tensors begin within a slot, as those of torch's own allocator do."""


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter as a file holds them: `read(first, last)` returns some, on the host, in any type."""

    start: int
    rows: int
    read: Callable[[int, int], Tensor]


@dataclass
class Part:
    """One tensor of a unit.

    Args:
        owner: the module that holds it.
        leaf: its name there.
        home: the values, in the host's memory; without values (meta) where they are read from files every time.
        start: its first byte within a slot.
        pieces: what is read from files.
    """

    owner: nn.Module
    leaf: str
    home: Tensor
    start: int
    pieces: Sequence[Piece] = ()

    def view(self, memory: Tensor) -> Tensor:
        """Return the tensor's place within a slot (nbytes,) uint8, laid out as at home."""
        flat = memory[self.start : self.start + self.home.nbytes].view(self.home.dtype)
        return flat.as_strided(self.home.shape, self.home.stride())

    def fill(self, memory: Tensor) -> None:
        """Copy the values into a slot."""
        place = self.view(memory)
        if not self.pieces:
            place.copy_(self.home, non_blocking=place.is_cuda)
        for piece in self.pieces:
            step = max(1, READ_BYTES * self.home.shape[0] // max(self.home.nbytes, 1))
            for first in range(0, piece.rows, step):
                rows = place[piece.start + first : piece.start + min(first + step, piece.rows)]
                found = piece.read(first, first + rows.shape[0])
                if place.is_cuda:  # through page-locked memory, which torch keeps until the copy is done
                    found = torch.empty_like(found, dtype=place.dtype, pin_memory=True).copy_(found)
                rows.copy_(found, non_blocking=place.is_cuda)

    def set(self, tensor: Tensor) -> None:
        """Let the module use a tensor."""
        parameter = self.owner._parameters.get(self.leaf)
        if parameter is None:
            self.owner._buffers[self.leaf] = tensor
        elif parameter.is_meta or tensor.is_meta:  # one without values cannot be given some
            self.owner._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            parameter.data = tensor


Pieces = Mapping[tuple[nn.Module, str], Sequence[Piece]]


class Unit:
    """The large tensors of some modules, which stand in the host's memory and are placed on a device when needed.

    Args:
        name: for messages.
        modules: whose tensors they are; on the host, or on the meta device if they are to be read from files.
        pieces: where the parameters are in files, by module and name there.
        smallest: bytes of the smallest tensor that belongs to the unit.
    """

    def __init__(
        self, name: str, modules: Iterable[nn.Module], *, pieces: Pieces | None = None, smallest: int = SMALLEST
    ) -> None:
        self.name = name
        self.parts: list[Part] = []
        self.nbytes = 0
        for module in modules:
            for owner in module.modules():
                held = [*owner._parameters.items(), *owner._buffers.items()]
                for leaf, tensor in held:
                    if tensor is not None and tensor.nbytes >= smallest:
                        found = (pieces or {}).get((owner, leaf), ())
                        self.parts.append(Part(owner, leaf, tensor.detach(), self.nbytes, found))
                        self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def fill(self, memory: Tensor) -> None:
        """Copy all values into a slot (nbytes,) uint8; on a GPU in the current stream, without waiting."""
        with torch.no_grad():
            for part in self.parts:
                part.fill(memory)

    def place(self, memory: Tensor | None) -> None:
        """Let the modules use a slot, or again what is on the host."""
        with torch.inference_mode(False):  # views of inference mode could never be changed outside of it
            for part in self.parts:
                part.set(part.home if memory is None else part.view(memory))
