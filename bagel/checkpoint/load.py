"""Weights from safetensors files into a model built on the meta device, a slice of a tensor at a time."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bagel.checkpoint.autoencoder import check_shapes
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorFiles, open_tensors, quoted
from bagel.checkpoint.free_memory import free_bytes
from bagel.checkpoint.keys import TABLE_PARAMETERS, Target, targets
from bagel.config import BagelConfig
from bagel.memory import is_out_of_memory

STEP_BYTES = 128 * 2**20
"""Most bytes read at once: bounds the temporary copy of a cast."""
REOPEN_BYTES = 512 * 2**20
"""Pages of a memory map count as this process's memory until it is closed, so it is closed this often."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    model: nn.Module, weights: TensorFiles, config: BagelConfig, *, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Fill `Bagel` from the official keys; see `Checkpoint.load`."""
    wanted = targets(config)
    _Loader(model, weights, wanted, device=device, dtype=dtype).run()


def load_autoencoder(vae: nn.Module, weights: TensorFiles, *, device: torch.device, dtype: torch.dtype | None) -> None:
    """Fill `Autoencoder`, whose parameters have the names of the file's keys."""
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    check_shapes(weights, shapes)
    wanted = {name: Target(name, 0, shape) for name, shape in shapes.items()}
    _Loader(vae, weights, wanted, device=device, dtype=dtype).run()


class _Loader:
    """One pass over a set of files; holds what is known about the destination meanwhile."""

    def __init__(
        self,
        module: nn.Module,
        weights: TensorFiles,
        wanted: dict[str, Target],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.module, self.weights, self.wanted, self.device = module, weights, wanted, device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, target in wanted.items():
            name, stored = target.parameter, DTYPES[weights.entries[key].dtype]
            self.shapes[name] = (target.start + target.shape[0], *target.shape[1:])
            if dtype is None or name in TABLE_PARAMETERS:
                self.dtypes[name] = torch.promote_types(self.dtypes.get(name, stored), stored)
            else:
                self.dtypes[name] = dtype
        self.filled: dict[str, Tensor] = {}
        self.extremes: list[tuple[str, Tensor]] = []

    def run(self) -> None:
        self._check_module()
        self._check_memory()
        for file in self.weights.files:
            keys = [key for key in self.wanted if self.weights.entries[key].file == file]
            self._read_file(file, keys)
        self._check_finite()
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        left = [name for name, tensor in tensors if tensor.is_meta]
        if left:
            raise CheckpointError(f"{type(self.module).__name__} has {quoted(left)}, which no checkpoint fills")

    def _check_module(self) -> None:
        held = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        wrong = [name for name in {**self.shapes, **held} if held.get(name) != self.shapes.get(name)]
        if wrong:
            raise CheckpointError(
                f"the model was built from another configuration than the checkpoint's: {quoted(wrong)} differ; "
                "build it from checkpoint.config"
            )

    def _check_memory(self) -> None:
        # A host that promises more than it has would otherwise end the process without a word.
        free = free_bytes(self.device)
        if free is not None and self._nbytes > free:
            raise self._too_large(f"{free / 2**30:.1f} GiB")

    @property
    def _nbytes(self) -> int:
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def _read_file(self, file: Path, keys: list[str]) -> None:
        reader = _Reader(self.weights, file)
        for key in sorted(keys, key=reader.place):
            self._read_tensor(reader, key)

    def _read_tensor(self, reader: _Reader, key: str) -> None:
        target, entry = self.wanted[key], self.weights.entries[key]
        whole = self._destination(target.parameter)
        rows = target.shape[0]
        step = max(1, rows * STEP_BYTES // max(entry.nbytes, 1))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = whole[target.start + first : target.start + last]
            part.copy_(reader.rows(key, first, last))
            # Least and greatest value are NaN or infinite if any value is; the host reads them once, at the end.
            self.extremes.append((key, torch.stack(torch.aminmax(part))))

    def _destination(self, name: str) -> Tensor:
        if name not in self.filled:
            try:
                tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name], device=self.device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self._too_large(str(error).partition("\n")[0]) from error
            self.filled[name] = _assign(self.module, name, tensor)
        return self.filled[name]

    def _too_large(self, free: str) -> MemoryError:
        return MemoryError(
            f"{type(self.module).__name__} takes {self._nbytes / 2**30:.1f} GiB, more than {self.device} has free "
            f"({free}); choose a narrower dtype or another device, or leave a half out with visual_gen=False or "
            "visual_und=False"
        )

    def _check_finite(self) -> None:
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for key, extremes in self.extremes:
            by_dtype.setdefault(extremes.dtype, []).append((key, extremes))
        bad: list[str] = []
        for found in by_dtype.values():
            finite = torch.stack([extremes for _, extremes in found]).isfinite().all(dim=1).tolist()
            bad += [key for (key, _), fine in zip(found, finite, strict=True) if not fine]
        if bad:
            keys = list(dict.fromkeys(bad))
            entry = self.weights.entries[keys[0]]
            dtype = str(self.dtypes[self.wanted[keys[0]].parameter]).removeprefix("torch.")
            raise CheckpointError(
                f"{entry.file} has values that are NaN or infinite as {dtype} (stored as {entry.dtype}) in "
                f"{quoted(keys)}; fetch the file again or choose a wider dtype"
            )


class _Reader:
    """Reads rows of tensors from one file; closes and opens it again every so often to give mapped pages back."""

    def __init__(self, weights: TensorFiles, file: Path) -> None:
        self.weights, self.file = weights, file
        self.handle: Any = self._open()
        self.read_bytes = 0
        self._places = {key: place for place, key in enumerate(self.handle.offset_keys())}

    def place(self, key: str) -> int:
        """Return the position of a tensor in the file, so that it is read front to back."""
        return self._places[key]

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor, still on the map: valid until the next call."""
        if self.read_bytes > REOPEN_BYTES:
            self.handle = None
            self.handle = self._open()
            self.read_bytes = 0
        try:
            part = self.handle.get_slice(key)[first:last]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.file} cannot be read at {key} ({error}); fetch it again") from error
        self.read_bytes += part.nbytes
        return part

    def _open(self) -> Any:
        self.weights.check_unchanged(self.file)
        return open_tensors(self.file)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put a tensor in the place of a parameter or buffer of the same name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return tensor
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=owner.get_parameter(leaf).requires_grad)
    return tensor
