"""Expanding DFloat11 by a kernel in CUDA C++, `dfloat11.cu`."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from bagel.formats.dfloat11 import LOOKUP_BITS, WINDOWS, Limits, Piece
from bagel.kernels import nvrtc

SOURCE = Path(__file__).with_name("dfloat11.cu")
BLOCKS = 3
"""Blocks that a multiprocessor holds at once; each takes one chunk after another."""


def options() -> list[str]:
    """Return the options that the source is compiled with."""
    return [f"-DLOOKUP_BITS={LOOKUP_BITS}", f"-DBLOCKS={BLOCKS}"]


def room(limits: Limits) -> tuple[int, int]:
    """Return the slots of a window, of four bytes, and the bytes of shared memory that a block needs."""
    slots = -(-limits.window // 4)
    return slots, (8 << LOOKUP_BITS) + 4 * slots * WINDOWS + (limits.chunk + 7 + 15) // 16 * 16


@functools.cache
def kernel_of(device: int) -> nvrtc.Kernel | None:
    """Return the kernel for a GPU; None where it cannot be built, as without an NVIDIA GPU."""
    if torch.version.cuda is None:
        return None
    try:
        return nvrtc.build(SOURCE.read_text(encoding="utf-8"), "expand", device=device, options=options())
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"DFloat11 takes longer than it needs: CUDA kernels cannot be built here ({reason})", stacklevel=2
        )
        return None


@functools.cache
def can_expand(limits: Limits, device: int) -> bool:
    """Whether a GPU has the kernel, and the shared memory for it: some smaller ones lack that for codes of one bit."""
    if kernel_of(device) is None:
        return False
    return room(limits)[1] + 1024 <= torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def expand_dfloat11(piece: Piece, limits: Limits, *, start: int, stop: int) -> Tensor:
    """Return the weights start to stop of a piece on a GPU, (stop - start,) bfloat16."""
    device = piece.stream.device
    kernel = kernel_of(device.index)
    assert kernel is not None
    out = torch.empty(stop - start, dtype=torch.bfloat16, device=device)
    chunks, (slots, shared) = piece.positions.numel() - 1, room(limits)
    blocks = min(chunks, BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count)
    tables = piece.luts.shape[0] - 1
    kernel(
        *piece[:3], *piece[3:], out, tables, chunks, start, stop, slots, blocks=blocks, threads=WINDOWS, shared=shared
    )
    return out
