"""The command that looks at a checkpoint: `bagel inspect`."""

from __future__ import annotations

from argparse import Namespace

from bagel.checkpoint import CheckpointError, inspect_checkpoint, verify_checksums


def inspect(args: Namespace) -> None:
    """Print what a folder holds; with --verify, also whether its files are what they were when they were exported."""
    print(inspect_checkpoint(args.folder))
    if not args.verify:
        return
    names = verify_checksums(args.folder)
    if not names:
        raise CheckpointError(f"{args.folder} has no SHA256SUMS to verify its files with; exports of this library do")
    print(f"\n{len(names)} files match SHA256SUMS")
