"""Where several of torch's operations are one GPU kernel instead; the plain code stays beside every call of one."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

from torch import OutOfMemoryError, Tensor, compiler, cuda, float64, is_grad_enabled


def fused(x: Tensor) -> ModuleType | None:
    """Return `bagel.kernels.triton_kernels` where its kernels take the place of torch's operations on x, else None.

    That is on the current GPU, without gradients, and in no wider type than float32. Within what is compiled it is
    `bagel.kernels.operators`, if `let_compilers_use_kernels` has been called.
    """
    if not x.is_cuda or is_grad_enabled() or x.dtype == float64:
        return None
    if compiler.is_compiling():
        return _operators
    return _kernels(x.device.index) if x.device.index == cuda.current_device() else None


_operators: ModuleType | None = None


def let_compilers_use_kernels(gpu: int) -> None:
    """Make kernels stand in what is compiled from now on, for a model on that GPU, the current one."""
    global _operators
    if _operators is None and _kernels(gpu) is not None:
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
            f"pictures and texts take longer than they need on this GPU: Triton cannot build kernels here ({reason})",
            stacklevel=2,
        )
        return None
    return kernels
