"""The kernels that experts use as operators of torch, which torch.compile calls as they are: its own were slower.

For each the shapes of its results; see `bagel.kernels.triton_kernels` for what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from bagel.kernels import triton_kernels


def _operator(kernel: Callable[..., Any], like: Callable[..., Any], *, changes: str = "") -> Callable[..., Any]:
    """Return a kernel as an operator; `like` takes the same arguments and returns empty tensors like its results.

    `changes`: the argument that it changes, if any.
    """
    operator = library.custom_op(f"bagel::{kernel.__name__}", kernel, mutates_args=(changes,) if changes else ())
    operator.register_fake(like)
    return operator


def _norm_rotate(
    qk: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, q_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    weights = None if q_weight is None or k_weight is None else (q_weight, k_weight)
    return triton_kernels.norm_rotate(qk, weights, (cos, sin), q_heads=q_heads, eps=eps)


_rotated = _operator(
    _norm_rotate,
    lambda qk, q_weight, k_weight, cos, sin, q_heads, eps: (
        qk.new_empty(qk.shape[0], q_heads, qk.shape[2]),
        qk.new_empty(qk.shape[0], qk.shape[1] - q_heads, qk.shape[2]),
    ),
)


def norm_rotate(
    qk: Tensor, weights: tuple[Tensor, Tensor] | None, rotary: tuple[Tensor, Tensor], *, q_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `triton_kernels.norm_rotate`; operators take no tuples."""
    return _rotated(qk, *(weights or (None, None)), *rotary, q_heads, eps)


def _rounded(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], width, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


rms_norm = _operator(triton_kernels.rms_norm, lambda x, weight, *, eps: _like(x))
add_rms_norm = _operator(triton_kernels.add_rms_norm, lambda x, plus, weight, *, eps: (_like(x), _like(x)))
rms_norm_round = _operator(
    triton_kernels.rms_norm_round,
    lambda x, weight, *, eps, largest, tiny, dtype, turn: _rounded(x, x.shape[1], dtype),
)
add_rms_norm_round = _operator(
    triton_kernels.add_rms_norm_round,
    lambda x, plus, weight, *, eps, largest, tiny, dtype, turn: (_like(x), *_rounded(x, x.shape[1], dtype)),
)
round_rows = _operator(
    triton_kernels.round_rows, lambda x, *, largest, tiny, dtype, turn: _rounded(x, x.shape[1], dtype)
)
add_product = _operator(triton_kernels.add_product, lambda plus, x, weight: None, changes="plus")
silu_mul = _operator(
    triton_kernels.silu_mul, lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
)
silu_mul_round = _operator(
    triton_kernels.silu_mul_round,
    lambda gate_up, *, largest, tiny, dtype, turn: _rounded(gate_up, gate_up.shape[1] // 2, dtype),
)
matrix_times_vector = _operator(
    triton_kernels.matrix_times_vector,
    lambda x, weight, scale=None, bias=None, plus=None: x.new_empty(1, weight.shape[0]),
)


# Weights of 4 and 8 bits ----------------------------------------------------------------------------------------------


def _vectors(x: Tensor, codes: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], 2 * codes.shape[0] // x.shape[1], dtype=dtype)


blocks_times_vectors = _operator(triton_kernels.blocks_times_vectors, _vectors)
expand_blocks = _operator(
    triton_kernels.expand_blocks,
    lambda codes, *_, first, count, dtype, **__: codes.new_empty(count, dtype=dtype),
)
integer_product = _operator(
    triton_kernels.integer_product,
    lambda x, x_scale, weight, *_, dtype, **__: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype),
)
turn_rows = _operator(triton_kernels.turn_rows, lambda x, size: _like(x))
