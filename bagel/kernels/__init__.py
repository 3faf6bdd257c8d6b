"""Where several of torch's operations are one GPU kernel instead; the plain code stays beside every call of one."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor, compiler, is_grad_enabled


def fused(x: Tensor) -> ModuleType | None:
    """Return `bagel.kernels.triton_kernels` where its kernels take the place of torch's operations on x, else None.

    That is on a GPU, without gradients, and not within what is compiled: a compiler fuses the operations itself.
    """
    if not x.is_cuda or is_grad_enabled() or compiler.is_compiling():
        return None
    return _kernels()


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("bagel.kernels.triton_kernels")
    except ImportError:  # no Triton here: torch's operations do the same, more slowly
        return None
