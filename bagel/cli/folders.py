"""The command that looks at a checkpoint: `bagel inspect`."""

from __future__ import annotations

from argparse import Namespace

from bagel.checkpoint import inspect_checkpoint, verify_checksums
from bagel.cli.arguments import BUILT_IN
from bagel.demo import CHECKPOINT


def inspect(args: Namespace) -> None:
    """Print what a folder holds; with --verify, also whether its files are what they were when they were exported."""
    folder = CHECKPOINT if args.folder == BUILT_IN else args.folder
    print(inspect_checkpoint(folder))
    if not args.verify:
        return
    print(f"\n{len(verify_checksums(folder))} files match SHA256SUMS")
