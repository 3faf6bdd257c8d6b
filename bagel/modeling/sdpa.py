"""torch's scaled dot-product attention without the scores of all queries and keys, which for images take gigabytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

SCORES = 2**27
"""Scores of queries and keys that are held at once where no kernel does without them: half a GiB in float32."""


def attended(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Return torch's attention (B, Hq, Tq, D), by the first way that does without all scores at once.

    That is a kernel for grouped heads; else one that wants as many key heads as query heads, as the memory-efficient
    one does, which alone takes masks, float32, and any type before Ampere; else some queries after the others.

    Args:
        q: queries (B, Hq, Tq, D).
        k: keys (B, Hkv, Tk, D).
        v: values as keys.
        mask: bool (Tq, Tk), or None.
        causal: aligned at the upper left; as many queries as keys.
    """
    gqa = q.shape[1] != k.shape[1]
    if has_kernel(q, k, v, mask, causal):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    groups = q.shape[1] // k.shape[1]
    q, k, v = spread(q, k, v)
    if has_kernel(q, k, v, mask, causal):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    else:
        out = in_pieces(q, k, v, mask=mask, causal=causal)
    return out.unflatten(0, (groups, -1)).permute(1, 2, 0, 3, 4).flatten(1, 2)


def has_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether torch has a kernel for tensors as `attended` takes them that does not store the scores."""
    if not q.is_cuda:  # other GPUs are not known to have one
        return q.device.type in ("cpu", "meta")
    gqa = q.shape[1] != k.shape[1]
    choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
    return choose(q, k, v, mask, 0.0, causal, enable_gqa=gqa) != SDPBackend.MATH.value


def spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (G B, Hkv, Tq, D), and keys and values (G B, Hkv, Tk, D), where G is Hq / Hkv.

    The n-th query heads of all key heads are a batch of their own, so that a single sample's keys are not copied.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.expand(groups, *x.shape).flatten(0, 1) for x in (k, v))
    return q.unflatten(1, (-1, groups)).permute(2, 0, 1, 3, 4).flatten(0, 1), k, v


def in_pieces(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Return the attention (B, H, Tq, D) of so many queries at a time that no more than SCORES scores are held."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    size = max(1, SCORES // (batch * heads * keys))
    if queries <= size:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if causal:
        mask = lower_right_causal(queries, keys, q.device)
    masks = [None] * -(-queries // size) if mask is None else mask.split(size)
    pieces = zip(q.split(size, dim=2), masks, strict=True)
    return torch.cat([F.scaled_dot_product_attention(part, k, v, attn_mask=own) for part, own in pieces], dim=2)


def lower_right_causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the bool mask (Tq, Tk) of text that follows a context: query i sees keys up to Tk - Tq + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
