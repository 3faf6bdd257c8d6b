"""Run jobs on a model and print how long each takes, beside what the machine could do at best."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bagel.demo import CHECKPOINT
from bagel.loading import DTYPES
from bagel.modeling.attention import BACKENDS
from bagel.pipeline import BagelPipeline
from benchmarks.bench import Bench
from benchmarks.jobs import JOBS, Job
from benchmarks.measure import Ceilings, measure, measure_ceilings, peak_memory, reset_peak
from benchmarks.stages import breakdown
from benchmarks.table import Row, make_row, read, save, table
from benchmarks.weights import random_pipeline

EPILOG = """the jobs: {}

A share is that of the ceilings measured in the same run: one large matmul in the model's type, and a copy on the
device. The floor is the least time for the counted work at those ceilings; `benchmarks/floors.py` says what is counted.
Every job is warmed up, then run several times in a row, of which the last counts.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EPILOG.format(", ".join(JOBS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="demo", help="a folder, a Hub id, or demo, the built-in small one (default)")
    which.add_argument("--random-7b", action="store_true", help="random weights of the released sizes, without files")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, metavar="JOB", default=list(JOBS), help="default: all")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--attention", choices=["auto", *BACKENDS], default="auto", help="default: auto, the fastest here"
    )
    parser.add_argument("--taylorseer", action="store_true", help="predict most evaluations of drawings: lossy")
    parser.add_argument(
        "--float8",
        nargs="?",
        choices=("gen", "all"),
        const="gen",
        help="quantise the gen experts to 8-bit floats, or all of them: lossy",
    )
    parser.add_argument("--compile", action="store_true", help="compile the pipeline first")
    parser.add_argument("--repeat", type=_positive, default=3, help="runs in a row, after the warm-up (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--profile", action="store_true", help="also tell the stages and kernels of each job")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with an earlier --json file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    try:
        before = None if args.against is None else read(args.against)
        pipe = load(args)
    except ValueError as error:
        parser.error(str(error))
    machine = describe(args, pipe)
    print(_line(machine))
    if args.float8:
        pipe.use_float8(und=args.float8 == "all")
        print(f"floors and shares are those of {machine['dtype']}, as if nothing were quantised")
    if args.compile:
        start = time.perf_counter()
        pipe.compile()
        machine["compile_s"] = round(time.perf_counter() - start, 1)
        print(f"compiled in {machine['compile_s']} s")
    ceilings = measure_ceilings(pipe.device, pipe.dtype, quick=args.quick)
    print(f"ceilings: matmul {ceilings.matmul / 1e12:.4g} TFLOP/s, copy {ceilings.copy / 1e9:.4g} GB/s")
    bench = Bench(pipe, taylorseer=args.taylorseer, quick=args.quick)
    rows = []
    for name in dict.fromkeys(args.jobs):
        print(f"running {name}", file=sys.stderr, flush=True)
        job = JOBS[name](bench, name)
        rows.append(run(job, bench, ceilings, repeat=args.repeat))
        if args.json is not None:
            save(args.json, machine, ceilings, rows)  # after every job: a run that is cut short keeps what it found
        if args.profile:
            print(f"{name}: {job.sizes}\n{breakdown(job.run, pipe.device)}", flush=True)
    if before is None:
        print(table(rows))
    else:
        print(f"before: {_line(before['machine'])}")
        print(table(rows, {row["job"]: row for row in before["rows"]}))


def load(args: argparse.Namespace) -> BagelPipeline:
    """Return the model that was asked for."""
    if args.random_7b:
        return random_pipeline(device=args.device, dtype=args.dtype, attention=args.attention)
    source = CHECKPOINT if args.model == "demo" else args.model
    return BagelPipeline.from_pretrained(source, device=args.device, dtype=args.dtype, attention=args.attention)


def run(job: Job, bench: Bench, ceilings: Ceilings, *, repeat: int) -> Row:
    """Measure one job."""
    device, at_least = bench.pipe.device, 0.0 if bench.quick else 0.5
    reset_peak(device)
    timing, result = measure(job.run, device, repeat=repeat, at_least=at_least)
    peak = peak_memory(device)
    row = make_row(job.name, job.sizes, timing, job.work(result), ceilings, peak=peak)
    if job.first is None:
        return row
    first, begun = measure(job.first, device, repeat=repeat, at_least=at_least)
    more = job.tokens(result) - job.tokens(begun)
    rate = more / (timing.last - first.last) if more > 0 and timing.last > first.last else None
    return replace(row, first_token=first.last, tokens_per_s=rate)


def describe(args: argparse.Namespace, pipe: BagelPipeline) -> dict[str, Any]:
    """Return what a result has to be read with: the machine, the versions, the model and the switches."""
    gpu = pipe.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(pipe.device) if gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": "random 7B" if args.random_7b else str(args.model),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "attention": type(pipe.model.attention).__name__,
        "taylorseer": args.taylorseer,
        "float8": args.float8,
        "compile": args.compile,
        "quick": args.quick,
    }


def _line(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value not in (None, False))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
