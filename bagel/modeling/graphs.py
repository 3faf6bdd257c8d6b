"""CUDA graphs: the GPU repeats what it did before, without waiting for the CPU to launch every kernel again.

A graph replays the very same work on the very same memory.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bagel.kernels import is_watched
from bagel.modeling.bagel import Bagel

Addresses = tuple[tuple[int, torch.dtype], ...]


class GraphMemory:
    """The memory of the graphs of one pipeline, which the next may use when they are gone; each thread has its own.

    A graph's memory is apart from all other, and would be taken afresh from the GPU for every one. A copy of this is
    empty.
    """

    def __init__(self) -> None:
        self.own = threading.local()

    def capture(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the graph of a computation on the current GPU, and where its result lies after a replay."""
        kept = self.own.__dict__.setdefault("of_gpu", {})
        gpu = torch.cuda.current_device()
        if gpu not in kept:  # memory lasts as long as one graph in it, and serves one stream
            stream = torch.cuda.Stream()
            kept[gpu] = stream, _captured(lambda: torch.zeros(1, device="cuda"), stream)[0]
        stream, anchor = kept[gpu]
        return _captured(compute, stream, anchor.pool())

    def clear(self) -> None:
        """Give up the memory of this thread, or leave it to the graphs that are still there."""
        self.own.__dict__.clear()

    def __reduce__(self) -> tuple[type[GraphMemory], tuple[()]]:
        return GraphMemory, ()


class Replayed:
    """A function of one tensor, always of the same shape: computed the first time, captured the second, then replayed.

    The first use may allocate, choose kernels and compile, which a graph cannot. Where no graph can be made, or has no
    room, it is computed every time.

    Args:
        compute: reads only memory that stays where it is, besides the model's weights.
        model: what it computes with.
        memory: of the graph.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], model: Bagel, memory: GraphMemory) -> None:
        self.compute, self.model, self.memory = compute, model, memory
        self.weights: Addresses = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_room = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function returns for x, in memory of its own."""
        if not self.has_room or not can_capture(self.model):
            return self.compute(x)
        weights = addresses(self.model)
        if weights != self.weights:
            self.weights, self.graph = weights, None
            return self.compute(x)
        if self.graph is None:
            self.x = torch.empty_like(x)
            with suppress(torch.OutOfMemoryError):  # what torch keeps for reuse is not given up within a capture
                self.graph, self.out = self.memory.capture(lambda: self.compute(self.x))
        if self.graph is None:
            self.has_room = False
            self.memory.clear()
            return self.compute(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.out.clone()


def _captured(
    compute: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture without what `torch.cuda.graph` begins with: it waits for the GPU, and gives up memory."""
    graph = torch.cuda.CUDAGraph()
    with capturing(), torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            out = compute()
        except BaseException:
            with suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, out


_one_at_a_time = threading.Lock()


@contextmanager
def capturing() -> Iterator[None]:
    """Keep other captures away, and garbage from being collected: a graph that is freed would spoil the one made."""
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def can_capture(model: Bagel) -> bool:
    """Whether graphs can be made of a model: it is on the current GPU, and a graph would do what calling it does.

    So there are no gradients, no autocast, no hooks, and no layers whose `forward` was replaced.
    """
    if model.device.type != "cuda" or model.device.index != torch.cuda.current_device():
        return False
    changed = any(is_watched(module) or "forward" in module.__dict__ for module in model.decoder.modules())
    hooked = changed or nn.modules.module._has_any_global_hook()
    return not hooked and not torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()


def addresses(model: Bagel) -> Addresses:
    """Where the decoder's weights are: a graph reads them there, whatever becomes of the modules."""
    decoder = model.decoder
    return tuple((x.data_ptr(), x.dtype) for part in (decoder.parameters(), decoder.buffers()) for x in part)
