"""Rows of the table, as text and as JSON, alone or beside an earlier result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.floors import Phase
from benchmarks.measure import Ceilings, Timing


@dataclass(frozen=True)
class Row:
    """One job as it was measured.

    Times in seconds for one run: of the `first` call (with whatever it compiles), the `repeats`, and of them the
    `last`, the `median` and the `spread` ((slowest - fastest) / median). `forwards`: passes of the language model,
    one a guidance branch or decoded token. `tflop`, `gb`: counted work, see `benchmarks.floors`; per second of `last`
    and as a share of the measured ceilings. `bound`: which of them sets the `floor`, the least seconds possible.
    `peak_gib` of GPU memory, None on a CPU. `first_token` in seconds and the rate of the tokens after it, for texts.
    """

    job: str
    sizes: str
    last: float
    median: float
    spread: float
    repeats: tuple[float, ...]
    first: float
    forwards: int
    tflop: float
    tflop_per_s: float
    matmul_share: float
    gb: float
    gb_per_s: float
    copy_share: float
    bound: str
    floor: float
    peak_gib: float | None
    first_token: float | None = None
    tokens_per_s: float | None = None


def make_row(
    job: str, sizes: str, timing: Timing, work: Sequence[Phase], ceilings: Ceilings, *, peak: int | None
) -> Row:
    """Return the row of a job from its times, its counted work and the peak memory in bytes."""
    flops = sum(phase.flops * phase.count for phase in work)
    read = sum(phase.bytes * phase.count for phase in work)
    slow = {
        "matmul": sum(p.count * p.flops / ceilings.matmul for p in work),
        "copy": sum(p.count * p.bytes / ceilings.copy for p in work),
    }
    return Row(
        job=job,
        sizes=sizes,
        last=timing.last,
        median=timing.median,
        spread=timing.spread,
        repeats=timing.repeats,
        first=timing.first,
        forwards=sum(phase.forwards * phase.count for phase in work),
        tflop=flops / 1e12,
        tflop_per_s=flops / 1e12 / timing.last,
        matmul_share=slow["matmul"] / timing.last,
        gb=read / 1e9,
        gb_per_s=read / 1e9 / timing.last,
        copy_share=slow["copy"] / timing.last,
        bound=max(slow, key=lambda ceiling: slow[ceiling]),
        floor=sum(phase.seconds(matmul=ceilings.matmul, copy=ceilings.copy) for phase in work),
        peak_gib=None if peak is None else peak / 2**30,
    )


COLUMNS: tuple[tuple[str, int], ...] = (
    ("job", -17),
    ("last s", 9),
    ("median", 9),
    ("spread", 7),
    ("forwards", 9),
    ("TFLOP", 10),
    ("TFLOP/s", 9),
    ("matmul", 7),
    ("GB", 9),
    ("GB/s", 8),
    ("copy", 7),
    ("peak GiB", 9),
    ("floor s", 9),
    ("x floor", 8),
)
"""Heading and width of every column, negative for text that starts at the left; "matmul" and "copy" are shares."""
BESIDE: tuple[tuple[str, int], ...] = (("before s", 10), ("faster", 7))


def table(rows: Sequence[Row], before: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return rows as text; with `before`, earlier rows by their job, also their times and how much faster it is."""
    columns = COLUMNS if before is None else (*COLUMNS, *BESIDE)
    lines = [_aligned([name for name, _ in columns], columns) + "  sizes"]
    for row in rows:
        cells = [
            row.job,
            _short(row.last),
            _short(row.median),
            f"{100 * row.spread:.1f}%",
            str(row.forwards or "-"),
            _short(row.tflop),
            _short(row.tflop_per_s),
            f"{100 * row.matmul_share:.1f}%",
            _short(row.gb),
            _short(row.gb_per_s),
            f"{100 * row.copy_share:.1f}%",
            "-" if row.peak_gib is None else f"{row.peak_gib:.2f}",
            _short(row.floor),
            f"{row.last / row.floor:.2f}",
        ]
        if before is not None:
            earlier = before.get(row.job)
            cells += [_short(earlier["last"]), f"{earlier['last'] / row.last:.2f}x"] if earlier else ["-", "-"]
        lines.append(f"{_aligned(cells, columns)}  {row.sizes}{_tokens(row, before)}")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return about three digits, never more than eight characters."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _aligned(cells: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    return "".join(
        cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, (_, width) in zip(cells, columns, strict=True)
    )


def _tokens(row: Row, before: Mapping[str, Mapping[str, Any]] | None) -> str:
    if row.first_token is None:
        return ""
    earlier = (before or {}).get(row.job, {})
    told = f"; first token {1000 * row.first_token:.4g} ms{_was(earlier.get('first_token'), 1000)}"
    if row.tokens_per_s is not None:
        told += f", then {row.tokens_per_s:.4g} token/s{_was(earlier.get('tokens_per_s'))}"
    return told


def _was(value: float | None, scale: float = 1) -> str:
    return "" if value is None else f" (before {scale * value:.4g})"


def save(path: Path, machine: Mapping[str, Any], ceilings: Ceilings, rows: Sequence[Row]) -> None:
    """Write a result as JSON, whole or not at all."""
    content = {"machine": dict(machine), "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """Return what `save` wrote: "machine", "ceilings" and "rows".

    Raises:
        ValueError: a file that cannot be read, or is no such result.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["machine"], [(row["job"], row["last"]) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no earlier result of `python -m benchmarks --json`: {error!r}") from error
    return content
