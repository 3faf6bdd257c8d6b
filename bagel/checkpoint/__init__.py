"""Checkpoints: found, fetched, understood, loaded, exported and described.

`Checkpoint.open(folder)` reads JSON files and headers and settles the configuration; `load` then fills a model that
was built on the meta device. `save_checkpoint` writes the official layout back.
"""

from __future__ import annotations

from bagel.checkpoint.checkpoint import Checkpoint
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.export import save_checkpoint, verify_checksums
from bagel.checkpoint.hub import resolve_source
from bagel.checkpoint.keys import official_shapes, targets
from bagel.checkpoint.load import Convert
from bagel.checkpoint.report import inspect_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Convert",
    "inspect_checkpoint",
    "official_shapes",
    "resolve_source",
    "save_checkpoint",
    "targets",
    "verify_checksums",
]
