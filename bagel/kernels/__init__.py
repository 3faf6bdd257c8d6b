"""Where several of torch's operations are one GPU kernel instead; the plain code stays beside every call of one."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

from torch import Tensor, compiler, cuda, is_grad_enabled


def fused(x: Tensor) -> ModuleType | None:
    """Return `bagel.kernels.triton_kernels` where its kernels take the place of torch's operations on x, else None.

    That is on the current GPU, without gradients, and not within what is compiled: a compiler fuses the operations
    itself.
    """
    if not x.is_cuda or is_grad_enabled() or compiler.is_compiling() or x.device.index != cuda.current_device():
        return None
    return _kernels()


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the kernels if Triton is there and can build one: it needs a C compiler, and a GPU that it knows."""
    try:
        kernels = importlib.import_module("bagel.kernels.triton_kernels")
        kernels.try_one()
    except Exception as error:  # whatever Triton and what it calls may raise
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"pictures and texts take longer than they need on this GPU: Triton cannot build kernels here ({reason})",
            stacklevel=2,
        )
        return None
    return kernels
