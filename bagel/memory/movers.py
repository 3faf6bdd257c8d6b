"""How weights get from where they are kept to where they are used, while something else is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor


class Mover(Protocol):
    """Fills memory on a device in the background.

    A mark says that something has been done, once it is waited for; None says that it has been done already.
    """

    def start(self, fill: Callable[[Tensor], None], memory: Tensor, after: Any) -> Any:
        """Begin to fill memory once the mark `after` has been reached, and return the mark of its end."""
        ...

    def now(self) -> Any:
        """Return the mark of all that has been computed, or asked for, until now."""
        ...

    def wait(self, mark: Any) -> None:
        """Let what is computed from now on wait for a mark."""
        ...

    def finish(self) -> None:
        """Wait until nothing is being filled any more, whatever became of it."""
        ...


class GPUMover:
    """Copies from the host's memory in a stream of its own, beside what a CUDA GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, fill: Callable[[Tensor], None], memory: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        """Begin to copy; the mark is an event."""
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            fill(memory)
        end = torch.cuda.Event()
        end.record(self.stream)
        return end

    def now(self) -> torch.cuda.Event:
        """Return an event in the current stream."""
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the current stream wait; the CPU goes on."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self.device)


class FileMover(GPUMover):
    """As `GPUMover`, for weights that are read from files: by a thread, lest the GPU's work be launched too late."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def start(self, fill: Callable[[Tensor], None], memory: Tensor, after: Any) -> Future[torch.cuda.Event]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to read; the mark is a future of an event."""
        return self.thread.submit(super().start, fill, memory, after)

    def wait(self, mark: Any) -> None:
        """Wait until all is read and being copied, and raise what went wrong in reading."""
        super().wait(mark.result() if isinstance(mark, Future) else mark)

    def finish(self) -> None:
        """Wait for the thread, then for the GPU."""
        self.thread.submit(int).result()
        super().finish()


class HostMover:
    """Reads by a thread, for the CPU itself: what was computed until now has been computed."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def start(self, fill: Callable[[Tensor], None], memory: Tensor, after: None) -> Future[None]:
        """Begin to read; the mark is a future."""
        return self.thread.submit(fill, memory)

    def now(self) -> None:
        """Return None: nothing is under way."""

    def wait(self, mark: Future[None] | None) -> None:
        """Wait, and raise what went wrong in reading."""
        if mark is not None:
            mark.result()

    def finish(self) -> None:
        """Wait for the thread."""
        self.thread.submit(int).result()


class OrderlyMover:
    """Fills memory at once, for other devices: their copies wait in one queue with what they compute."""

    def start(self, fill: Callable[[Tensor], None], memory: Tensor, after: None) -> None:
        """Fill memory."""
        fill(memory)

    def now(self) -> None:
        """Return None: what follows in the queue comes later."""

    def wait(self, mark: None) -> None:
        """Go on."""

    def finish(self) -> None:
        """Nothing is under way."""


def mover_for(device: torch.device) -> Mover:
    """Return the mover of a device."""
    if device.type == "cuda":
        return GPUMover(device)
    return HostMover() if device.type == "cpu" else OrderlyMover()
