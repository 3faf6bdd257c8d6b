"""Whether a GPU kernel computes an operation, or torch does: decided in one place, for every function of this room."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import OutOfMemoryError, Tensor, compiler, cuda, float32, float64, is_grad_enabled, nn

HOPPER = 9
"""Major CUDA compute capability of the GPUs for which FlashAttention 3 is written, and whose kernels can overlap."""


def find(name: str, x: Tensor, *, narrow: bool = False) -> Callable[..., Any] | None:
    """Return the GPU kernel of that name where it takes the place of torch's operations on x, else None.

    That is on the current GPU, without gradients, and in no wider type than float32; with `narrow` in narrower types
    alone, for kernels that add up in float32 and round. Kernels are those of
    `bagel.kernels.triton_kernels`; in what is compiled, those of `bagel.kernels.operators`, where
    `let_compilers_use_kernels` has been called.
    """
    if not x.is_cuda or is_grad_enabled() or x.dtype == float64 or (narrow and x.dtype == float32):
        return None
    if compiler.is_compiling():
        return getattr(_operators, name, None)
    kernels = _kernels(x.device.index) if x.device.index == cuda.current_device() else None
    return None if kernels is None else getattr(kernels, name)


_operators: ModuleType | None = None


def let_compilers_use_kernels() -> None:
    """Make kernels stand in what is compiled from now on, if they can be built for the current GPU."""
    global _operators
    if _operators is None and _kernels(cuda.current_device()) is not None:
        _operators = importlib.import_module("bagel.kernels.operators")


@functools.cache
def _kernels(gpu: int) -> ModuleType | None:
    """Return the kernels if Triton can build some for the current GPU: it needs a C compiler, and to know the GPU."""
    try:
        kernels = importlib.import_module("bagel.kernels.triton_kernels")
        kernels.try_some()
    except OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton and what it calls may raise
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"images and texts take longer than they need on this GPU: Triton cannot build kernels here ({reason})",
            stacklevel=2,
        )
        return None
    return kernels


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what enters or leaves a module when it is called, or its `forward` was replaced."""
    own = module.__dict__  # read at once: this is asked a thousand times per image
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own
