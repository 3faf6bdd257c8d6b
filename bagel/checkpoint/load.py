"""Weights from files of any format into a model built on the meta device, a slice of a tensor at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bagel.checkpoint.autoencoder import check_shapes
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorFiles, quoted
from bagel.checkpoint.free_memory import free_bytes
from bagel.checkpoint.keep import is_finite, stored_linear
from bagel.checkpoint.keys import TABLE_PARAMETERS, Target, targets
from bagel.checkpoint.sources import Source, TensorSource
from bagel.config import BagelConfig
from bagel.memory import is_out_of_memory
from bagel.memory.units import Piece

STEP_BYTES = 128 * 2**20
"""Most bytes read at once: bounds the temporary copy of a cast."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Convert = Callable[[str, nn.Linear], nn.Module]


def load_model(
    model: nn.Module,
    weights: Source,
    config: BagelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    expand: bool = False,
    convert: Convert | None = None,
    leave: Collection[str] = (),
) -> None:
    """Fill `Bagel` from the official keys; see `Checkpoint.load`."""
    _Loader(
        model, weights, targets(config), device=device, dtype=dtype, expand=expand, convert=convert, leave=leave
    ).run()


def pieces_of(weights: Source, config: BagelConfig, parameter: str) -> list[Piece]:
    """Return where the rows of a parameter are in files."""
    return [
        Piece(target.start, target.shape[0], functools.partial(weights.read, key))
        for key, target in targets(config).items()
        if target.parameter == parameter
    ]


def load_autoencoder(vae: nn.Module, weights: TensorFiles, *, device: torch.device, dtype: torch.dtype | None) -> None:
    """Fill `Autoencoder`, whose parameters have the names of the file's keys."""
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    check_shapes(weights, shapes)
    wanted = {name: Target(name, 0, shape) for name, shape in shapes.items()}
    _Loader(vae, TensorSource(weights), wanted, device=device, dtype=dtype).run()


def decodes_there(device: torch.device) -> bool:
    """Whether compressed weights are decoded on the device, which is faster at it than the host."""
    return device.type != "cpu"


class _Loader:
    """One pass over a source; holds what is known about the destination meanwhile."""

    def __init__(
        self,
        module: nn.Module,
        weights: Source,
        wanted: dict[str, Target],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        expand: bool = False,
        convert: Convert | None = None,
        leave: Collection[str] = (),
    ) -> None:
        self.module, self.weights, self.wanted, self.device = module, weights, wanted, device
        self.convert, self.leave = convert, frozenset(leave)
        self.decodes_there = decodes_there(device)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.keys: dict[str, list[str]] = {}
        for key, target in wanted.items():
            name, stored = target.parameter, DTYPES[weights.entries[key].dtype]
            self.keys.setdefault(name, []).append(key)
            self.shapes[name] = (target.start + target.shape[0], *target.shape[1:])
            if dtype is None or name in TABLE_PARAMETERS:
                self.dtypes[name] = torch.promote_types(self.dtypes.get(name, stored), stored)
            else:
                self.dtypes[name] = dtype
        self.linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        names = [name for name in self.linears if f"{name}.weight" not in self.leave]
        self.kept = () if expand else tuple(name for name in names if self._is_kept(name))
        """The linear layers whose weights stay in the form in which they are stored."""
        self.filled: dict[str, Tensor] = {}
        self.extremes: list[tuple[str, Tensor]] = []

    def _is_kept(self, name: str) -> bool:
        return any(self.weights.keeps(key) for key in self.keys.get(f"{name}.weight", ()))

    def run(self) -> None:
        self._check_module()
        self._check_memory()
        for name in self.leave:
            _assign(self.module, name, torch.empty(self.shapes[name], dtype=self.dtypes[name], device="meta"))
        try:
            self._read_dense()
            self._read_kept()
        finally:
            self.weights.close()
        self._check_finite()
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        left = [name for name, tensor in tensors if tensor.is_meta and name not in self.leave]
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

    # Memory -----------------------------------------------------------------------------------------------------------

    def _check_memory(self) -> None:
        # A host that promises more than it has would otherwise end the process without a word.
        free = free_bytes(self.device)
        if free is not None and self._nbytes > free:
            raise self._too_large(f"{free / 2**30:.1f} GiB")

    @property
    def _nbytes(self) -> int:
        """What the model takes: kept weights as stored; of those that will be converted, only the largest."""
        kept = {f"{name}.weight" for name in self.kept}
        passing = {f"{name}.weight" for name in self.linears} - kept if self.convert else set()
        sizes = {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}
        stored = sum(self.weights.entries[key].nbytes for name in kept for key in self.keys[name])
        dense = sum(size for name, size in sizes.items() if name not in kept | passing | self.leave)
        return stored + dense + max((sizes[name] for name in passing), default=0)

    def _too_large(self, free: str) -> MemoryError:
        return MemoryError(
            f"{type(self.module).__name__} takes {self._nbytes / 2**30:.1f} GiB, more than {self.device} has free "
            f"({free}); choose a narrower dtype or another device, or leave a half out with visual_gen=False or "
            "visual_und=False"
        )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say how much the model takes where memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(str(error).partition("\n")[0]) from error

    # Dense weights ----------------------------------------------------------------------------------------------------

    def _read_dense(self) -> None:
        kept = {*(f"{name}.weight" for name in self.kept), *self.leave}
        keys = [key for key, target in self.wanted.items() if target.parameter not in kept]
        left = {key: owner for key in keys if (owner := self._owner(key)) is not None}
        counts = {name: list(left.values()).count(name) for name in set(left.values())} if self.convert else {}
        for key in self.weights.in_order(keys):
            self._read_tensor(key)
            owner = left.get(key)
            if owner in counts:
                counts[owner] -= 1
                if counts[owner] == 0:
                    self._hand_over(owner)

    def _owner(self, key: str) -> str | None:
        """Return the linear layer that a tensor belongs to and that is filled densely."""
        name = self.wanted[key].parameter.rpartition(".")[0]
        return name if name in self.linears and name not in self.kept else None

    def _read_tensor(self, key: str) -> None:
        target = self.wanted[key]
        whole = self._destination(target.parameter)
        rows = target.shape[0]
        if self.decodes_there and self.weights.keeps(key):
            self._decode_there(key, whole[target.start : target.start + rows])
            return
        nbytes = math.prod(target.shape) * DTYPES[self.weights.entries[key].dtype].itemsize
        step = max(1, rows * STEP_BYTES // max(nbytes, 1))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = whole[target.start + first : target.start + last]
            part.copy_(self.weights.read(key, first, last))
            # Least and greatest value are NaN or infinite if any value is; the host reads them once, at the end.
            self.extremes.append((key, torch.stack(torch.aminmax(part))))

    def _decode_there(self, key: str, part: Tensor) -> None:
        """Move a compressed weight as it is, and decode it on the device."""
        with self._explaining():
            stored: Any = stored_linear([self.weights.stored(key)], None, self.device)
            part.copy_(stored.dense(part.dtype))
        self.extremes.append((key, torch.stack(torch.aminmax(part))))

    def _destination(self, name: str) -> Tensor:
        if name not in self.filled:
            with self._explaining():
                tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name], device=self.device)
            self.filled[name] = _assign(self.module, name, tensor)
        return self.filled[name]

    def _hand_over(self, name: str) -> None:
        """Let `convert` have a linear layer that is filled, and keep no hold on its weights."""
        assert self.convert is not None
        self._check_finite()  # before values that cannot be quantised
        linear = self.linears.pop(name)
        for leaf in ("weight", "bias"):
            self.filled.pop(f"{name}.{leaf}", None)
        with self._explaining():
            made = self.convert(name, linear)
        if not isinstance(made, nn.Module):
            raise TypeError(f"convert must return a module in the place of {name}, got {type(made).__name__}")
        if made is not linear:
            self.module.set_submodule(name, made)

    # Weights that stay as stored --------------------------------------------------------------------------------------

    def _read_kept(self) -> None:
        first = {self.keys[f"{name}.weight"][0]: name for name in self.kept}
        for key in self.weights.in_order(first):
            name = first[key]
            keys = self.keys[f"{name}.weight"]
            parts = [self._part(key) for key in keys]
            for key, part in zip(keys, parts, strict=True):
                self.extremes.append((key, torch.where(is_finite(part), 0.0, torch.nan).expand(2)))
            with self._explaining():
                linear = stored_linear(parts, self.linears[name].bias, self.device)
            self.module.set_submodule(name, linear)

    def _part(self, key: str) -> object:
        if self.weights.keeps(key):
            return self.weights.stored(key)
        dtype = self.dtypes[self.wanted[key].parameter]
        return self.weights.read(key, 0, self.wanted[key].shape[0]).to(dtype, copy=True)

    def _check_finite(self) -> None:
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for key, extremes in self.extremes:
            by_dtype.setdefault(extremes.dtype, []).append((key, extremes.to(self.device)))
        self.extremes.clear()
        bad: list[str] = []
        for found in by_dtype.values():
            finite = torch.stack([extremes for _, extremes in found]).isfinite().all(dim=1).tolist()
            bad += [key for (key, _), fine in zip(found, finite, strict=True) if not fine]
        if bad:
            keys = list(dict.fromkeys(bad))
            entry = self.weights.entries[keys[0]]
            dtype = str(self.dtypes[self.wanted[keys[0]].parameter]).removeprefix("torch.")
            raise CheckpointError(
                f"{entry.file} has values that are NaN or infinite as {dtype} (stored as {entry.stored_as}) in "
                f"{quoted(keys)}; fetch the file again or choose a wider dtype"
            )


def _assign(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put a tensor in the place of a parameter or buffer of the same name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return tensor
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=owner.get_parameter(leaf).requires_grad)
    return tensor
