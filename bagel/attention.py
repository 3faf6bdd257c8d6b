"""Scaled dot-product attention behind one function, with interchangeable backends.

Shapes: `Tq` queries, `Tk` keys, `Hq` query heads, `Hkv` key/value heads (`Hq` a multiple of it), `D` channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "flash", "reference")


def check_backend(name: str) -> str:
    """Return `name` if that backend can run here; raise ValueError (unknown) or ImportError (not installed)."""
    if name not in BACKENDS:
        raise _unknown(name)
    if name == "flash":
        _flash_attn_func()
    return name


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
        backend: "sdpa" (torch, any device), "flash" (package flash-attn, CUDA, no mask), "reference" (float64).

    Returns:
        (Tq, Hq, D) in the type of `q`.

    Raises:
        ValueError: an unknown backend, or both rules at once, or a mask for a backend that has none.
        ImportError: "flash" without the package.
    """
    if causal and mask is not None:
        raise ValueError("attention takes causal=True or a mask, not both")
    causal = causal and q.shape[0] > 1  # a single query at the end sees everything
    run = {"sdpa": _sdpa, "flash": _flash, "reference": _reference}.get(backend)
    if run is None:
        raise _unknown(backend)
    return run(q, k, v, causal, mask)


def lower_right_causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the bool mask (Tq, Tk) of text that follows a context: query i sees keys up to Tk - Tq + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    square = q.shape[0] == k.shape[0]
    if causal and not square:  # torch's is_causal is aligned at the upper left
        mask = lower_right_causal(q.shape[0], k.shape[0], q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, T, D)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and square, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)  # (Tq, Hq, D)


def _flash_attn_func():
    try:
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            'attention="flash" needs the package flash-attn and a CUDA GPU: pip install flash-attn, '
            'or use the default attention="sdpa"'
        ) from error
    return flash_attn_func


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ValueError('attention="flash" takes no arbitrary mask; use "sdpa" for packed training sequences')
    if q.dtype == torch.float32:
        raise ValueError('attention="flash" computes in bfloat16 or float16, got float32; use "sdpa"')
    return _flash_attn_func()(q[None], k[None], v[None], causal=causal)[0]


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
