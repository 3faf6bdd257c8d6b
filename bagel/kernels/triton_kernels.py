"""Steps of a layer as single GPU kernels, in Triton: torch's own operations pass over the memory several times.

Each computes what the function of its name in `bagel.kernels` says, whose own operations a CPU and gradients use;
`bagel.kernels.find` decides.
Letters in shapes: T tokens, B texts, Hq query heads, Hkv key/value heads, D channels per head.
"""

from __future__ import annotations

import torch

from bagel.kernels.triton_dfloat11 import expand_dfloat11
from bagel.kernels.triton_host import rows_from_host
from bagel.kernels.triton_images import add_biased, doubled, group_norm_silu
from bagel.kernels.triton_int8 import integer_product, turn_rows
from bagel.kernels.triton_nf4 import blocks_times_vectors, expand_blocks
from bagel.kernels.triton_rows import (
    add_product,
    add_rms_norm,
    add_rms_norm_round,
    norm_rotate,
    rms_norm,
    rms_norm_round,
    round_rows,
    silu_mul,
    silu_mul_round,
)
from bagel.kernels.triton_vectors import attend_appended, matrix_times_vector

__all__ = [
    "add_biased",
    "add_product",
    "add_rms_norm",
    "add_rms_norm_round",
    "attend_appended",
    "blocks_times_vectors",
    "doubled",
    "expand_blocks",
    "expand_dfloat11",
    "group_norm_silu",
    "integer_product",
    "matrix_times_vector",
    "norm_rotate",
    "rms_norm",
    "rms_norm_round",
    "round_rows",
    "rows_from_host",
    "silu_mul",
    "silu_mul_round",
    "try_some",
    "turn_rows",
]


def try_some(dtype: torch.dtype) -> None:
    """Build and run a kernel of each sort, in a type of 16 bits; what Triton raises is not caught."""
    heads = torch.ones(1, 1, 128, device="cuda", dtype=dtype)
    rms_norm(heads, heads[0, 0], eps=1e-6)
    cache = heads.new_zeros(1, 64, 1, 128)
    attend_appended(heads, heads, heads, cache, cache.clone(), torch.zeros(1, device="cuda", dtype=torch.int32))
