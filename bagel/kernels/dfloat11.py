"""The choice of what expands DFloat11: a kernel in CUDA C++, in Triton, or the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bagel.formats.dfloat11 import Limits, Piece, decode_piece
from bagel.kernels import cuda_dfloat11
from bagel.kernels.functions import find


@torch.no_grad()
def expand_dfloat11(piece: Piece, limits: Limits, *, start: int = 0, stop: int | None = None) -> Tensor:
    """Return weights of a piece of DFloat11 on its device; a GPU is not waited for.

    Args:
        piece: its tensors on one device.
        limits: of the piece, see `bagel.formats.dfloat11.limits_of`.
        start: of the range.
        stop: behind the range; the last weight by default.

    Returns:
        (stop - start,) bfloat16.

    Raises:
        ValueError: on a CPU, which notices a damaged stream.
    """
    stop = piece.sign_mantissa.numel() if stop is None else stop
    # Compilers see an operator: what is behind it is none of their business.
    expand = _operator if torch.compiler.is_compiling() else _expand
    return expand(*piece, *limits, start, stop)


def _expand(
    stream: Tensor, sign_mantissa: Tensor, luts: Tensor, positions: Tensor, gaps: Tensor, lookup: Tensor,
    chunk: int, window: int, start: int, stop: int,
) -> Tensor:  # fmt: skip
    piece, limits = Piece(stream, sign_mantissa, luts, positions, gaps, lookup), Limits(chunk, window)
    if start == stop:
        return stream.new_empty(0, dtype=torch.bfloat16)
    if stream.is_cuda:  # kernels read words of 8 bytes, which those who move weights about need not know
        piece = Piece(*(part if part.data_ptr() % 8 == 0 else part.clone() for part in piece))
    if stream.is_cuda and cuda_dfloat11.can_expand(limits, stream.device.index):
        return cuda_dfloat11.expand_dfloat11(piece, limits, start=start, stop=stop)
    if kernel := find("expand_dfloat11", stream):
        return kernel(piece, limits, start=start, stop=stop)
    return decode_piece(piece, start, stop).to(stream.device)


_operator = torch.library.custom_op("bagel::expand_dfloat11", _expand, mutates_args=())


_operator.register_fake(
    lambda stream, sign_mantissa, luts, positions, gaps, lookup, chunk, window, start, stop: stream.new_empty(
        stop - start, dtype=torch.bfloat16
    )
)
