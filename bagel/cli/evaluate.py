"""The command that measures a model on the shapes world: `bagel evaluate`."""

from __future__ import annotations

import itertools
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import bagel
from bagel.cli.arguments import given_options
from bagel.cli.errors import UsageError
from bagel.cli.model import check_options, load
from bagel.evaluation.evaluate import TASKS, check_tasks, measure
from bagel.evaluation.failures import save_failures, write_json
from bagel.evaluation.measurement import Settings
from bagel.evaluation.table import HEADING, Row, line


def evaluate(args: Namespace) -> None:
    """Print the table of rates row by row as it is measured; then write what was asked to be kept."""
    check_options(args, "text_to_image")
    settings, tasks = _asked(args)
    report = Path(args.json).expanduser() if args.json else None
    if report is not None:
        if report.exists():
            raise FileExistsError(f"{report} exists; choose another name with --json")
        report.parent.mkdir(parents=True, exist_ok=True)
    if args.save:
        Path(args.save).expanduser().mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pipe = load(args, draws=True)
    loading = [Row("time: loading", value=time.perf_counter() - start, unit="s")] if "timing" in tasks else []
    rows = []
    print(HEADING)
    for row in itertools.chain(loading, measure(pipe, settings, tasks=tasks)):
        rows.append(row)
        print(line(row), flush=True)
    if report is not None:
        about = {"model": args.model, "device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}
        about |= {"float8": args.float8, "quantize": args.quantize}
        write_json(report, rows, about | {"settings": asdict(settings), "software": f"bagel-mot {bagel.__version__}"})
    if args.save:
        for path in save_failures(Path(args.save).expanduser(), rows)[:1]:
            print(f"failures: {path}", file=sys.stderr)


def _asked(args: Namespace) -> tuple[Settings, tuple[str, ...]]:
    """Return what to measure and how, checked before anything slow begins."""
    tasks = TASKS if args.tasks is None else tuple(filter(None, (name.strip() for name in args.tasks.split(","))))
    try:
        check_tasks(tasks)
        settings = Settings(
            count=args.count,
            split=args.split,
            seed=args.seed,
            side=args.side,
            batch_size=args.batch_size,
            keep_images=bool(args.save),
            drawing=given_options(args),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return settings, tasks
