"""One process or many: where this one stands, and tensors that are sharded over all of them (FSDP2)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

AFTERWARDS = 0.5
"""Seconds for the threads of a process group to let go of their last call."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the entries of every process, on every process."""
        if self.size == 1:
            return dict(value)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, dict(value))
        return {key: entry for part in parts for key, entry in part.items()}

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Shard a module's parameters over all processes, each layer gathered when it is needed."""
        if self.mesh is None:
            return
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(root, mesh=self.mesh)


def join(device: torch.device | str | None = None) -> World:
    """Return the world that `torchrun` describes in the environment, or one process alone.

    Args:
        device: "cpu" or "cuda"; by default a GPU where there is one.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(kind)
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return World(kind, dist.get_rank(), size, init_device_mesh(kind.type, (size,)))


def leave() -> None:
    """Close what `join` opened, once every process is here; does nothing for one process alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # Threads of gloo live on while anything, such as FSDP's garbage, still knows the group. What they let go of
        # after a collective call needs the interpreter: one that comes when it is ending aborts the process.
        time.sleep(AFTERWARDS)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every process must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, which every process holds whole, on the device of `tensor` and sharded as it is."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def rejoined(tensor: Tensor, part: Tensor) -> Tensor:
    """Return the tensor, sharded as `tensor` is, of which `part` is this process's part."""
    if not isinstance(tensor, DTensor):
        return part
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
