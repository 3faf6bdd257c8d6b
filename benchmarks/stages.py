"""Where the time of one run goes: its stages, timed without waiting in between, and its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from bagel.modeling import Bagel, Denoiser
from bagel.vae import Autoencoder
from benchmarks.measure import wait

WATCHED: tuple[tuple[type, str, Callable[..., str]], ...] = (
    (Autoencoder, "encode", lambda *_: "vae encode"),
    (Autoencoder, "decode", lambda *_: "vae decode"),
    (Bagel, "prefill", lambda *_: "prefill"),
    (Bagel, "embed_patches", lambda *_: "  vit, within prefill"),
    (Bagel, "decode", lambda *_: "decode"),
    (Denoiser, "states", lambda _self, _x, _t, active: f"evaluation, {len(active)} branch{_es(active)}"),
)
"""Class, method, and the name of the stage that a call with these arguments is."""

KERNELS = 20  # lines of the breakdown


def _es(items: tuple) -> str:
    return "es" if len(items) > 1 else ""


@dataclass(frozen=True)
class Stage:
    """One kind of stage: the milliseconds of each time it ran, in order."""

    name: str
    ms: tuple[float, ...]


def stages(call: Callable[[], Any], device: torch.device) -> list[Stage]:
    """Run a call and return its stages, in the order of their first start; what lies between them is "the rest"."""
    marks: dict[str, list[tuple[Any, Any]]] = {}
    with _watch(marks, device):
        wait(device)
        start = _mark(device)
        call()
        end = _mark(device)
        wait(device)
    found = [Stage(name, tuple(_between(a, b) for a, b in pairs)) for name, pairs in marks.items()]
    inside = sum(sum(stage.ms) for stage in found if not stage.name.startswith(" "))
    return [*found, Stage("the rest", (_between(start, end) - inside,))]


@contextmanager
def _watch(marks: dict[str, list[tuple[Any, Any]]], device: torch.device) -> Iterator[None]:
    def watched(method: Callable, name_of: Callable[..., str]) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            pairs = marks.setdefault(name_of(*args), [])
            start = _mark(device)
            result = method(*args, **options)
            pairs.append((start, _mark(device)))
            return result

        return call

    with ExitStack() as stack:
        for owner, method, name_of in WATCHED:
            stack.enter_context(patch.object(owner, method, watched(getattr(owner, method), name_of)))
        yield


def _mark(device: torch.device) -> Any:
    """Return the present: on a GPU an event in its queue, so that nothing has to be waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def kernels(call: Callable[[], Any], device: torch.device) -> list[tuple[str, int, float]]:
    """Run a call under `torch.profiler` and return its kernels: name, count, milliseconds, the costliest first."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True) as profiler:
        call()
        wait(device)
    found = [
        (event.key, event.count, (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000)
        for event in profiler.key_averages()
    ]
    return sorted((kernel for kernel in found if kernel[2] > 0), key=lambda kernel: -kernel[2])


def breakdown(call: Callable[[], Any], device: torch.device) -> str:
    """Run a call twice and return the text that tells its stages and its costliest kernels."""
    found = stages(call, device)
    lines = [f"  {'stage':<28}{'count':>7}{'total ms':>11}{'median':>9}{'least':>9}{'most':>9}"]
    for stage in found:
        ms = stage.ms
        figures = f"{sum(ms):>11.2f}{statistics.median(ms):>9.2f}{min(ms):>9.2f}{max(ms):>9.2f}"
        lines.append(f"  {stage.name:<28}{len(ms):>7}{figures}")
    busy = kernels(call, device)
    total = sum(ms for _, _, ms in busy)
    lines.append(f"  {sum(count for _, count, _ in busy)} kernels or operations, {total:.1f} ms in all, of which")
    for name, count, ms in busy[:KERNELS]:
        lines.append(f"  {ms:>11.2f} ms{100 * ms / total:>6.1f}%{count:>8} x  {name[:90]}")
    return "\n".join(lines)
