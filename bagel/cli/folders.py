"""The command that looks at a checkpoint: `bagel inspect`."""

from __future__ import annotations

from argparse import Namespace

from bagel.checkpoint import inspect_checkpoint, verify_checksums


def inspect(args: Namespace) -> None:
    """Print what a folder holds; with --verify, also whether its files are what they were when they were exported."""
    print(inspect_checkpoint(args.folder))
    if not args.verify:
        return
    print(f"\n{len(verify_checksums(args.folder))} files match SHA256SUMS")
