"""Compile a model, and use it once, so that nobody waits later or learns then that it does not work here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bagel.kernels import let_compilers_use_kernels
from bagel.modeling.bagel import Bagel
from bagel.modeling.mot import Expert


def compile_model(model: Bagel, use: Callable[[], object], *, backend: str) -> None:
    """Compile the experts in place; see `BagelPipeline.compile`.

    Args:
        model: what to compile.
        use: runs all that is compiled.
        backend: of `torch.compile`.

    Raises:
        RuntimeError: it did not work. Whatever is raised, nothing is compiled then.
    """
    if model.device.type == "cuda":
        with torch.cuda.device(model.device):
            let_compilers_use_kernels()
    compile_experts(model, backend=backend)
    try:
        use()
    except BaseException as error:
        for module in model.modules():
            if isinstance(module, Expert):
                for name in ("heads", "finish"):
                    module.__dict__.pop(name, None)
        if not isinstance(error, RuntimeError):  # what torch raises where its compilers are missing or fail
            raise
        reason = " ".join(str(error).strip().splitlines()[:2])  # "backend ... raised:", and what
        raise RuntimeError(
            f"this model cannot be compiled here and stays as it was ({reason}): compiling needs a C++ compiler for "
            "a CPU, Triton for a GPU"
        ) from error


def compile_experts(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compile what the experts within a module compute, when it is first used, for any number of tokens."""
    for part in module.modules():
        if isinstance(part, Expert):
            part.heads = torch.compile(part.heads, dynamic=True, backend=backend)
            part.finish = torch.compile(part.finish, dynamic=True, backend=backend)
