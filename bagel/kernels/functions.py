"""Operations that a GPU does as one kernel; what stands below the choice of a kernel (`find`) says what it computes.

Shapes: T tokens, n channels, Hq query heads, Hkv key/value heads, D channels per head; B texts or images, C channels of
an image, H and W its sides.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

HOPPER = 9
"""Major CUDA compute capability of the GPUs for which FlashAttention 3 is written, and whose kernels can overlap."""
HALF, SIZES = (torch.bfloat16, torch.float16), (16, 32, 64, 128, 256)
"""Types, and channels per head, that the kernel for appended tokens takes, as matrix units do."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, 1, D) float32; the sines of the first half have their sign changed."""


class Rounding(NamedTuple):
    """How a linear layer would like its input: rows of type `dtype`, none larger than `largest`, with a scale each.

    `tiny` is the smallest scale, so that a row of zeros can be divided by its own. Each `turn` columns are turned
    together before, see `turn`; 1 leaves them.
    """

    dtype: torch.dtype
    largest: float
    tiny: float
    turn: int = 1


class Rows(NamedTuple):
    """Rows (T, n) of few bits and their scales (T, 1) float32: what is meant is `values * scale`, in type `dtype`."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


NORMS = {
    (False, False): "rms_norm",
    (True, False): "add_rms_norm",
    (False, True): "rms_norm_round",
    (True, True): "add_rms_norm_round",
}
"""Kernels of the norm, by whether they add, and whether they round."""
TURNS = (256, 512)
"""Columns that kernels turn together, see `turn`."""
FLOAT16 = Rounding(torch.float16, largest=16.0, tiny=1.0)
"""For products that exceed float16's 65504: rows are scaled into [-16, 16], smaller ones stay as they are.

So no product overflows with a weight whose rows have magnitudes that add up to 4,094 (18,944 of 0.02 make 379), and
beside one huge value ordinary ones keep their digits: scaled into [-1, 1] they have ten times the error.
"""
BFLOAT16, TRITON = (8, 0), (7, 0)
"""The first CUDA compute capabilities that compute in bfloat16, and that Triton builds kernels for."""


# Whether a kernel computes it, or torch does --------------------------------------------------------------------------


def find(name: str, x: Tensor, *, narrow: bool = False) -> Callable[..., Any] | None:
    """Return the GPU kernel of that name where it takes the place of torch's operations on x, else None.

    That is on the current GPU, without gradients, and in no wider type than float32; with `narrow` in narrower types
    alone, for kernels that add up in float32 and round. Kernels are those of
    `bagel.kernels.triton_kernels`; in what is compiled, those of `bagel.kernels.operators`, where
    `let_compilers_use_kernels` has been called.
    """
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype == torch.float64 or (narrow and x.dtype == torch.float32):
        return None
    if torch.compiler.is_compiling():
        return getattr(_operators, name, None)
    if x.dtype == torch.bfloat16 and not _has_bfloat16(x.device.index):  # building for it may end the process
        return None
    kernels = _kernels(x.device.index) if x.device.index == torch.cuda.current_device() else None
    return None if kernels is None else getattr(kernels, name)


_operators: ModuleType | None = None
_compiled_for_matrix_units = False


def let_compilers_use_kernels() -> None:
    """Make kernels stand in what is compiled from now on, if they can be built for the current GPU."""
    global _operators, _compiled_for_matrix_units
    gpu = torch.cuda.current_device()
    if _operators is None and _kernels(gpu) is not None and _has_bfloat16(gpu):
        _operators = importlib.import_module("bagel.kernels.operators")
        _compiled_for_matrix_units = _has_matrix_units(gpu)


@functools.cache
def _kernels(gpu: int) -> ModuleType | None:
    """Return the kernels if Triton can build some for the current GPU: it needs a C compiler, and to know the GPU."""
    try:
        _check_known(gpu)
        kernels = importlib.import_module("bagel.kernels.triton_kernels")
        kernels.try_some(torch.bfloat16 if _has_bfloat16(gpu) else torch.float16)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton and what it calls may raise
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"images and texts take longer than they need on this GPU: Triton cannot build kernels here ({reason})",
            stacklevel=2,
        )
        return None
    return kernels


def _check_known(gpu: int) -> None:
    """Raise RuntimeError for a GPU that Triton is too new for: its compiler may end the process instead."""
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(gpu)) < TRITON:
        raise RuntimeError(f"it needs a compute capability of {TRITON[0]}.{TRITON[1]}, got {found[0]}.{found[1]}")


def has_bfloat16(gpu: torch.device | int) -> bool:
    """Whether a CUDA GPU, or one of AMD's, computes in bfloat16 itself."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(gpu) >= BFLOAT16


_has_bfloat16 = functools.cache(has_bfloat16)


def is_own(module: Any, kind: type[nn.Module] | None = None) -> bool:
    """Whether calling a module is calling its class's `forward` and no more: nothing sees it, wraps it or replaces it.

    Its class is `kind` itself or, by default, one that makes the promises of `bagel.modeling.linear`: its `contract`
    names it.
    """
    found = type(module)
    if found is not (kind or getattr(found, "contract", None)):
        return False
    own = module.__dict__  # read at once: this is asked a thousand times per image
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not (hooks or "forward" in own or "_compiled_call_impl" in own or any_global_hook())


# An expert's rows -----------------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, add: Tensor | None = None, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor | Rows]:
    """Return x + add (..., n), and its root-mean-square norm (arXiv 1910.07467): rounded to its type, then weighted.

    Args:
        x: (..., n); for `add` and `rounding` (T, n).
        weight: (n,).
        eps: added to the mean square.
        add: of the shape of x; nothing by default.
        rounding: return the norm as `Rows` where the same kernel can round it; more than one row only.
    """
    wish = _fused(x, rounding)
    name = NORMS[add is not None, wish is not None]
    kernel = find(name, x)
    if kernel and x.dtype == weight.dtype and (add is None or add.dtype == x.dtype):
        given = (x,) if add is None else (x, add)
        found = kernel(*given, weight, eps=eps, **(wish._asdict() if wish else {}))
        total, *normed = (x, *(found if wish else (found,))) if add is None else found
        return total, Rows(normed[0], normed[1], x.dtype) if wish else normed[0]
    total = x if add is None else x + add
    return total, weight * torch.rms_norm(total, weight.shape, eps=eps)


def norm_rotate(
    qk: Tensor, weights: tuple[Tensor, Tensor] | None, rotary: Rotary, *, q_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries (T, Hq, D) and keys (T, Hkv, D), normed and rotated in float32 and rounded once, in their type.

    Args:
        qk: both, (T, Hq + Hkv, D), of rows that may lie apart, as slices of a wider projection do.
        weights: of the norms of queries and keys, each (D,); None leaves the norm out.
        rotary: see `Rotary`.
        q_heads: Hq.
        eps: of the norms.
    """
    if kernel := find("norm_rotate", qk):
        return kernel(qk, weights, rotary, q_heads=q_heads, eps=eps)
    exact, heads = qk.float(), [q_heads, qk.shape[1] - q_heads]
    if weights is not None:
        weight = torch.cat([w.expand(count, -1) for w, count in zip(weights, heads, strict=True)])
        exact = weight * torch.rms_norm(exact, exact.shape[-1:], eps=eps)
    q, k = rotate(exact, rotary).to(qk.dtype).split_with_sizes(heads, dim=-2)
    return q, k


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads x (T, heads, D) by the table of their positions; computed in the type of x."""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def silu_mul(gate_up: Tensor, *, rounding: Rounding | None = None) -> Tensor | Rows:
    """Return silu(gate) * up (T, n) of gate and up side by side (T, 2n).

    With `rounding` it is returned as `Rows` where the same kernel can round it (more than one row only). In float16 it
    always is, scaled as `FLOAT16` says: a few channels of this product exceed float16's range in Qwen2.5.
    """
    if gate_up.dtype == torch.float16:
        gate, up = gate_up.float().chunk(2, dim=-1)
        product = F.silu(gate) * up
        scale = (product.abs().amax(-1, keepdim=True) / FLOAT16.largest).clamp(min=FLOAT16.tiny)
        return Rows((product / scale).to(gate_up.dtype), scale, product.dtype)
    if (wish := _fused(gate_up, rounding)) and (kernel := find("silu_mul_round", gate_up)):
        values, scale = kernel(gate_up, **wish._asdict())
        return Rows(values, scale, gate_up.dtype)
    if kernel := find("silu_mul", gate_up):
        return kernel(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add: Tensor | None = None) -> Tensor:
    """Return x (T, in) times the rows of a weight (out, in), plus a bias (out,), plus `add` (T, out).

    The addition is the product's own where the hardware can: then `add` itself is written into and returned.
    """
    alike = x.ndim == 2 and (add is None or x.dtype == add.dtype == weight.dtype)
    if alike and x.shape[0] == 1 and x.dtype == torch.bfloat16 and (kernel := find("matrix_times_vector", x)):
        return kernel(x, weight, bias=bias, plus=add)
    if add is None:
        return F.linear(x, weight, bias)
    if alike and bias is None and (kernel := find("add_product", x)):
        kernel(add, x, weight)
        return add
    return add + F.linear(x, weight, bias)


def round_rows(x: Tensor, rounding: Rounding) -> Rows:
    """Return x (T, n) turned and rounded, each row by a scale of its own."""
    if _turns(x, rounding.turn) and (kernel := find("round_rows", x)):
        values, scale = kernel(x, **rounding._asdict())
        return Rows(values, scale, x.dtype)
    exact = turn(x.float(), rounding.turn)
    scale = (exact.abs().amax(-1, keepdim=True) / rounding.largest).clamp(min=rounding.tiny)
    values = exact * scale.reciprocal()
    return Rows((values if rounding.dtype.is_floating_point else values.round()).to(rounding.dtype), scale, x.dtype)


def turn(x: Tensor, size: int) -> Tensor:
    """Return x (T, n) with each `size` columns, a power of two, times the Hadamard matrix of that size over its norm.

    The matrix is its own inverse, so products stay when both factors are turned; few large columns are spread over all
    of their group, and cost the rest less when rounded (arXiv 2404.00456).
    """
    if size == 1:
        return x
    if x.dtype in HALF and _turns(x, size) and (kernel := find("turn_rows", x)):
        return kernel(x, size)
    matrix = (_hadamard if torch.compiler.is_compiling() else _kept_hadamard)(size, x.device)
    return (x.float().unflatten(-1, (-1, size)) @ matrix).flatten(-2).to(x.dtype)


def _hadamard(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


@functools.cache
def _kept_hadamard(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it serves training, too
        return _hadamard(size, device)


def _fused(x: Tensor, rounding: Rounding | None) -> Rounding | None:
    """Return how the kernel that computes x is to round it, if it is: one row alone is not rounded."""
    return rounding if rounding is not None and x.shape[0] > 1 and _turns(x, rounding.turn) else None


def _turns(x: Tensor, size: int) -> bool:
    """Whether kernels can turn rows by so many columns: with matrix units, whose least factor is 16."""
    return size == 1 or (size in TURNS and has_matrix_units(x))


def has_matrix_units(x: Tensor) -> bool:
    """Whether x is on a GPU for which Triton multiplies matrices of integers and of TensorFloat-32 as wholes."""
    if torch.compiler.is_compiling():  # compilers cannot ask a GPU
        return x.is_cuda and _compiled_for_matrix_units
    return x.is_cuda and _has_matrix_units(x.device.index)


@functools.cache
def _has_matrix_units(gpu: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu)[0] >= 8


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows (T, n) of a table (N, n) for ids (T,), on their device; the table may be on the host.

    A GPU reads from page-locked memory by itself; otherwise the host waits for the ids.
    """
    if table.device == ids.device:
        return F.embedding(ids, table)
    if table.is_pinned() and (kernel := find("rows_from_host", ids)):
        return kernel(ids, table)
    return F.embedding(ids.to(table.device), table).to(ids.device)


# One new token per text -----------------------------------------------------------------------------------------------


def attend_appended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Append one token to each of B texts and attend from it to its text; nothing is read from the device.

    Args:
        q: queries (B, Hq, D).
        k: new keys (B, Hkv, D).
        v: new values (B, Hkv, D).
        keys: of the texts (B, capacity, Hkv, D); `k` is written behind each.
        values: as keys.
        lengths: tokens of each text before (B,) int32; less than the capacity.

    Returns:
        (B, Hq, D) in the type of `q`.
    """
    if q.dtype in HALF and q.shape[-1] in SIZES and (kernel := find("attend_appended", q)):
        return kernel(q, k, v, keys, values, lengths)
    rows, last = torch.arange(q.shape[0], device=q.device), lengths.long()
    keys[rows, last], values[rows, last] = k, v
    seen = torch.arange(keys.shape[1], device=q.device) <= last[:, None]  # (B, capacity)
    # The queries of a key head are the rows of one matrix: no key has to be repeated for them.
    out = F.scaled_dot_product_attention(
        q.unflatten(1, (keys.shape[2], -1)),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=seen[:, None, None].expand(-1, 1, q.shape[1] // keys.shape[2], -1),
    )
    return out.flatten(1, 2)


# Between the autoencoder's convolutions: kernels add up in float32 and round; float32 itself is left to torch ---------


def group_norm_silu(norm: nn.GroupNorm, x: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return silu of the norm of x (B, C, H, W), to which a bias (C,) is added first."""
    kernel = find("group_norm_silu", x, narrow=True)
    if kernel and is_own(norm, nn.GroupNorm):
        return kernel(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps, plus=plus)
    return F.silu(norm(x if plus is None else x + plus[:, None, None]))


def convolve(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the convolution of x, and its bias where that is still to be added: kernels that follow do it for less."""
    if find("add_biased", x, narrow=True) and is_own(conv, nn.Conv2d):
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias
    return conv(x), None


def add_biased(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + y, both (B, C, H, W), plus a bias (C,)."""
    if bias is None:
        return x + y
    if kernel := find("add_biased", x, narrow=True):
        return kernel(x, y, bias)
    return x + (y + bias[:, None, None])


def doubled(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) with each pixel four times, (B, C, 2H, 2W)."""
    if kernel := find("doubled", x):
        return kernel(x)
    return F.interpolate(x, scale_factor=2, mode="nearest")
