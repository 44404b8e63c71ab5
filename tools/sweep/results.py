"""What became of the trials of a sweep, read back from their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import ConfigError
from ...moe.report.history import RunHistory, read_history
from .trial import FINISHED, TRIAL_FILE, UNFINISHED, Trial

FIGURES = ("status", "message", "steps", "train_loss", "valid_loss", "bits_per_byte", "tokens_per_second")


@dataclass(frozen=True)
class TrialResult:
    """One row of a report.

    Attributes:
        name: folder of the trial, below the sweep's.
        values: what its overrides set.
        status: as of `Trial`; running is also what a trial says whose sweep was killed.
        message: why it failed or was dropped.
        steps: optimizer steps done.
        train_loss: mean over the last twentieth of its steps.
        valid_loss, bits_per_byte: of its last evaluation.
        tokens_per_second: median over the second half of its steps.
        history: its figures over time.
    """

    name: str
    values: dict[str, str]
    status: str
    message: str | None
    steps: int
    train_loss: float | None
    valid_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    history: RunHistory


def read_sweep(source: Path) -> list[TrialResult]:
    """All trials, the lowest validation loss first: the finished ones, then those that got furthest.

    Raises: ConfigError if the folder is missing or holds no trials.
    """
    if not source.is_dir():
        raise ConfigError(f"source={source} is no folder, allowed: the folder of a sweep, such as multirun/DATE_TIME")
    marks = {file.parent for name in (TRIAL_FILE, "config.yaml") for file in source.rglob(name)}
    folders = sorted((path for path in marks if path != source), key=lambda path: (len(path.name), str(path)))
    if not folders:
        raise ConfigError(f"source={source} holds no trials, allowed: the folder of a sweep (scatterfold train -m)")
    results = [_read_trial(folder, source) for folder in folders]
    return sorted(results, key=_rank)


def _rank(result: TrialResult) -> tuple[bool, bool, int, float]:
    # What has done fewer steps was evaluated elsewhere on its schedule, perhaps on less text: it is not comparable.
    steps = 0 if result.status == FINISHED else -result.steps
    return result.status != FINISHED, result.valid_loss is None, steps, result.valid_loss or 0.0


def varied_keys(results: list[TrialResult]) -> list[str]:
    """Keys that do not have the same value in all trials, in the order in which they were given."""
    keys = list(dict.fromkeys(key for result in results for key in result.values))
    return [key for key in keys if len({result.values.get(key) for result in results}) > 1]


def shown(value: str | None) -> str:
    """A value as a person reads it: a sampled number has sixteen digits, of which four tell."""
    text = value or ""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def as_row(result: TrialResult, keys: list[str]) -> dict[str, Any]:
    """A trial as plain values."""
    return {
        "trial": result.name,
        "varied": {key: result.values.get(key) for key in keys},
        **{figure: getattr(result, figure) for figure in FIGURES},
    }


def _read_trial(folder: Path, source: Path) -> TrialResult:
    history = read_history(folder)
    trial = Trial.load(folder)
    _, losses = history.column("loss")
    _, speeds = history.column("tokens_per_second")
    last = history.valid[-1] if history.valid else {}
    return TrialResult(
        name=str(folder.relative_to(source)),
        values=_values(trial.overrides) if trial is not None else _flat(history.config),
        status=trial.status if trial is not None else FINISHED if history.summary.get("completed") else UNFINISHED,
        message=trial.message.removeprefix("scatterfold: ") if trial is not None and trial.message else None,
        steps=max((trial.steps if trial is not None else 0, *(line["step"] for line in history.train))),
        train_loss=float(losses[-max(1, len(losses) // 20) :].mean()) if len(losses) else None,
        valid_loss=last.get("valid_loss"),
        bits_per_byte=last.get("bits_per_byte"),
        tokens_per_second=float(np.median(speeds[len(speeds) // 2 :])) if len(speeds) else None,
        history=history,
    )


def _values(overrides: tuple[str, ...]) -> dict[str, str]:
    pairs = (word.partition("=") for word in overrides)
    return {key.lstrip("+~"): value for key, _, value in pairs}


def _flat(config: str) -> dict[str, str]:
    """All values of a trial that another Hydra launcher ran and that left only its configuration."""
    import yaml

    def walk(node: Any, prefix: str) -> dict[str, str]:
        if not isinstance(node, dict):
            return {prefix: json.dumps(node) if not isinstance(node, str) else node}
        found: dict[str, str] = {}
        for key, value in node.items():
            found |= walk(value, f"{prefix}.{key}" if prefix else str(key))
        return found

    values = walk(yaml.safe_load(config) or {}, "")
    return {key: value for key, value in values.items() if key not in ("run_dir", "")}
