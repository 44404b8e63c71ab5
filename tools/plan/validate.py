"""`scatterfold plan validate`: estimates beside what the same configurations need on this machine."""

from __future__ import annotations

import json
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
    settings.output.mkdir(parents=True, exist_ok=True)
    records = []
    for name, (config, job) in prepared.items():
        asked = {"config": config, "ranks": CASES[name].ranks, "device": device}
        asked |= {"seed": settings.seed, "steps": settings.steps}
        found = measure_in_ranks("scatterfold.tools.plan.worker", asked, CASES[name].ranks, settings.timeout)
        records.append(_record(name, CASES[name], job, read_device(path, CASES[name].ranks), found))
        print(_line(records[-1]), flush=True)
    conditions = {"device": device_name(torch.device(device)), "torch": torch.__version__, "base": [*BASE, *overrides]}
    document = {"format": FORMAT, "conditions": conditions, "command": ["scatterfold", *sys.argv[1:]]}
    document |= {"calibration": json.loads(path.read_text()), "records": records}
    write_atomically(settings.output / "plan.json", json.dumps(document, indent=1) + "\n")
    write_atomically(settings.output / "README.md", report(document))
    print(f"written: {settings.output / 'plan.json'}, {settings.output / 'README.md'}")
    return 0


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
    return f"""# Estimates against measurement

`{" ".join(document["command"])}` on {conditions["device"]}, torch {conditions["torch"]}, threads of a rank:
{records[0]["threads"]}. Every configuration is the following with the changes of its row, on random tokens; the
calibration stands in [plan.json](plan.json).

    {" ".join(conditions["base"])}

Memory: the most that torch's allocator holds during a step on the fullest rank (on a CPU parameters, optimizer state
and DDP's buckets, counted, and what the profiler sees on top; median of three steps). Growth: of the process's resident
memory, which holds libraries' own buffers and what the allocator keeps, too. Step: median of the slowest rank. Error:
predicted over measured, less one.

| configuration | ranks | memory predicted, MB | measured | error | growth | step predicted, s | measured | error |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

{summary}.
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
