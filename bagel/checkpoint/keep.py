"""Stored weights of a file in the place of a model's linear layers: what was compressed stays so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bagel.checkpoint.sources import dfloat11 as units
from bagel.checkpoint.sources import gguf as gguf_source
from bagel.formats import fp8, gguf, int8, nf4
from bagel.modeling.float8 import Float8Linear, can_multiply
from bagel.modeling.linear import Linear
from bagel.modeling.stored.dfloat11 import DFloat11Linear
from bagel.modeling.stored.gguf import GGUFLinear
from bagel.modeling.stored.nf4 import layer_of
from bagel.modeling.stored.scaled import ScaledLinear
from bagel.modeling.stored.stacked import StackedLinear


def stored_linear(parts: Sequence[Any], bias: nn.Parameter | None, device: torch.device) -> nn.Module:
    """Return a linear layer whose weight is that of its parts, one above the other.

    Args:
        parts: stored forms as sources give them, or dense weights (rows, in); they are moved to the device.
        bias: (out,) of the whole, there already.
        device: where the weights go.
    """
    joined = _join(parts) if len(parts) > 1 else parts[0]
    if joined is not None:
        return _layer(joined, bias, device)
    return StackedLinear([_layer(part, None, device) for part in parts], bias)


def is_finite(part: Any) -> Tensor:
    """Return, as a boolean, whether the scales of a stored form, on which all its values hang, are finite."""
    match part:
        case gguf_source.Blocks():
            return gguf.is_finite(part.packed, part.kind)
        case fp8.Scaled():
            return fp8.is_finite(part)
        case int8.Integers():
            return part.scale.isfinite().all()
        case nf4.Blocks():
            return nf4.dequantize_absmax(part.absmax).isfinite().all()
        case units.UnitRange():
            return torch.tensor(True)  # exponents that mean infinite or NaN have no code
    return torch.isfinite(part).all()


def _layer(part: Any, bias: nn.Parameter | None, device: torch.device) -> nn.Module:
    match part:
        case gguf_source.Blocks():
            return GGUFLinear(part.packed.to(device), part.kind, bias)
        case fp8.Scaled():
            return _scaled(fp8.Scaled(part.values.to(device), part.scale.to(device), part.products), bias)
        case int8.Integers():
            # Inputs are not rounded: those of a trained model have channels that a scale per token would round away.
            return ScaledLinear(fp8.Scaled(part.values.to(device), part.scale.to(device)), bias)
        case nf4.Blocks():
            return layer_of(part, bias).to(device)
        case units.UnitRange():
            return DFloat11Linear(part.opened.piece(part.names), part.shape[0], bias).to(device)
    layer = Linear(part.shape[1], part.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(part.to(device), requires_grad=False)
    layer.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def _scaled(weight: fp8.Scaled, bias: nn.Parameter | None) -> nn.Module:
    """Return the layer that rounds its inputs to 8 bits too, if the file allows it and this device is faster so."""
    values, layer = weight.values, ScaledLinear(weight, bias)
    able = can_multiply(values.device)
    fits = values.dtype == fp8.FLOAT8 and not weight.blockwise and not any(side % 16 for side in values.shape)
    if weight.products and able and fits:
        return Float8Linear.stored(layer.weight, layer.scale, bias)
    return layer


def _join(parts: Sequence[Any]) -> Any:
    """Return parts of one format as one, where its layout allows that, else None."""
    kinds = {type(part) for part in parts}
    if len(kinds) > 1:
        return None
    match parts[0]:
        case gguf_source.Blocks(kind=kind):
            if any(part.kind != kind for part in parts):
                return None
            return gguf_source.Blocks(torch.cat([part.packed for part in parts]), kind)
        case fp8.Scaled():
            return _join_scaled(parts)
        case int8.Integers():
            return int8.Integers(*(torch.cat(both) for both in zip(*parts, strict=True)))
        case nf4.Blocks():
            return _join_blocks(parts)
        case units.UnitRange():
            return units.join(parts)
    return torch.cat(list(parts))


def _join_blocks(parts: Sequence[nf4.Blocks]) -> nf4.Blocks | None:
    """Return weights in 4 bits as one, if each is whole blocks and none of their magnitudes is quantised itself."""
    first = parts[0]
    whole = all(math.prod(part.shape) % nf4.BLOCK == 0 for part in parts[:-1])
    alike = all(part.kind == first.kind and torch.equal(part.codebook, first.codebook) for part in parts)
    absmax = [part.absmax for part in parts if isinstance(part.absmax, Tensor)]
    if not whole or not alike or len(absmax) < len(parts):
        return None
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    return first._replace(codes=torch.cat([part.codes for part in parts]), absmax=torch.cat(absmax), shape=shape)


def _join_scaled(parts: Sequence[fp8.Scaled]) -> fp8.Scaled | None:
    first, rows = parts[0], [part.values.shape[0] for part in parts]
    if any(part.values.dtype != first.values.dtype or part.products != first.products for part in parts):
        return None
    blocks = [part.blockwise for part in parts]
    if any(blocks) and (not all(blocks) or any(count % fp8.BLOCK for count in rows[:-1])):
        return None
    scales = [p.scale if p.blockwise else p.scale.expand(p.values.shape[0], 1) for p in parts]
    # Not torch.cat of 8-bit floats, which not every version of torch has.
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(first.values.dtype)
    return fp8.Scaled(values, torch.cat(scales), first.products)
