"""Weights of 4 bits in blocks of 64, by kernels in CUDA C++, `nf4.cu`: few tokens times them, and their expansion."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bagel.kernels import nvrtc
from bagel.kernels.functions import HOPPER

SOURCE = Path(__file__).with_name("nf4.cu")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLE = 1024 + 65536
"""Bytes of shared memory up to the end of the table of pairs."""
THREADS, WORDS = 1024, 4
"""Of a block that expands, and words of 8 codes that each of its threads has on their way."""


class Sizes(NamedTuple):
    """What a warp takes at once, and the most warps of a block, of which a multiprocessor has one."""

    rows: int
    slots: int
    warps: int


SIZES = {1: Sizes(4, 2, 24), 2: Sizes(4, 2, 24), 4: Sizes(4, 2, 16), 8: Sizes(4, 1, 16)}
"""By the number of tokens: with more of them, threads need more registers."""


class Launch(NamedTuple):
    """How the rows of a weight are shared out."""

    blocks: int
    warps: int
    parts: int
    rounds: int


def launch_of(rows: int, width: int, sizes: Sizes, processors: int) -> Launch:
    """Return how a GPU of so many multiprocessors shares a weight out.

    Each has as many groups of rows as another, at most one more. Where these are few, several warps share one.
    """
    tasks = -(-rows // sizes.rows)
    blocks = min(processors, tasks)
    each = -(-tasks // blocks)
    rounds = -(-each // sizes.warps)
    groups = -(-each // rounds)
    slots = -(-width // (2048 // sizes.rows))
    parts = min(sizes.warps // groups, slots)
    return Launch(blocks, groups * parts, parts, rounds)


def product_options(dtype: torch.dtype, nested: bool, width: int, tokens: int, sizes: Sizes) -> list[str]:
    """Return the options that the source is compiled with for products."""
    numbers = {"WIDTH": width, "TOKENS": tokens, "ROWS": sizes.rows, "SLOTS": sizes.slots, "WARPS": sizes.warps}
    return [*expansion_options(dtype, nested), *(f"-D{name}={value}" for name, value in numbers.items())]


def expansion_options(dtype: torch.dtype, nested: bool) -> list[str]:
    """Return the options that the source is compiled with for expansion."""
    return [f"-DKIND={KINDS[dtype]}", f"-DNESTED={int(nested)}"]


def multiply(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_table: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    plus: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return what `bagel.kernels.triton_nf4.blocks_times_vectors` does; None where this kernel does not take it."""
    (tokens, width), device = x.shape, x.device.index
    rows, most = 2 * codes.numel() // width, 1 << (tokens - 1).bit_length()
    alike = (bias is None or bias.dtype == x.dtype) and dtype in (x.dtype, torch.float32)
    if most not in SIZES or rows < SIZES[most].rows or not alike or not _on_words(codes, absmax):
        return None
    sizes = SIZES[most]
    launch = launch_of(rows, width, sizes, processors(device))
    shared = TABLE + 4 * 2 * launch.warps * sizes.rows * most
    options = product_options(x.dtype, nested_absmax is not None, width, most, sizes)
    if shared > room(device) or not (kernel := kernel_of("multiply", device, *options)):
        return None
    if most > tokens or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, 0, 0, most - tokens)) if most > tokens else x.clone()
    out = x.new_empty(tokens, rows, dtype=dtype)
    tensors = x, codes, absmax, codebook, nested_absmax, nested_table, offset, bias, plus, out
    numbers = rows, tokens, launch.parts, launch.rounds, int(dtype != x.dtype)
    early = torch.cuda.get_device_capability(device)[0] >= HOPPER
    kernel(*tensors, *numbers, blocks=launch.blocks, threads=32 * launch.warps, shared=shared, early=early)
    return out


def expand(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_table: Tensor | None,
    offset: Tensor | None,
    *,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return what `bagel.kernels.triton_nf4.expand_blocks` does; None where this kernel does not take it."""
    device = codes.device.index
    if first % 8 or count % 8 or not count or not _on_words(codes, absmax) or room(device) < TABLE:
        return None
    if not (kernel := kernel_of("expand", device, *expansion_options(dtype, nested_absmax is not None))):
        return None
    out = torch.empty(count, dtype=dtype, device=codes.device)
    blocks = min(processors(device) * at_once(device), -(-count // (8 * WORDS * THREADS)))
    tensors = codes, absmax, codebook, nested_absmax, nested_table, offset, out
    kernel(*tensors, first // 8, count // 8, blocks=blocks, threads=THREADS, shared=TABLE)
    return out


@functools.cache
def kernel_of(name: str, device: int, *options: str) -> nvrtc.Kernel | None:
    """Return a kernel for a GPU; None where it cannot be built, as without an NVIDIA GPU."""
    if torch.version.cuda is None:
        return None
    # Products read their tokens again and again from what is left of the cache.
    carveout = 100 if name == "expand" else 40
    try:
        return nvrtc.build(SOURCE.read_text(encoding="utf-8"), name, device=device, options=options, carveout=carveout)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"weights in 4 bits take longer than they need: CUDA kernels cannot be built here ({reason})", stacklevel=2
        )
        return None


@functools.cache
def processors(device: int) -> int:
    """Return the multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def room(device: int) -> int:
    """Return the bytes of shared memory that a block can have on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def at_once(device: int) -> int:
    """Return the blocks that expand at once on a multiprocessor of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    by_memory = properties.shared_memory_per_multiprocessor // (TABLE + 1024)
    return max(1, min(properties.max_threads_per_multi_processor // THREADS, by_memory))


def _on_words(codes: Tensor, absmax: Tensor) -> bool:
    """Whether codes can be read as words of 4 bytes, and magnitudes one by one."""
    return codes.data_ptr() % 4 == 0 and absmax.data_ptr() % absmax.element_size() == 0
