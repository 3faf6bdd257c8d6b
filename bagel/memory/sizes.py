"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": GIB}


def parse_bytes(size: str | int, name: str = "memory", *, least: int = 2**20) -> int:
    """Return the bytes of a size such as "8GiB", "7.5 GB", "500m" or a number of bytes.

    Args:
        size: as it was typed.
        name: what it is the size of, for errors.
        least: bytes below which nothing can have been meant.

    Raises:
        ValueError: it cannot be understood, or is too small.
        TypeError: neither a text nor an integer.
    """
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise TypeError(f'{name} must be a size such as "8GiB" or a number of bytes, got {size!r}')
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(size).lower())
    nbytes = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if found and nbytes < least:
        raise ValueError(f'{name}={size!r} is {nbytes} bytes, too little for anything: add a unit, such as "8GiB"')
    if nbytes < 1:
        raise ValueError(f'{name} must be a size such as "8GiB" or "7500MB", got {size!r}')
    return nbytes


def said(nbytes: float) -> str:
    """Return a number of bytes for a sentence, such as "11.2 GiB" or "5.4 MiB"."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
