"""Turn a lack of memory into one sentence that says what was tried and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class NotEnoughMemoryError(MemoryError):
    """The device or the machine has too little memory for what was asked."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, which has no one class for it, means a lack of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("out of memory", "not enough memory", "can't allocate")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def explain_out_of_memory(doing: str, *, way_out: str) -> Iterator[None]:
    """Raise NotEnoughMemoryError, saying what was being done and the way out, where torch runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemoryError(f"out of GPU memory while {doing}: {way_out}") from error
    except NotEnoughMemoryError:  # explained already, nearer to what was being done
        raise
    except MemoryError as error:
        known = f" ({error})" if str(error) else ""
        raise NotEnoughMemoryError(f"out of memory while {doing}{known}: {way_out}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(f"out of memory while {doing}: {way_out}") from error
