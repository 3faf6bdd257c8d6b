"""The one error of this package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, trusted or written; the message names the file and the way out."""
