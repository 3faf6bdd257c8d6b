"""Draw, edit and answer within limits of GPU memory, and compare times and bits with no limit on the same card.

    python -m benchmarks.limits --limits 24 16 12 8

Random weights of the released sizes. Each limit is imposed by `torch.cuda.set_per_process_memory_fraction` too, so that
exceeding it fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from bagel import BagelPipeline
from bagel.memory.placement import place, weight_bytes
from benchmarks.jobs import INSTRUCTION, PROMPT
from benchmarks.weights import random_pipeline

GIB = 2**30


def jobs_of(pipe: BagelPipeline, side: int, timesteps: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return what is run, by name; each returns what must be the same within a limit."""
    image = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    options: dict[str, Any] = {"num_timesteps": timesteps, "height": side, "width": side, "seed": 0, "progress": False}
    return {
        "t2i": lambda: pipe.text_to_image(PROMPT, **options).latents,
        "edit": lambda: pipe.edit(image, INSTRUCTION, **options).latents,
        "text": lambda: torch.tensor(pipe.understand([], PROMPT, max_new_tokens=tokens, progress=False).token_ids),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a job takes and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, found


def line(name: str, seconds: dict[str, float], peaks: dict[str, float], notes: str) -> str:
    """Return a row of the table."""
    return f"{name:<10}" + "".join(f"{job:>6} {seconds[job]:7.2f} s {peaks[job]:6.2f} GiB" for job in seconds) + notes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--limits", type=float, nargs="*", default=[24, 16, 12, 8], metavar="GIB")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--jobs", nargs="+", choices=["t2i", "edit", "text"], default=["t2i", "edit", "text"])
    parser.add_argument("--warm", action="store_true", help="run each job twice, of which the second counts")
    args = parser.parse_args(arguments)
    device = torch.device("cuda")
    pipe = random_pipeline(device=device)
    whole = torch.cuda.get_device_properties(device).total_memory
    jobs = {
        name: run for name, run in jobs_of(pipe, args.side, args.timesteps, args.tokens).items() if name in args.jobs
    }
    for run in jobs_of(pipe, args.side, 3, 8).values():
        run()
    base, results, peaks = {}, {}, {}
    weights = weight_bytes(pipe.model, pipe.vae)
    for name, run in jobs.items():
        torch.cuda.empty_cache()
        base[name], results[name] = timed(run)
        peaks[name] = torch.cuda.max_memory_allocated() / GIB
    print(f"weights {weights / GIB:.2f} GiB; allocated beside them at most:")
    print({name: round(peak - weights / GIB, 3) for name, peak in peaks.items()})
    print(line("no limit", base, peaks, ""), flush=True)
    start = time.perf_counter()
    for module in filter(None, (pipe.model, pipe.vae)):
        module.to("cpu")
    pipe.model.graphs.memory.clear()
    pipe.model.graphs.decode_step = None
    torch.cuda.empty_cache()
    print(f"to the host: {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    supply = place(pipe.model, pipe.vae, device, limit=int(args.limits[0] * GIB))
    print(f"placed: {time.perf_counter() - start:.1f} s, fixed {supply.fixed / GIB:.2f} GiB", flush=True)
    for limit in args.limits:
        supply.release()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        supply.limit = int(limit * GIB)
        torch.cuda.set_per_process_memory_fraction(supply.limit / whole)
        seconds, highs, notes = {}, {}, []
        for name, run in jobs.items():
            try:
                seconds[name], found = timed(run)
                if args.warm:
                    seconds[name], found = timed(run)
                highs[name] = torch.cuda.max_memory_reserved() / GIB
                same = "same" if found.equal(results[name]) else "OTHER"
                notes.append(f" {name} {seconds[name] / base[name]:.3f}x, {same} bits")
            except Exception as error:
                print(f"{limit} {name}: {type(error).__name__}: {error}", file=sys.stderr)
            notes.append(f" ({len(supply.stays)}/{len(supply.order)} stay)")
        print(line(f"{limit:g} GiB", seconds, highs, ";".join(notes)), flush=True)


if __name__ == "__main__":
    main()
