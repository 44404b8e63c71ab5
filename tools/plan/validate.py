"""`scatterfold plan validate`: estimates beside what the same configurations need on this machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...kernels import ConfigError
from ...moe.estimate import Job, Workload, peak_memory, step_time
from ...moe.training.environment import device_name
from ..bench.ranks import measure_in_ranks
from ..close_match import did_you_mean
from ..files import write_atomically
from .calibration import read_device
from .cases import BASE, CASES, Case
from .configuration import compose, read
from .figure import save_figure
from .measure import PEAK_STEPS

if TYPE_CHECKING:
    from .command import Validate

FORMAT = "scatterfold plan validation 1"


def validate(settings: Validate, overrides: list[str]) -> int:
    """The command; returns its exit code."""
    path = Path(settings.device)
    names = settings.cases or tuple(CASES)
    for name in names:
        if name not in CASES:
            raise ConfigError(f"cases={name} is unknown{did_you_mean(name, CASES)}, allowed: {', '.join(CASES)}")
        read_device(path, CASES[name].ranks)
    device = read_device(path, 1).kind
    prepared = {name: _prepare(CASES[name], overrides, device) for name in names}
    _make_folder(settings.output)
    calibration, records, started = json.loads(path.read_text()), [], os.getloadavg()[0]
    for name, (config, job) in prepared.items():
        asked = {"config": config, "ranks": CASES[name].ranks, "device": device}
        asked |= {"seed": settings.seed, "steps": settings.steps}
        found = measure_in_ranks("scatterfold.tools.plan.worker", asked, CASES[name].ranks, settings.timeout)
        records.append(_record(name, CASES[name], job, read_device(path, CASES[name].ranks), found))
        print(_line(records[-1]), flush=True)
        # Anew after each: whatever stops the rest, what was measured is there.
        document = {"format": FORMAT, "conditions": _conditions(device, started, overrides), "records": records}
        document |= {"command": ["scatterfold", *sys.argv[1:]], "calibration": calibration}
        _write(settings.output, document)
    print(f"written: {', '.join(str(settings.output / name) for name in ('plan.json', 'plan.png', 'README.md'))}")
    return 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be made ({error.strerror}), allowed: a folder") from error


def _conditions(device: str, load_before: float, overrides: list[str]) -> dict[str, Any]:
    return {
        "device": device_name(torch.device(device)),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": [round(load, 1) for load in (load_before, os.getloadavg()[0])],
        "base": [*BASE, *overrides],
    }


def _write(folder: Path, document: dict[str, Any]) -> None:
    write_atomically(folder / "plan.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "README.md", report(document))
    save_figure(document["records"], folder / "plan.png")


def _prepare(case: Case, overrides: list[str], device: str) -> tuple[dict[str, Any], Job]:
    config = compose([*BASE, *overrides, *case.words])
    plan = read(config)
    return config, Job(Workload.of(plan, device), plan.resolve_layout(case.ranks))


def _record(name: str, case: Case, job: Job, device: Any, found: dict[str, Any]) -> dict[str, Any]:
    memory, time = peak_memory(job), step_time(job, device)
    peak = max(rank["peak_bytes"] for rank in found["ranks"])
    seconds = max(rank["seconds"] for rank in found["ranks"])
    return {
        "case": name,
        "ranks": case.ranks,
        "changes": list(case.words),
        "memory": {"predicted": memory.total, "measured": peak, "error": memory.total / peak - 1},
        "memory_parts": memory.by_part() | {"moment": memory.moment},
        "seconds": {"predicted": time.total, "measured": seconds, "error": time.total / seconds - 1},
        "time_parts": time.as_dict(),
        "resident_growth": max(rank["resident_growth"] for rank in found["ranks"]),
        "threads": found["threads"],
    }


def _line(record: dict[str, Any]) -> str:
    memory, seconds = record["memory"], record["seconds"]
    return (
        f"{record['case']:<24} {record['ranks']} rank{'s' if record['ranks'] > 1 else ' '} "
        f"memory {memory['predicted'] / 1e6:.1f} MB, measured {memory['measured'] / 1e6:.1f} ({memory['error']:+.1%}); "
        f"step {seconds['predicted']:.3f} s, measured {seconds['measured']:.3f} ({seconds['error']:+.1%})"
    )


def report(document: dict[str, Any]) -> str:
    """The results as a page."""
    records, conditions = document["records"], document["conditions"]
    rows = "\n".join(_row(record) for record in records)
    summary = "; ".join(_summary(name, records) for name in ("memory", "seconds"))
    threads, (before, after) = records[0]["threads"], conditions["load"]
    return f"""# Estimates against measurement

    {" ".join(document["calibration"].get("command", ()))}
    {" ".join(document["command"])}

On {conditions["device"]} ({conditions["cores"]} cores), torch {conditions["torch"]},
Python {conditions["python"]}, {threads} thread{"s" if threads > 1 else ""} a rank; load of the machine {before} before
and {after} after. Every configuration is the following with the changes of its row, on random tokens. The calibration
that the times rest on, and the parts of every figure, are in [plan.json](plan.json).

    {" ".join(conditions["base"])}

Memory: the most that torch's allocator holds during a step, on the fullest rank (on a CPU parameters, optimizer state
and DDP's buckets, counted, and what the profiler sees on top; the least of {PEAK_STEPS} steps, because threads of
gloo let go of a message late where the machine is busy). Growth: of the process's resident memory, with what libraries
and the allocator keep for themselves. Step: median of the slowest rank. Error: predicted over measured, less one.

| configuration | ranks | memory predicted, MB | measured | error | growth | step predicted, s | measured | error |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

{summary}.

![Predicted and measured](plan.png)
"""


def _row(record: dict[str, Any]) -> str:
    memory, seconds = record["memory"], record["seconds"]
    changes = " ".join(f"`{word}`" for word in record["changes"]) or "as it is"
    return (
        f"| {changes} | {record['ranks']} | {memory['predicted'] / 1e6:.1f} | {memory['measured'] / 1e6:.1f} "
        f"| {memory['error']:+.1%} | {record['resident_growth'] / 1e6:.0f} | {seconds['predicted']:.3f} "
        f"| {seconds['measured']:.3f} | {seconds['error']:+.1%} |"
    )


def _summary(name: str, records: list[dict[str, Any]]) -> str:
    errors = [abs(record[name]["error"]) for record in records]
    shown = {"memory": "Memory", "seconds": "Step time"}[name]
    return f"{shown}: mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}"
