"""The command that writes a checkpoint in another format: `bagel convert`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from bagel.checkpoint import resolve_source
from bagel.checkpoint.convert import convert_checkpoint
from bagel.cli.arguments import BUILT_IN
from bagel.cli.errors import UsageError
from bagel.demo import CHECKPOINT
from bagel.memory.sizes import parse_bytes, said


def convert(args: Namespace) -> None:
    """Convert a checkpoint, and tell of every file and of the sizes before and after."""
    try:
        size = None if args.shard is None else parse_bytes(args.shard, "--shard", least=1)
    except ValueError as error:
        raise UsageError(str(error)) from error
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
    print(f"{args.folder}: {len(names)} files, {said(total)}")
