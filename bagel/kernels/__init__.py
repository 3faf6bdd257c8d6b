"""Where several of torch's operations are one GPU kernel instead; the plain code stays beside every call of one."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

from torch import OutOfMemoryError, Tensor, compiler, cuda, float64, is_grad_enabled


def fused(x: Tensor) -> ModuleType | None:
    """Return `bagel.kernels.triton_kernels` where its kernels take the place of torch's operations on x, else None.

    That is on the current GPU, without gradients, in no wider type than float32, and not within what is compiled: a
    compiler fuses the operations itself.
    """
    if not x.is_cuda or is_grad_enabled() or compiler.is_compiling() or x.dtype == float64:
        return None
    return _kernels(x.device.index) if x.device.index == cuda.current_device() else None


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
