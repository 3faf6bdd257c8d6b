"""The formats that a checkpoint can be converted to: how each stores a weight, and how far off it may then be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bagel.checkpoint.convert.files import Layout, Place, place_of
from bagel.checkpoint.keys import TABLE_PARAMETERS, find_row
from bagel.formats import fp8, gguf, int8, nf4

LAYER_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\..*_proj(_moe_gen)?\.weight")
TABLES = ("embed_tokens.weight", "position_embedding.weight", "pos_embed")
SMALLEST_HALF = 2.0**-24
"""The least positive float16, by which the scales of GGUF blocks are rounded."""
Encode = Callable[[str, Tensor], dict[str, Tensor]]
Bound = Callable[[Tensor, float], Tensor]


class Format(NamedTuple):
    """A format of weights.

    Attributes:
        name: as users type it.
        encode: from a key and a weight (out, in) to the tensors of a safetensors file; for GGUF to its blocks.
        bound: from rows of a weight (n, in) float32, the first a multiple of 64, and the greatest magnitude of the
            whole weight to the most that each value may be off; None: it is exact.
        config: what `config.json` says of it.
        kind: of GGUF blocks; "" for safetensors.
    """

    name: str
    encode: Encode
    bound: Bound | None
    config: dict[str, object]
    kind: str = ""


def is_packed(key: str, shape: tuple[int, ...], *, every_linear: bool = False) -> bool:
    """Whether a tensor is one of the weights that are quantised: those of the decoder's layers, or of every linear."""
    if not every_linear or len(shape) != 2:
        return LAYER_MATRIX.fullmatch(key) is not None and len(shape) == 2
    return key.endswith(".weight") and not key.endswith(TABLES)


def is_table(key: str) -> bool:
    """Whether a tensor is a table of positions, which stays in the dtype in which it is stored."""
    found = find_row(key)
    return found is not None and found[0].parameter in TABLE_PARAMETERS


# Layouts --------------------------------------------------------------------------------------------------------------


def layout_of(fmt: Format, key: str, shape: tuple[int, ...]) -> Layout:
    """Return the tensors that a weight becomes, without its values."""
    rows, columns = shape
    if fmt.kind:
        return {key: Place(fmt.kind, shape, rows * gguf.packed_columns(fmt.kind, columns))}
    empty = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return {name: place_of(tensor) for name, tensor in _HOLLOW[fmt.name](key, empty).items()}


def _hollow_nf4(key: str, weight: Tensor) -> dict[str, Tensor]:
    count = weight.numel()
    sample = nf4.quantize(torch.zeros(1, nf4.BLOCK, dtype=torch.bfloat16))
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(math.ceil(count / nf4.BLOCK), device="meta")
    return nf4.to_file(key, sample._replace(codes=codes, absmax=absmax, shape=tuple(weight.shape)))


def _hollow_int8(key: str, weight: Tensor) -> dict[str, Tensor]:
    scale = torch.empty(weight.shape[0], 1, device="meta")
    return int8.to_file(key, int8.Integers(weight.to(torch.int8), scale))


def _hollow_float8(key: str, weight: Tensor) -> dict[str, Tensor]:
    return _float8_file(key, fp8.Scaled(weight.to(fp8.FLOAT8), torch.empty(1, 1, device="meta")))


def _hollow_bf16(key: str, weight: Tensor) -> dict[str, Tensor]:
    return {key: weight}


_HOLLOW: dict[str, Encode] = {
    "nf4": _hollow_nf4,
    "int8": _hollow_int8,
    "float8": _hollow_float8,
    "bf16": _hollow_bf16,
}


# Values ---------------------------------------------------------------------------------------------------------------


def _nf4(key: str, weight: Tensor) -> dict[str, Tensor]:
    return nf4.to_file(key, nf4.quantize(weight.bfloat16()))


def _int8(key: str, weight: Tensor) -> dict[str, Tensor]:
    return int8.to_file(key, int8.quantize(weight.half()))  # as LLM.int8() takes it


def _float8(key: str, weight: Tensor) -> dict[str, Tensor]:
    return _float8_file(key, fp8.quantize(weight))


def _float8_file(key: str, weight: fp8.Scaled) -> dict[str, Tensor]:
    name = key.removesuffix(".weight")
    said = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {key: weight.values, f"{name}.weight_scale": weight.scale.reshape(()), f"{name}.comfy_quant": said}


def _gguf(kind: str) -> Encode:
    return lambda key, weight: {key: gguf.quantize(weight, kind)}


# How far off values may be --------------------------------------------------------------------------------------------


def _greatest(x: Tensor, size: int) -> Tensor:
    """Return for each value of x (n, in) the greatest magnitude of its block of `size` values, counted row by row."""
    flat = x.abs().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    return blocks.amax(1, keepdim=True).expand_as(blocks).flatten()[: flat.numel()].view(x.shape)


def _nf4_bound(x: Tensor, largest: float) -> Tensor:
    # Half of the widest gap between two of NF4's values, 0.3038, and bfloat16's rounding.
    return (0.152 + 2**-8) * _greatest(x, nf4.BLOCK)


def _int8_bound(x: Tensor, largest: float) -> Tensor:
    return (0.5 / 127 + 2**-10) * x.abs().amax(1, keepdim=True) + SMALLEST_HALF


def _float8_bound(x: Tensor, largest: float) -> Tensor:
    # Half of the last of four significant bits, or half of the least positive value, of which 448 is the greatest.
    return (x.abs() * 2**-4).clamp(min=largest / 448 * 2**-10) * (1 + 2**-20)


def _block_bound(levels: float, clipped: float) -> Bound:
    """Return the bound of blocks of 32: a part of a step, the step rounded to float16."""
    return lambda x, largest: _greatest(x, 32) * (clipped / levels + 2**-10) + levels * SMALLEST_HALF


FORMATS: dict[str, Format] = {
    "nf4": Format(
        "nf4",
        _nf4,
        _nf4_bound,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "int8": Format("int8", _int8, _int8_bound, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "float8": Format("float8", _float8, _float8_bound, {}),
    "gguf-q8_0": Format("gguf-q8_0", _gguf("Q8_0"), _block_bound(127, 0.5), {}, "Q8_0"),
    "gguf-q5_0": Format("gguf-q5_0", _gguf("Q5_0"), _block_bound(16, 1), {}, "Q5_0"),
    "gguf-q4_0": Format("gguf-q4_0", _gguf("Q4_0"), _block_bound(8, 1), {}, "Q4_0"),
    "gguf-bf16": Format("gguf-bf16", _gguf("BF16"), None, {}, "BF16"),
    "bf16": Format("bf16", lambda key, weight: {key: weight.bfloat16()}, None, {}),
}
NAMES = ("dfloat11", *FORMATS)
"""What a checkpoint can be converted to."""
