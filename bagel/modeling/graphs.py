"""CUDA graphs: the GPU repeats what it did before, without waiting for the CPU to launch every kernel again.

A graph replays the very same work on the very same memory. What is kept here between uses is scratch: no result depends
on what it holds.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bagel.kernels import is_own

Signature = tuple[Any, ...]


class Graphs:
    """What a model keeps for its graphs: the memory of the last ones, and the last decode step. A copy is empty."""

    def __init__(self) -> None:
        self.memory = GraphMemory()
        self.decode_step: Any = None
        """A `bagel.modeling.decoding.DecodeStep`; whoever takes it has it alone until it is given back."""

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()


class GraphMemory:
    """The memory of the graphs of one model, which the next may use when they are gone; each thread has its own.

    A graph's memory is apart from all other, and would be taken afresh from the GPU for every one.
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


class Replayed:
    """A function of one tensor, always of the same shape: computed the first time, captured the second, then replayed.

    The first use may allocate, choose kernels and compile, which a graph cannot. Where no graph can be made, or has no
    room, it is computed every time.

    Args:
        compute: reads only memory that stays where it is, besides the decoder's weights.
        decoder: what it computes with.
        memory: of the graph.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], decoder: nn.Module, memory: GraphMemory) -> None:
        self.compute, self.decoder, self.memory = compute, decoder, memory
        self.signature: Signature = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_room = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function returns for x, in memory of its own."""
        if not self.has_room or not can_capture(self.decoder):
            return self.compute(x)
        signature = signature_of(self.decoder)
        if signature != self.signature:
            self.signature, self.graph = signature, None
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


def can_capture(decoder: Any) -> bool:
    """Whether graphs can be made of a decoder: it is on the current GPU, and a graph would do what calling it does.

    So there are no gradients, no autocast, no hooks, no layers whose `forward` was replaced, and none of classes from
    elsewhere, whose results may depend on more than their weights.
    """
    device = decoder.device
    if device.type != "cuda" or device.index != torch.cuda.current_device():
        return False
    if torch.is_autocast_enabled("cuda") or torch.is_grad_enabled() or nn.modules.module._has_any_global_hook():
        return False
    return all(_repeats(module) for module in decoder.modules())


def _repeats(module: nn.Module) -> bool:
    known = type(module).__module__.partition(".")[0] in ("bagel", "torch")
    return known and is_own(module, type(module))


def signature_of(decoder: nn.Module) -> Signature:
    """Return what a graph of a decoder depends on: which modules it has, and where their weights are."""
    modules = tuple(weakref.ref(module) for module in decoder.modules())
    tensors = (*decoder.parameters(), *decoder.buffers())
    return (*modules, *((x.data_ptr(), x.dtype) for x in tensors))
