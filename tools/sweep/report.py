"""What is shown and written of a sweep: a table, SWEEP/sweep.png, sweep.json, sweep.csv and best.yaml."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...kernels.errors import ConfigError
from ..files import write_atomically
from .halving import Record
from .results import FIGURES, TrialResult, as_row, read_sweep, shown, varied_keys
from .seeds import SEED, SeedGroup, best_trial, by_seed
from .trial import FAILED

BEST_FILE = "best.yaml"


def report(source: Path) -> dict[str, Any]:
    """Print the tables, write the files into the folder of the sweep, and return what sweep.json holds.

    Raises: ConfigError if the folder is missing or holds no trials.
    """
    from .figure import save_figure

    results = read_sweep(source)
    keys = varied_keys(results)
    groups = by_seed(results)
    best, halving = best_trial(groups), Record.load(source)
    record = as_record(source, results, groups, keys, best, halving)
    write_atomically(source / "sweep.json", json.dumps(record, indent=2) + "\n")
    write_atomically(source / "sweep.csv", as_csv(results, keys))
    print_trials(results, keys)
    if any(len(group.results) > 1 for group in groups):
        print_seeds(groups, keys)
    if halving is not None:
        print(describe_halving(record["halving"]))
    picture = save_figure(results, keys, source)
    if picture is not None:
        print(f"picture: {picture}")
    if best is not None and write_best(source, best, keys):
        print(
            f"best: trial {best.name}, valid loss {best.valid_loss:.4f}; "
            f"scatterfold train --config-path {source} --config-name {Path(BEST_FILE).stem}"
        )
    return record


def report_if_possible(source: Path) -> None:
    """Report at the end of a sweep, which must not fail for its pictures."""
    try:
        report(source)
    except ConfigError:
        pass  # no trials: the sweep says so itself
    except Exception as error:
        print(f"the report could not be made ({type(error).__name__}: {error}); the trials are complete", flush=True)


def as_record(
    source: Path,
    results: list[TrialResult],
    groups: list[SeedGroup],
    keys: list[str],
    best: TrialResult | None,
    halving: Record | None,
) -> dict[str, Any]:
    """All figures as plain values."""
    record: dict[str, Any] = {
        "source": str(source),
        "varied": keys,
        "best": None if best is None else best.name,
        "trials": [as_row(result, keys) for result in results],
    }
    if any(len(group.results) > 1 for group in groups):
        record["seeds"] = [group.as_row(keys) for group in groups]
    if halving is not None:
        spent = sum(result.steps for result in results)
        rungs = [asdict(rung) for rung in halving.decided]
        record["halving"] = {
            "eta": halving.eta,
            "rungs": halving.steps,
            "decided": rungs,
            "steps_spent": spent,
            "steps_of_full_grid": halving.full_grid,
        }
    return record


def as_csv(results: list[TrialResult], keys: list[str]) -> str:
    """A line a trial, best first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *keys, *FIGURES])
    for result in results:
        writer.writerow(
            [result.name, *(result.values.get(key) for key in keys), *(getattr(result, f) for f in FIGURES)]
        )
    return text.getvalue()


def describe_halving(halving: dict[str, Any]) -> str:
    """What halving has saved."""
    spent, full = halving["steps_spent"], halving["steps_of_full_grid"]
    rungs = ", ".join(f"{step:,}" for step in halving["rungs"])
    return (
        f"halving: eta {halving['eta']}, rungs at steps {rungs}; {spent:,} steps spent, the full grid takes {full:,} "
        f"({spent / full:.0%})"
    )


def write_best(source: Path, best: TrialResult, keys: list[str]) -> bool:
    """Write the configuration of the best trial, as a run of its own; whether it has one."""
    import yaml

    config = yaml.safe_load(best.history.config or "null")
    if not isinstance(config, dict):
        return False
    config = {**config, "run_dir": None}
    if isinstance(config.get("trainer"), dict) and "stop_after" in config["trainer"]:
        config["trainer"] = {**config["trainer"], "stop_after": None}
    chosen = " ".join(f"{key}={best.values[key]}" for key in keys if key in best.values)
    head = (
        f"# The best of the sweep {source.name}: trial {best.name}, {chosen or 'nothing varies'}, "
        f"valid loss {best.valid_loss:.6f}.\n"
        f"# Train it again: scatterfold train --config-path {source} --config-name {Path(BEST_FILE).stem} run_dir=DIR\n"
    )
    write_atomically(source / BEST_FILE, head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return True


def print_trials(results: list[TrialResult], keys: list[str]) -> None:
    """A row a trial, best first."""
    from rich.table import Table

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
            *(shown(result.values.get(key)) for key in keys),
            f"{result.steps:,}",
            _number(result.train_loss, ".4f"),
            _number(result.valid_loss, ".4f"),
            _number(result.bits_per_byte, ".4f"),
            _number(result.tokens_per_second, ",.0f"),
            status,
            style="red" if result.status == FAILED else None,
        )
    _show(table)


def print_seeds(groups: list[SeedGroup], keys: list[str]) -> None:
    """A row a configuration, the lowest mean over its seeds first."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in keys:
        if key != SEED:
            table.add_column(key)
    for name in ("seeds", "mean valid loss", "spread"):
        table.add_column(name, justify="right")
    table.add_column("trials")
    for group in groups:
        many = (
            f"{len(group.losses)}"
            if len(group.losses) == len(group.results)
            else f"{len(group.losses)} of {len(group.results)}"
        )
        table.add_row(
            *(shown(group.values.get(key)) for key in keys if key != SEED),
            many,
            _number(group.mean, ".4f"),
            "-" if group.spread is None else f"± {group.spread:.4f}",
            ", ".join(result.name for result in group.results),
        )
    print()
    _show(table)
    print()


def _show(table: Any) -> None:
    from rich.console import Console

    # A pipe or file has no width: there, a row stays one line.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
