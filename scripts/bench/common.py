"""What the benchmarks share: summaries of samples, the JSON they write, tables and progress."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from controlplane.clock import rfc3339
from scripts import manifest, statistics
from scripts.errors import UserError
from scripts.records import write_json

SCHEMA_VERSION = 1
FILE_COLUMNS = 140  # of a table that nobody watches: whole words rather than a terminal's width
QUANTILES = ("p50", "p90", "p99")

console = Console(stderr=True)


def quantiles(samples: ArrayLike) -> dict[str, float]:
    """Return p50, p90, p99 and the count of samples; the unit is that of the samples."""
    values = np.asarray(samples, float)
    return {**statistics.quantiles(values, QUANTILES), "count": int(values.size)}


def ratio(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Return the median of paired ratios, its 95 % bootstrap interval, their p10, p90 and count."""
    low, high = statistics.median_interval(values, seed)
    p10, p50, p90 = np.percentile(values, [10, 50, 90])
    return {
        "p50": float(p50),
        "ci95": [low, high],
        "p10": float(p10),
        "p90": float(p90),
        "count": len(values),
    }


def steps(description: str, count: int) -> Iterator[int]:
    """Count rounds, with a progress bar where stderr is a terminal."""
    bar = Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        yield from bar.track(range(count))


def allow_many_files() -> None:
    """Raise the limit on open files: every address that sends has a socket."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write_result(
    path: Path, *, benchmark: str, seed: int, options: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Write figures with what one needs to know to believe, or repeat, them."""
    result = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "finished_at": rfc3339(time.time_ns()),
        "seed": seed,
        "options": options,
        **figures,
        "machine": manifest.machine(),
        "software": manifest.software(),
        "sysctls": manifest.sysctls(),
    }
    make_folder_of(path)
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def make_folder_of(path: Path) -> None:
    """Make the folder that a file is to be written to: before the work, so that it is not lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {path}: {error.strerror}") from error


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
) -> None:
    """Print a table on the terminal: first column to the left, figures to the right."""
    table = Table(title=title, caption=caption or None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    out = Console()
    (out if out.is_terminal else Console(width=FILE_COLUMNS)).print(table)
