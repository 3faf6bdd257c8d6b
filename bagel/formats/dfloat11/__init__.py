"""DFloat11 (arXiv 2504.11651): bfloat16 weights without loss in about 11 bits; units, their codec, and their files."""

from bagel.formats.dfloat11.decoding import decode, decode_piece
from bagel.formats.dfloat11.encoding import encode
from bagel.formats.dfloat11.files import (
    File,
    Opened,
    config_section,
    files_for,
    open_unit,
    patterns_for,
    read_config,
    unit_tensors,
    units_of,
)
from bagel.formats.dfloat11.unit import LOOKUP_BITS, WINDOWS, Limits, Piece, Unit, check, cut, limits_of, lookup_of

__all__ = [
    "LOOKUP_BITS",
    "WINDOWS",
    "File",
    "Limits",
    "Opened",
    "Piece",
    "Unit",
    "check",
    "config_section",
    "cut",
    "decode",
    "decode_piece",
    "encode",
    "files_for",
    "limits_of",
    "lookup_of",
    "open_unit",
    "patterns_for",
    "read_config",
    "unit_tensors",
    "units_of",
]
