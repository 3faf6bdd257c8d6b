"""CUDA graphs: the GPU repeats what it did before, without waiting for the CPU to launch every kernel again.

A graph replays the very same work on the very same memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
            self.x = x.clone()
            try:
                self.graph, self.out = self.memory.capture(lambda: self.compute(self.x))
            except torch.OutOfMemoryError:  # what torch keeps for reuse is not given up while a graph is captured
                self.has_room = False
                return self.compute(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.out.clone()


def _captured(
    compute: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture without what `torch.cuda.graph` begins with: it waits for the GPU, and gives up memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            out = compute()
        finally:
            graph.capture_end()
    return graph, out


def can_capture(model: Bagel) -> bool:
    """Whether graphs can be made of a model: it is on the current GPU, and nobody watches its layers or casts them."""
    if model.device.type != "cuda" or model.device.index != torch.cuda.current_device():
        return False
    watched = any(map(is_watched, model.decoder.modules()))
    return not watched and not torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()


def addresses(model: Bagel) -> Addresses:
    """Where the decoder's weights are: a graph reads them there, whatever becomes of the modules."""
    decoder = model.decoder
    return tuple((x.data_ptr(), x.dtype) for part in (decoder.parameters(), decoder.buffers()) for x in part)
