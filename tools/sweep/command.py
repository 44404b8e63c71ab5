"""`scatterfold sweep`: all trials of a sweep beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..arguments import argument
from ..subcommands import run_subcommand

HELP = """Look at a sweep that scatterfold train -m has run.

  report     a table and a picture of all trials, the best configuration

A sweep itself is scatterfold train -m: every combination of values, or hydra/sweeper=halving, hydra/sweeper=optuna.

Example:
  scatterfold train -m optimizer.lr=1e-3,3e-3 hydra.launcher.seeds=[0,1] hydra.sweep.dir=multirun/lr
  scatterfold sweep report source=multirun/lr"""


@dataclass(frozen=True)
class Report:
    """Print a table of all trials of a sweep, best first, with mean and spread over seeds.

    Writes SOURCE/sweep.png, sweep.json, sweep.csv and best.yaml, the configuration of the best trial. A sweep does so
    itself when it ends.
    """

    EXAMPLE: ClassVar[str] = "scatterfold sweep report source=multirun/2026-01-31_12-00-00 json=sweep.json"

    source: Path = argument("folder of the sweep")
    json: Path | None = argument("also write the figures to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_subcommand("sweep", HELP, {"report": (Report, _report)}, argv)


def _report(settings: Report) -> int:
    from ..files import check_target, write_atomically
    from .report import report

    check_target(settings.json)
    record = report(settings.source)
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
