"""Draw and answer with weights stored in every format, and compare times and memory with bfloat16 on the same card.

    python -m benchmarks.formats --formats bfloat16 dfloat11 int8 nf4 float8

Random weights of the released sizes. DFloat11 is encoded for one layer, whose compressed weights all layers then hold
copies of: encoding them all would take the host minutes, and neither speed nor size depends on values.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bagel import BagelPipeline
from bagel.memory.placement import place, weight_bytes
from bagel.modeling.stored.dfloat11 import DFloat11Linear
from bagel.modeling.stored.quantize import FORMATS, quantize
from benchmarks.jobs import PROMPT
from benchmarks.weights import random_pipeline

GB = 10**9


def compress(pipe: BagelPipeline) -> None:
    """Let every layer hold the compressed weights of the first one's experts, each in memory of its own."""
    made: dict[str, DFloat11Linear] = {}
    for name, module in list(pipe.model.decoder.layers.named_modules()):
        if isinstance(module, nn.Linear):
            kind = name.partition(".")[2]
            if kind not in made:
                made[kind] = DFloat11Linear.of(copy.deepcopy(module).cpu()).to(module.weight.device)
            own = copy.deepcopy(made[kind])
            own.bias = module.bias
            pipe.model.decoder.layers.set_submodule(name, own)
    if pipe.model.decoder.lm_head is not None:
        head = pipe.model.decoder.lm_head
        pipe.model.decoder.set_submodule("lm_head", DFloat11Linear.of(copy.deepcopy(head).cpu()).to(head.weight.device))


def prepare(pipe: BagelPipeline, form: str) -> None:
    """Store the weights of a pipeline in a format."""
    if form == "dfloat11":
        compress(pipe)
    elif form == "float8":
        quantize(pipe.model, form, parts=("gen", "und"))
    elif form != "bfloat16":
        quantize(pipe.model, form)


def timed(run: Callable[[], Any]) -> tuple[float, Any, float]:
    """Return the seconds that a job takes, its result, and the most memory (GB) that was reserved meanwhile."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, found, torch.cuda.max_memory_reserved() / GB


def measure(form: str, args: argparse.Namespace) -> tuple[str, torch.Tensor]:
    """Return a row of the table, and the latents of the image."""
    pipe = random_pipeline(device="cuda")
    start = time.perf_counter()
    prepare(pipe, form)
    seconds = time.perf_counter() - start
    limit = dict(args.within).get(form)
    if limit is not None:
        for module in filter(None, (pipe.model, pipe.vae)):
            module.to("cpu")
        torch.cuda.empty_cache()
        place(pipe.model, pipe.vae, torch.device("cuda"), limit=int(limit * GB))
        torch.cuda.set_per_process_memory_fraction(limit * GB / torch.cuda.get_device_properties(0).total_memory)
    options: dict[str, Any] = {"height": args.side, "width": args.side, "seed": 0, "progress": False}

    def draw(timesteps: int = args.timesteps) -> torch.Tensor:
        return pipe.text_to_image(PROMPT, num_timesteps=timesteps, **options).latents

    def answer(tokens: int = args.tokens) -> Any:
        return pipe.understand([], PROMPT, max_new_tokens=tokens, progress=False)

    for run in (lambda: draw(4), answer, answer):
        run()
    torch.cuda.empty_cache()
    image, latents, peak = timed(draw)
    first, _, _ = timed(lambda: answer(args.tokens // 4))
    text, _, text_peak = timed(answer)
    weights = weight_bytes(pipe.model, pipe.vae) / GB
    speed = (args.tokens - args.tokens // 4) / (text - first)
    row = f"{form:<11}{weights:8.2f} GB{image:9.2f} s{peak:9.2f} GB{speed:9.0f} token/s{text_peak:9.2f} GB"
    torch.cuda.set_per_process_memory_fraction(1.0)
    return f"{row}   (stored in {seconds:.0f} s{'' if limit is None else f', within {limit:g} GB'})", latents


def _limit(text: str) -> tuple[str, float]:
    form, _, size = text.partition("=")
    return form, float(size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__)
    every = ["bfloat16", "dfloat11", *FORMATS]
    parser.add_argument("--formats", nargs="+", choices=every, default=every, metavar="FORMAT")
    parser.add_argument(
        "--within", nargs="+", type=_limit, default=[], metavar="FORMAT=GB", help="limits of memory for some formats"
    )
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args(arguments)
    print(f"{'format':<11}{'weights':>11}{'image':>11}{'peak':>12}{'text, batch 1':>17}{'peak':>12}")
    for form in args.formats:
        try:
            print(measure(form, args)[0], flush=True)
        except Exception as error:
            print(f"{form:<11}{type(error).__name__}: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
