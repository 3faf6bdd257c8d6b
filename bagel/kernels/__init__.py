"""Operations that a GPU does as one kernel: each a function, whose body in torch's operations says what it computes.

A CPU, gradients, and GPUs for which Triton builds nothing use the bodies; see `find`.
"""

from bagel.kernels.dfloat11 import expand_dfloat11
from bagel.kernels.functions import (
    HOPPER,
    Rotary,
    Rounding,
    Rows,
    add_biased,
    attend_appended,
    convolve,
    doubled,
    find,
    group_norm_silu,
    has_bfloat16,
    is_own,
    let_compilers_use_kernels,
    linear,
    norm_rotate,
    rms_norm,
    rotate,
    round_rows,
    rows_of,
    silu_mul,
    turn,
)

__all__ = [
    "HOPPER",
    "Rotary",
    "Rounding",
    "Rows",
    "add_biased",
    "attend_appended",
    "convolve",
    "doubled",
    "expand_dfloat11",
    "find",
    "group_norm_silu",
    "has_bfloat16",
    "is_own",
    "let_compilers_use_kernels",
    "linear",
    "norm_rotate",
    "rms_norm",
    "rotate",
    "round_rows",
    "rows_of",
    "silu_mul",
    "turn",
]
