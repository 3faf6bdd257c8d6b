"""The one error of the command line itself."""

from __future__ import annotations


class UsageError(ValueError):
    """The command was asked for something that cannot be meant; exit code 2."""
