"""The command that writes a checkpoint in another format: `bagel convert`."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

from bagel.checkpoint import resolve_source
from bagel.checkpoint.convert import convert_checkpoint
from bagel.cli.arguments import BUILT_IN
from bagel.cli.errors import UsageError
from bagel.demo import CHECKPOINT

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def convert(args: Namespace) -> None:
    """Convert a checkpoint, and tell of every file and of the sizes before and after."""
    size = None if args.shard is None else parse_size(args.shard)
    source = resolve_source(
        CHECKPOINT if args.source == BUILT_IN else args.source,
        revision=args.revision,
        alone=args.base is None,
        weights=args.weights,
    )
    base = None if args.base is None else resolve_source(args.base)
    names = convert_checkpoint(
        source,
        args.folder,
        to=args.to,
        base=base,
        weights=args.weights,
        max_shard_bytes=size,
        every_linear=args.every_linear,
        report=lambda name, what: print(f"{name}: {what}", file=sys.stderr),
    )
    total = sum((Path(args.folder).expanduser() / name).stat().st_size for name in names)
    print(f"{args.folder}: {len(names)} files, {total / 2**30:.2f} GiB")


def parse_size(text: str) -> int:
    """Return the bytes that a size such as "4GB", "500M" or "2GiB" means; raises UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--shard must be a size such as 4GB or 500MB, got {text!r}")
    return max(round(float(found[1]) * UNITS[found[2] or ""]), 1)
