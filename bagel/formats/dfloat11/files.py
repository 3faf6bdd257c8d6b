"""Which matrices the units of a DFloat11 checkpoint hold, and the files that such a checkpoint consists of.

A regular expression for the names of modules stands beside the weights that its unit holds, in their order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bagel.formats.dfloat11.decoding import decode
from bagel.formats.dfloat11.unit import WINDOW_BITS, WINDOWS, Piece, Unit, check, cut

VERSION = "0.2.0"
"""Written into configurations: the version whose layout BAGEL's release has; later ones have the same."""
Patterns = Mapping[str, Sequence[str]]
"""Regular expressions of modules, and the modules in them whose weights a unit holds; none: the module's own."""

PROJECTIONS = ("q", "k", "v", "o")
EXPERTS = ("", "_moe_gen")
LAYER = (
    *(f"self_attn.{part}_proj{expert}" for expert in EXPERTS for part in PROJECTIONS),
    *(f"mlp{expert}.{part}_proj" for expert in EXPERTS for part in ("gate", "up", "down")),
)
"""The matrices of a decoder layer in the order of BAGEL's release."""
VIT_LAYER = (*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
PARTS = Unit._fields


class Opened(NamedTuple):
    """A unit whose matrices have names; see `open_unit`."""

    unit: Unit
    ranges: dict[str, tuple[int, int]]

    def dense(self, name: str) -> Tensor:
        """Return the bfloat16 weights (numel,) of a matrix."""
        return decode(self.unit, *self.ranges[name])

    def piece(self, names: Sequence[str]) -> Piece:
        """Return matrices that follow each other in the unit, as one range of it.

        Raises:
            ValueError: they do not.
        """
        ranges = [self.ranges[name] for name in names]
        if any(one[1] != other[0] for one, other in itertools.pairwise(ranges)):
            raise ValueError(
                f"{', '.join(names)} do not follow each other in their DFloat11 unit; decode them one by one"
            )
        return cut(self.unit, ranges[0][0], ranges[-1][1])


# Reading --------------------------------------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the patterns that the `config.json` of a DFloat11 checkpoint holds.

    Raises:
        ValueError: it holds none, or describes units of another kind.
    """
    section = config.get("dfloat11_config")
    if not isinstance(section, Mapping):
        raise ValueError(
            "config.json has no dfloat11_config: weights of DFloat11 0.1.0, which lack it, cannot be read; "
            "fetch a checkpoint of version 0.2.0 or later"
        )
    if str(section.get("version", VERSION)).startswith("0.1."):
        raise ValueError(f"DFloat11 {section['version']} cannot be read; fetch a checkpoint of version 0.2.0 or later")
    for name, wanted in (("threads_per_block", [WINDOWS]), ("bytes_per_thread", WINDOW_BITS // 8)):
        found = section.get(name)
        if found not in (wanted, (wanted[0] if isinstance(wanted, list) else wanted)):
            raise ValueError(f"dfloat11_config in config.json has {name} {found}, and only {wanted} can be read")
    patterns = section.get("pattern_dict")
    if not isinstance(patterns, Mapping) or not all(isinstance(names, list) for names in patterns.values()):
        raise ValueError("dfloat11_config in config.json has no pattern_dict of lists of modules; fetch the file again")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"dfloat11_config in config.json has a broken pattern, {pattern!r} ({error})") from error
    return {pattern: tuple(names) for pattern, names in patterns.items()}


def units_of(keys: Iterable[str], patterns: Patterns) -> dict[str, tuple[str, ...]]:
    """Return for the prefix of every unit among the keys of a checkpoint the names of its weights, in order.

    Raises:
        ValueError: a unit that lacks a tensor, or that no pattern describes.
    """
    there = set(keys)
    found: dict[str, tuple[str, ...]] = {}
    for prefix in sorted(key.rpartition(".")[0] for key in there if key.endswith(".encoded_exponent")):
        missing = [part for part in PARTS if f"{prefix}.{part}" not in there]
        if missing:
            raise ValueError(f"the DFloat11 unit {prefix} lacks {', '.join(missing)}; fetch it again")
        modules = next((names for pattern, names in patterns.items() if re.fullmatch(pattern, prefix)), None)
        if modules is None:
            raise ValueError(
                f"no pattern of dfloat11_config says what the DFloat11 unit {prefix} holds; it cannot be read"
            )
        found[prefix] = tuple(f"{prefix}.{name}.weight" for name in modules) or (f"{prefix}.weight",)
    return found


def open_unit(read: Callable[[str], Tensor], prefix: str, names: Sequence[str]) -> Opened:
    """Return a unit by its prefix, checked, with the ranges of its weights.

    Args:
        read: returns a tensor of the checkpoint by its name.
        prefix: of the unit.
        names: of its weights in order, see `units_of`.

    Raises:
        ValueError: see `check`; or it holds another number of matrices.
    """
    unit = check(Unit(*(read(f"{prefix}.{part}") for part in PARTS)), prefix)
    starts = unit.starts
    if len(starts) != len(names) + 1:
        raise ValueError(
            f"the DFloat11 unit {prefix} holds {len(starts) - 1} matrices by split_positions, "
            f"but {len(names)} by dfloat11_config; fetch it again"
        )
    return Opened(unit, dict(zip(names, itertools.pairwise(starts), strict=True)))


# Writing --------------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file to be written.

    Attributes:
        prefix: of the unit in it; "" for none.
        weights: names of the unit's matrices, in order.
        plain: names of the tensors that are kept as they are.
    """

    prefix: str
    weights: tuple[str, ...]
    plain: tuple[str, ...]


def patterns_for(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the patterns for a BAGEL model of these official keys; for the released one they are its release's."""
    there = set(keys)
    layers = [key for key in there if re.match(r"language_model\.model\.layers\.\d+\.", key)]
    decoder = [name for name in LAYER if any(key.endswith(f".{name}.weight") for key in layers)]
    count = 1 + max(
        (int(key.split(".")[4]) for key in there if key.startswith("vit_model.vision_model.enc")), default=-1
    )
    vit = [f"vision_model.encoder.layers.{layer}.{name}" for layer in range(count) for name in VIT_LAYER]
    vit.append("vision_model.embeddings.patch_embedding")
    found = {
        r"language_model\.model\.embed_tokens": ("language_model.model.embed_tokens.weight", []),
        r"language_model\.model\.layers.\d+": (layers, decoder),
        r"language_model\.lm_head": ("language_model.lm_head.weight", []),
        r"vit_model": ("vit_model.vision_model.embeddings.patch_embedding.weight", vit),
    }
    return {
        pattern: names for pattern, (key, names) in found.items() if (key in there if isinstance(key, str) else key)
    }


def files_for(keys: Iterable[str]) -> dict[str, File]:
    """Return the files of a DFloat11 checkpoint with these official keys, by name."""
    left, files = dict.fromkeys(keys), {}
    for pattern, modules in patterns_for(left).items():
        prefixes = {found.group(): None for key in left if (found := re.match(rf"{pattern}(?=\.)", key))}
        for prefix in prefixes:
            weights = tuple(f"{prefix}.{name}.weight" for name in modules) or (f"{prefix}.weight",)
            plain = tuple(key for key in left if key.startswith(f"{prefix}.") and key not in weights)
            files[f"{prefix.replace('.', '_')}.safetensors"] = File(prefix, weights, plain)
    held = {key for file in files.values() for key in (*file.weights, *file.plain)}
    rest = tuple(key for key in left if key not in held)
    return files | ({"model.safetensors": File("", (), rest)} if rest else {})


def unit_tensors(prefix: str, unit: Unit) -> dict[str, Tensor]:
    """Return the tensors of a unit by the names that files give them."""
    return {f"{prefix}.{part}": tensor for part, tensor in unit._asdict().items()}


def config_section(keys: Iterable[str]) -> dict[str, Any]:
    """Return what `config.json` holds as `dfloat11_config` for a BAGEL model of these official keys."""
    return {
        "version": VERSION,
        "threads_per_block": [WINDOWS],
        "bytes_per_thread": WINDOW_BITS // 8,
        "pattern_dict": patterns_for(keys),
    }
