"""The figures: what one run measured, as JSON, and several runs made into one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....kernels import DataError
from .case import DTYPES
from .shapes import NAMED, Shape

FORMAT = "scatterfold bench kernels 1"
PASSES = ("forward", "forward+backward")
OK, WRONG, FAILED, REFUSED, ABSENT = "ok", "wrong", "failed", "refused", "not installed"


@dataclass(frozen=True)
class EntryResult:
    """One entry in one pass.

    Attributes:
        status: ok, or why it has no rank: wrong (computes something else), failed, refused, not installed.
        note: one line of explanation.
        error: relative error of output and gradient of x, see check.py; None for the dense limits.
        samples: milliseconds of all calls; median_ms, q1_ms, q3_ms: their quartiles.
        to_ours, to_dense_a, to_dense_b: median over the median of our default backend and of the dense limits, in
            the same run.
        peak_bytes: most memory held above inputs and weights; gradients count.
        saved_bytes: what autograd saves, weights left out.
    """

    name: str
    kind: str
    status: str = OK
    note: str = ""
    error: float | None = None
    samples: list[float] = field(default_factory=list)
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    to_ours: float | None = None
    to_dense_a: float | None = None
    to_dense_b: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass(frozen=True)
class CaseResult:
    """One shape in one dtype and one pass. `default` names our backend that a user gets who asks for none."""

    shape: Shape
    dtype: str
    direction: str
    default: str
    saved_formula: int
    peak_tflops: float
    entries: list[EntryResult]

    @property
    def key(self) -> tuple[Shape, str, str]:
        return self.shape, self.dtype, self.direction


@dataclass(frozen=True)
class Conditions:
    """Where and how was measured; figures under other conditions stay apart."""

    device: str
    device_type: str
    threads: int
    versions: dict[str, str]
    routing: str
    seed: int


@dataclass(frozen=True)
class Run:
    """All that was measured under the same conditions, and by which commands."""

    conditions: Conditions
    commands: list[str]
    cases: list[CaseResult]


def write_results(path: Path, runs: list[Run]) -> None:
    """As JSON, whole or not at all. Raises: ConfigError if it cannot be written."""
    from ...files import write_atomically

    record = {"format": FORMAT, "runs": [dataclasses.asdict(run) for run in runs]}
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_results(path: Path) -> list[Run]:
    """Raises: DataError if the file does not hold what `write_results` wrote."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        return [_run(run) for run in record["runs"]]
    except OSError as error:
        raise DataError(f"source={path} cannot be read ({error.strerror}), allowed: {_ALLOWED}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"source={path} holds no kernel figures ({reason}), allowed: {_ALLOWED}") from None


_ALLOWED = "files that `scatterfold bench kernels json=FILE` wrote"


def merge(files: list[list[Run]]) -> list[Run]:
    """Put what was measured under the same conditions together; of equal measurements the last one counts."""
    merged: list[Run] = []
    for run in (run for runs in files for run in runs):
        at = next((i for i, other in enumerate(merged) if other.conditions == run.conditions), None)
        if at is None:
            merged.append(run)
        else:
            commands = merged[at].commands + [c for c in run.commands if c not in merged[at].commands]
            merged[at] = Run(run.conditions, commands, _merge_cases(merged[at].cases, run.cases))
    return merged


def _merge_cases(first: list[CaseResult], second: list[CaseResult]) -> list[CaseResult]:
    cases = {case.key: case for case in first}
    for case in second:
        known = {entry.name: entry for entry in cases[case.key].entries} if case.key in cases else {}
        known |= {entry.name: entry for entry in case.entries}
        cases[case.key] = dataclasses.replace(case, entries=list(known.values()))
    return sorted(cases.values(), key=_place)


def _place(case: CaseResult) -> tuple:
    """Cases in the order in which one run would measure them, whatever the order of the files."""
    names, dtypes = list(NAMED), list(DTYPES)
    place = names.index(case.shape.name) if case.shape.name in NAMED else len(names)
    return place, case.shape.name, dtypes.index(case.dtype), PASSES.index(case.direction)


def _run(record: dict[str, Any]) -> Run:
    return Run(Conditions(**record["conditions"]), record["commands"], [_case(case) for case in record["cases"]])


def _case(record: dict[str, Any]) -> CaseResult:
    entries = [EntryResult(**entry) for entry in record["entries"]]
    return CaseResult(**{**record, "shape": Shape(**record["shape"]), "entries": entries})
