"""What every format and every approximation costs: tasks done right by the built-in model, and the error of a layer.

    python -m benchmarks.prices --count 250
    python -m benchmarks.prices --ways exact int8 nf4 --count 50

Rates stand with their 95 % intervals, of the same examples and noise in every row. The last column is the error of the
output of a layer of the released width relative to its norm, in float32 beside float64, where the activations have the
outlier channels that real models have: eight of 3,584 are sixty times as large as the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.evaluation.evaluate import evaluate
from bagel.evaluation.table import Row
from bagel.modeling.linear import Linear
from bagel.modeling.stored.quantize import FORMATS, quantize

COLUMNS = {
    "draw: one object, everything stated": "one object",
    "draw: two objects and their relation": "two objects",
    "draw: three objects, counted": "three objects",
    "edit: all": "edits",
    "caption: all attributes": "captions",
    "question: all": "questions",
}
WAYS: dict[str, tuple[Callable[[BagelPipeline], Any], dict[str, Any]]] = {
    "exact": (lambda pipe: None, {}),
    "bfloat16": (lambda pipe: None, {"dtype": "bfloat16"}),
    "float16": (lambda pipe: None, {"dtype": "float16"}),
    "float8, gen experts": (lambda pipe: pipe.use_float8(), {}),
    "float8": (lambda pipe: quantize(pipe.model, "float8"), {}),
    **{name: (lambda pipe, name=name: quantize(pipe.model, name), {}) for name in FORMATS if name != "float8"},
    "TaylorSeer": (lambda pipe: None, {"taylorseer": True}),
}
"""How the model may be run: what is done to a pipeline, and with which options."""


def rates(way: str, count: int) -> list[Row]:
    """Return the rows of the evaluation that are columns here."""
    prepare, options = WAYS[way]
    drawing = {name: value for name, value in options.items() if name != "dtype"}
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, dtype=options.get("dtype", "float32"))
    prepare(pipe)
    found = []
    for tasks, each in ((("t2i", "caption"), count), (("edit", "qa"), -(-count // 5))):  # of five kinds, and of more
        found += evaluate(pipe, count=each, tasks=tasks, **drawing)
    return [row for row in found if row.name in COLUMNS]


def layer_error(way: str) -> float | None:
    """Return the error of a layer's output on activations with outlier channels, relative to the output's norm."""
    form = way.partition(",")[0]
    generator = torch.Generator().manual_seed(0)
    linear = Linear(3584, 3584, bias=False)
    with torch.no_grad():
        linear.weight.normal_(0, 3584**-0.5, generator=generator)
    x = torch.randn(256, 3584, generator=generator)
    x[:, torch.randperm(3584, generator=generator)[:8]] *= 60
    wanted = x.double() @ linear.weight.detach().double().t()
    if form in ("bfloat16", "float16"):
        found = linear.to(getattr(torch, form))(x.to(getattr(torch, form)))
    elif form in FORMATS:
        found = FORMATS[form].layer.of(linear)(x)
    else:
        return None
    return float((found.double() - wanted).norm() / wanted.norm())


def cell(row: Row) -> str:
    """Return a rate with its interval, in percent."""
    assert row.interval is not None
    assert row.rate is not None
    return f"{100 * row.rate:5.1f} ({100 * row.interval[0]:.0f}-{100 * row.interval[1]:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prices", description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--count", type=int, default=250, help="examples of each cell, at least (default 250)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rates to this file")
    args = parser.parse_args(arguments)
    print(f"{'':<20}" + "".join(f"{name:>16}" for name in COLUMNS.values()) + f"{'error of a layer':>19}", flush=True)
    kept = {}
    with torch.inference_mode():
        for way in args.ways:
            rows = {row.name: row for row in rates(way, args.count)}
            error = layer_error(way)
            kept[way] = {name: (row.right, row.total) for name, row in rows.items()} | {"error": error}
            cells = "".join(f"{cell(rows[name]):>16}" for name in COLUMNS)
            print(f"{way:<20}{cells}{'-' if error is None else f'{error:.1e}':>19}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
