"""One trial of a sweep, and how its run tells the sweep what became of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import write_atomically

RESULT = "SCATTERFOLD_RESULT"
TRIAL_FILE = "trial.json"
LOG_FILE = "trial.log"
FINISHED, FAILED, UNFINISHED, RUNNING = "finished", "failed", "unfinished", "running"
PAUSED, DROPPED = "paused", "dropped"  # halving: at a rung and not judged yet; judged, and not among the best


@dataclass(frozen=True)
class Trial:
    """One trial, as in trial.json.

    Attributes:
        number: of the trial in its sweep.
        overrides: what this trial changes.
        status: running, finished, failed, unfinished (stopped by a signal; it can go on), paused or dropped (halving).
        exit_code: of its process.
        objective: final validation loss; of a paused or dropped trial that at its last rung.
        message: why it failed or was dropped.
        seconds: how long its process ran, the last time.
        steps: optimizer steps done.
        rungs: validation loss by rung, the step as text (JSON has no other keys); None where it was not finite.
    """

    number: int
    overrides: tuple[str, ...]
    status: str = RUNNING
    exit_code: int | None = None
    objective: float | None = None
    message: str | None = None
    seconds: float = 0.0
    steps: int = 0
    rungs: dict[str, float | None] = field(default_factory=dict)

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

    def varied(self, constant: set[str], otherwise: str = "nothing varies") -> str:
        """What sets this trial apart: its overrides without those that are the same for all."""
        words = [word for word in self.overrides if word.partition("=")[0].lstrip("+~") not in constant]
        return " ".join(words) or otherwise


@dataclass(frozen=True)
class Result:
    """How a run ended, as it tells its sweep.

    Attributes:
        completed: whether it did all its steps.
        step: optimizer steps done.
        objective: validation loss of its last evaluation; None without one, or if it is not finite.
    """

    completed: bool = False
    step: int = 0
    objective: float | None = None


def write_result(result: Result) -> None:
    """Tell the sweep that this run belongs to, if any, how it ended."""
    path = os.environ.get(RESULT)
    if path:
        finite = result.objective is not None and math.isfinite(result.objective)
        record = {**asdict(result), "objective": result.objective if finite else None}
        write_atomically(Path(path), json.dumps(record) + "\n")


def read_result(path: Path) -> Result:
    """What a run wrote; nothing done if it wrote nothing."""
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Result()


def status_of(code: int, result: Result, stop_after: int | None) -> str:
    """What has become of a trial whose process ended with `code`."""
    if code != 0:
        return FAILED
    if result.completed:
        return FINISHED
    return PAUSED if stop_after is not None and result.step >= stop_after else UNFINISHED


def figure(trial: Trial) -> str:
    return "no validation loss" if trial.objective is None else f"valid loss {trial.objective:.4f}"


def outcome(trial: Trial) -> str:
    if trial.status == FAILED:
        return f"failed with exit code {trial.exit_code} after {trial.seconds:.0f} s: {trial.message}"
    if trial.status == UNFINISHED:
        return f"stopped after {trial.seconds:.0f} s, the same sweep goes on from its checkpoint"
    if trial.status == PAUSED:
        return f"at step {trial.steps} after {trial.seconds:.0f} s, {figure(trial)}"
    return f"finished in {trial.seconds:.0f} s, {figure(trial)}"


def last_line(log: Path) -> str:
    """The last thing that a process said, which for our commands is the reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("scatterfold")]
    return (said or lines or ["nothing was printed"])[-1]
