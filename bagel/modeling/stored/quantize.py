"""Which layers of a model hold their weights in fewer bits, and how: in a loaded model, or while one is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bagel.modeling import float8
from bagel.modeling.bagel import Bagel
from bagel.modeling.float8 import Float8Linear
from bagel.modeling.stored.int8 import Int8Linear
from bagel.modeling.stored.nf4 import FP4Linear, NF4DoubleLinear, NF4Linear

Convert = Callable[[str, nn.Linear], nn.Module]
"""Takes a layer and its name, as `named_modules` of a model tells it; returns what stands in its place, or itself."""


def _accept(linear: nn.Linear, name: str) -> None:
    """Refuse no layer."""


class Format(NamedTuple):
    """One way to store the weights of linear layers."""

    layer: Any  # a class with `of(linear)`
    bits: float  # of a weight, its share of the scales included
    says: str
    inner: bool = False  # the first and the last decoder layer, next to the embeddings and the heads, stay
    check: Callable[[Any, str], None] = _accept  # raises ValueError for a layer that it cannot store


FORMATS = {
    "float8": Format(
        Float8Linear,
        8.0,
        "8-bit floats, in both factors: half the memory; the fastest images, on GPUs from 2022 on",
        inner=True,
        check=float8.check,
    ),
    "int8": Format(
        Int8Linear, 8.1, "8-bit integers, in both factors: half the memory; fast images on GPUs from 2020 on"
    ),
    "nf4": Format(NF4Linear, 4.5, "4 bits per weight, inputs as they are: 28 % of the memory; the fastest text"),
    "nf4-double": Format(
        NF4DoubleLinear, 4.13, "as nf4, with its scales in 8 bits: 26 % of the memory, a little slower"
    ),
    "fp4": Format(FP4Linear, 4.5, "as nf4 with 4-bit floats, for weights that are stored so: less exact"),
}
"""What may be asked for by name, with what it does, beside bfloat16."""
PARTS = {
    "und": r"decoder\.layers\.(\d+)\.und\..+",
    "gen": r"decoder\.layers\.(\d+)\.gen\..+",
    "lm_head": r"decoder\.lm_head",
    "vit": r"vit\..+",
}
"""Parts of a model: the layers of both experts, the head of the language model, and the vision encoder."""
EXPERTS = ("gen", "und")
"""The parts that are quantised by default: nine tenths of the released model's weights."""


def converter(format: str, *, parts: str | Sequence[str] = EXPERTS, layers: int) -> Convert:
    """Return what quantises the linear layers of some parts of a model, one by one, as they are loaded.

    Args:
        format: a key of `FORMATS`.
        parts: keys of `PARTS`, or "all".
        layers: how many decoder layers the model has; float8 leaves the first and the last.

    Raises:
        ValueError: an unknown format or part. What is returned raises it for layers that the format cannot store.
    """
    chosen, wanted = _chosen(format, parts, layers)

    def convert(name: str, linear: nn.Linear) -> nn.Module:
        if not wanted(name):
            return linear
        chosen.check(linear, name)
        return chosen.layer.of(linear)

    return convert


def saved_bytes(
    model: Bagel,
    dtype: torch.dtype,
    format: str,
    parts: str | Sequence[str] = EXPERTS,
    *,
    kept: Collection[str] = (),
) -> int:
    """Return about how many bytes less a model takes if it is quantised, which may be on the meta device.

    `kept` names layers that stay as they are stored, and so are not quantised.

    Raises:
        ValueError: an unknown format or part, or all these layers are kept.
    """
    chosen, wanted = _chosen(format, parts, len(model.decoder.layers))
    names = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and wanted(name)}
    linears = [part for name, part in names.items() if name not in kept]
    if names and not linears:
        raise ValueError(
            f"these weights are compressed already, so there is nothing to store as {format}: leave it out, or decode "
            "them first with expand=True"
        )
    return int(sum(linear.weight.numel() for linear in linears) * (dtype.itemsize - chosen.bits / 8))


def check_format(name: str) -> None:
    """Raise ValueError for a name that is none of `FORMATS`."""
    if name not in FORMATS:
        raise ValueError(
            f"there is no format named {name!r}; there are {', '.join(FORMATS)}, and `bagel convert` writes more"
        )


def _chosen(format: str, parts: str | Sequence[str], layers: int) -> tuple[Format, Callable[[str], bool]]:
    """Return a format, and what tells the layers that are to be stored so by their names."""
    check_format(format)
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    parts = tuple(PARTS) if "all" in parts else parts
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(
            f"parts of a model are {', '.join(PARTS)}, or all; got {', '.join(map(repr, parts)) or 'none'}"
        )
    chosen, pattern = FORMATS[format], re.compile("|".join(PARTS[part] for part in parts))

    def wanted(name: str) -> bool:
        found = pattern.fullmatch(name)
        index = found and next(filter(None, found.groups()), None)
        return found is not None and not (chosen.inner and index is not None and int(index) in (0, layers - 1))

    return chosen, wanted


def quantize(model: Bagel, format: str, *, parts: str | Sequence[str] = EXPERTS) -> int:
    """Quantise linear layers of a loaded model in place, on its device, and return how many.

    A part that the model does not have is left out. What is quantised cannot be quantised again, nor exported.

    Args:
        model: loaded.
        format: a key of `FORMATS`.
        parts: keys of `PARTS`, or "all".

    Raises:
        ValueError: an unknown format or part, a layer that the format cannot store, or none to quantise: nothing is
            changed then; or a weight that is NaN or infinite.
    """
    chosen, wanted = _chosen(format, parts, len(model.decoder.layers))
    # Names only: each weight is freed as soon as another has taken its place.
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and wanted(name)]
    if not names:
        named = parts if isinstance(parts, str) else ", ".join(parts)
        raise ValueError(
            f"this model has no linear layer to quantise in {named}: they were quantised before, or were not loaded"
        )
    for name in names:
        chosen.check(model.get_submodule(name), name)
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, chosen.layer.of(getattr(owner, last)))
    return len(names)
