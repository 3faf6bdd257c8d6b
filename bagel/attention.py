"""Scaled dot-product attention behind one function, with interchangeable backends.

Shapes: `Tq` queries, `Tk` keys, `Hq` query heads, `Hkv` key/value heads (`Hq` a multiple of it), `D` channels a head.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel.kernels import HOPPER, fused

BACKENDS = ("auto", "sdpa", "fa3", "flash", "reference")
PICTURE_SIZED = 2**20
"""Queries times keys from which cuDNN's kernel is worth the planning that it needs for each new shape."""
HALF, SIZES = (torch.bfloat16, torch.float16), (16, 32, 64, 128, 256)
"""Types, and channels of a head, that the kernel for appended tokens takes, as matrix units do."""
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def check_backend(name: str) -> str:
    """Return `name` if that backend can run here; raise ValueError (unknown) or ImportError (not installed)."""
    if name not in BACKENDS:
        raise _unknown(name)
    if name in ("fa3", "flash"):
        _flash_func(name)
    return name


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that a name stands for: "auto" is the fastest that runs on a device in a type.

    Raises:
        ValueError: an unknown name.
        ImportError: one whose package is not installed.
    """
    if check_backend(name) != "auto":
        return name
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    return "fa3" if hopper and dtype == torch.bfloat16 and _has_fa3() else "sdpa"


@functools.cache
def _has_fa3() -> bool:
    try:
        _flash_func("fa3")
    except (ImportError, OSError):  # not there, or built for another torch
        return False
    return True


def _unknown(name: str) -> ValueError:
    return ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Attend from every query to the keys it may see.

    Args:
        q: queries (Tq, Hq, D).
        k: keys (Tk, Hkv, D).
        v: values (Tk, Hkv, D).
        causal: query i sees keys 0 to Tk - Tq + i: the last query sees all (aligned at the lower right).
        mask: instead of `causal`, bool (Tq, Tk), true where the query may look.
        backend: "auto" (the fastest for them), "sdpa" (torch, any device), "fa3" (package fa3-fwd, Hopper GPUs,
            bfloat16, without gradients; what it lacks goes to "sdpa"), "flash" (package flash-attn, CUDA, no mask),
            "reference" (float64).

    Returns:
        (Tq, Hq, D) in the type of `q`.

    Raises:
        ValueError: an unknown backend, or both rules at once, or a mask for "flash".
        ImportError: "fa3" or "flash" without the package.
    """
    if causal and mask is not None:
        raise ValueError("attention takes causal=True or a mask, not both")
    causal = causal and q.shape[0] > 1  # a single query at the end sees everything
    if backend == "auto":
        backend = choose_backend(backend, device=q.device, dtype=q.dtype)
    run = {"sdpa": _sdpa, "fa3": _flash_3, "flash": _flash, "reference": _reference}.get(backend)
    if run is None:
        raise _unknown(backend)
    return run(q, k, v, causal, mask)


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
    if q.dtype in HALF and q.shape[-1] in SIZES and (attend := fused("attend_appended", q)):
        return attend(q, k, v, keys, values, lengths)
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


def lower_right_causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the bool mask (Tq, Tk) of text that follows a context: query i sees keys up to Tk - Tq + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    square = q.shape[0] == k.shape[0]
    if causal and not square:  # torch's is_causal is aligned at the upper left
        mask = lower_right_causal(q.shape[0], k.shape[0], q.device)
    large = q.is_cuda and mask is None and q.shape[0] * k.shape[0] >= PICTURE_SIZED
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, T, D)
    with sdpa_kernel(KERNELS, set_priority=True) if large else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and square, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.squeeze(0).transpose(0, 1)  # (Tq, Hq, D)


def _flash_func(backend: str) -> Callable[..., Tensor]:
    """Return the function of the package behind "fa3" or "flash"; raise ImportError where it is not installed."""
    module, package, gpu = {
        "fa3": ("fa3_fwd_interface", "fa3-fwd", "Hopper"),
        "flash": ("flash_attn", "flash-attn", "CUDA"),
    }[backend]
    try:
        return importlib.import_module(module).flash_attn_func
    except ImportError as error:
        raise ImportError(
            f'attention="{backend}" needs the package {package} and a {gpu} GPU: pip install {package}, or use the '
            'default attention="auto"'
        ) from error


def _flash_3(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if mask is not None or learns or q.dtype != torch.bfloat16:
        return _sdpa(q, k, v, causal, mask)
    return _flash_func("fa3")(q[None], k[None], v[None], causal=causal)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ValueError('attention="flash" takes no arbitrary mask; use "sdpa" for packed training sequences')
    if q.dtype == torch.float32:
        raise ValueError('attention="flash" computes in bfloat16 or float16, got float32; use "sdpa"')
    return _flash_func("flash")(q[None], k[None], v[None], causal=causal)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """Exact twin in float64, written from the definition; for tests."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))  # (Tk, Hq, D)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
    if causal:
        mask = lower_right_causal(q.shape[0], k.shape[0], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
