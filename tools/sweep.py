"""`scatterfold sweep`: all trials of a sweep beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .arguments import argument
from .subcommands import run_subcommand

HELP = """Look at a sweep that scatterfold train -m has run.

  report     a table and a picture of all trials

Example:
  scatterfold sweep report source=multirun/2026-01-31_12-00-00"""


@dataclass(frozen=True)
class Report:
    """Print a table of all trials of a sweep, best first, and draw their losses in SOURCE/sweep.png."""

    EXAMPLE: ClassVar[str] = "scatterfold sweep report source=multirun/2026-01-31_12-00-00 json=sweep.json"

    source: Path = argument("folder of the sweep")
    json: Path | None = argument("also write the table to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_subcommand("sweep", HELP, {"report": (Report, _report)}, argv)


def _report(settings: Report) -> int:
    from .files import check_target, write_atomically
    from .sweep_figure import save_figure
    from .sweep_results import read_sweep, record, varied_keys

    check_target(settings.json)
    results = read_sweep(settings.source)
    keys = varied_keys(results)
    _print_table(results, keys)
    picture = save_figure(results, keys, settings.source)
    if picture is not None:
        print(f"picture: {picture}")
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(record(settings.source, results, keys), indent=2) + "\n")
    return 0


def _print_table(results: list, keys: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .trial import FAILED

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("trial", justify="right")
    for key in keys:
        table.add_column(key)
    for name in ("steps", "train loss", "valid loss", "bits/byte", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("status")
    for result in results:
        status = result.status if result.message is None else f"{result.status}: {result.message}"
        table.add_row(
            result.name,
            *(str(result.values.get(key, "")) for key in keys),
            f"{result.steps:,}",
            _number(result.train_loss, ".4f"),
            _number(result.valid_loss, ".4f"),
            _number(result.bits_per_byte, ".4f"),
            _number(result.tokens_per_second, ",.0f"),
            status,
            style="red" if result.status == FAILED else None,
        )
    # A pipe or file has no width: there, a row stays one line.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
