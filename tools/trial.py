"""One trial of a sweep, and how its run tells the sweep what became of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import write_atomically

RESULT = "SCATTERFOLD_RESULT"
TRIAL_FILE = "trial.json"
LOG_FILE = "trial.log"
FINISHED, FAILED, UNFINISHED, RUNNING = "finished", "failed", "unfinished", "running"


@dataclass(frozen=True)
class Trial:
    """One trial, as in trial.json.

    Attributes:
        number: of the trial in its sweep.
        overrides: what this trial changes.
        status: running, finished, failed, or unfinished (stopped by a signal; it can go on).
        exit_code: of its process.
        objective: final validation loss.
        message: why it failed.
        seconds: how long its process ran, the last time.
    """

    number: int
    overrides: tuple[str, ...]
    status: str = RUNNING
    exit_code: int | None = None
    objective: float | None = None
    message: str | None = None
    seconds: float = 0.0

    def save(self, folder: Path) -> Trial:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TRIAL_FILE, json.dumps(asdict(self), indent=2) + "\n")
        return self

    @classmethod
    def load(cls, folder: Path) -> Trial | None:
        """The trial of a folder; None if it holds none."""
        try:
            record = json.loads((folder / TRIAL_FILE).read_text())
            return cls(**{**record, "overrides": tuple(record["overrides"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def write_result(completed: bool, objective: float | None) -> None:
    """Tell the sweep that this run belongs to, if any, how it ended."""
    path = os.environ.get(RESULT)
    if path:
        write_atomically(Path(path), json.dumps({"completed": completed, "objective": objective}) + "\n")


def read_result(path: Path) -> tuple[bool, float]:
    """Whether a run completed, and its objective (NaN if it has none)."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return False, math.nan
    return record["completed"], math.nan if record["objective"] is None else record["objective"]
