"""Turn a lack of memory into one sentence that says what was tried and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class NotEnoughMemoryError(MemoryError):
    """The device or the machine has too little memory for what was asked."""


@contextmanager
def explain_out_of_memory(doing: str, *, way_out: str) -> Iterator[None]:
    """Raise NotEnoughMemoryError, saying what was being done and the way out, where torch runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemoryError(f"out of GPU memory while {doing}: {way_out}") from error
    except MemoryError as error:
        known = f" ({error})" if str(error) else ""
        raise NotEnoughMemoryError(f"out of memory while {doing}{known}: {way_out}") from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate" not in str(error):
            raise
        raise NotEnoughMemoryError(f"out of memory while {doing}: {way_out}") from error
