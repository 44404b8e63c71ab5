"""The command: look, compute, communicate, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import rank_report
from ..arguments import argument
from ..subcommands import run_command

RANKS_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, devices, links, clocks, disks, limits, and whether the kernels are right.

    ranks=N also starts N ranks here and checks an all-reduce and an all-to-all; under torchrun, on one machine or many,
    the ranks that are there do: torchrun … -m scatterfold.tools.doctor. Leaves with exit code 1 if a kernel or a
    collective computes something wrong.
    """

    EXAMPLE: ClassVar[str] = "scatterfold doctor ranks=8 run_dir=/shared/runs json=doctor.json"

    run_dir: Path = argument("where run folders will be, for the room and the speed of its disk", default=Path("runs"))
    ranks: int = argument("start so many ranks and check their collectives; 0 for none", default=0, least=0)
    device: str = argument("of the ranks", default="auto", choices=("auto", "cpu", "cuda"))
    disk_mb: int = argument("write and read so much to measure disks; 0 for nothing", default=64, least=0)
    json: Path | None = argument("also write all of it to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(Doctor, _run, argv)


def _run(settings: Doctor) -> int:
    from ..files import check_target

    check_target(settings.json)
    if rank_report.under_torchrun() and rank_report.world() > 1:
        return _among_ranks(settings)
    return _report(settings, _own_ranks(settings))


def _own_ranks(settings: Doctor) -> dict[str, Any] | None:
    """What ranks of this machine found; a rank that fails is a result, too."""
    if settings.ranks < 2:
        return None
    from ..bench.ranks import measure_in_ranks

    module = "scatterfold.tools.doctor.worker"
    try:
        return measure_in_ranks(module, {"device": settings.device}, settings.ranks, RANKS_TIMEOUT_S)
    except RuntimeError as error:
        return {"world": settings.ranks, "wrong": [str(error)]}


def _among_ranks(settings: Doctor) -> int:
    """Every rank takes part; the first prints, with what the other machines have to say about themselves."""
    from ...parallel.process import gather, running
    from .machine import describe_machine
    from .notes import notes
    from .ranks import check_ranks

    with running(settings.device, timeout_s=RANKS_TIMEOUT_S) as process:
        found = check_ranks(process)
        own = notes(describe_machine(settings.run_dir, 0)) if process.local_rank == 0 and not process.is_main else []
        found["notes"] = [f"{found['hosts'][rank]}: {note}" for rank, said in enumerate(gather(own)) for note in said]
        code = _report(settings, found) if process.is_main else 0
        return max(gather(code))


def _report(settings: Doctor, ranks: dict[str, Any] | None) -> int:
    """Look at this machine, print everything, write the JSON; returns the exit code."""
    from ..files import write_atomically
    from .checks import check_backends
    from .choices import backend_choices
    from .machine import describe_machine
    from .notes import notes
    from .show import show_checks, show_choices, show_machine, show_ranks

    machine = describe_machine(settings.run_dir, settings.disk_mb)
    said = [*notes(machine), *(ranks or {}).get("notes", []), *(ranks or {}).get("slow", [])]
    show_machine(machine)
    choices = backend_choices()
    show_choices(choices)
    checks = check_backends()
    show_checks(checks)
    if ranks is not None:
        show_ranks(ranks)
    for note in said:
        print(f"note: {note}")
    failed = sum(not check.passed for check in checks)
    wrong = (ranks or {}).get("wrong", [])
    if settings.json is not None:
        record = {
            **machine,
            "backends": [choice.record() for choice in choices],
            "checks": [check.record() for check in checks],
            "ranks": ranks,
            "notes": said,
            "passed": not failed and not wrong,
        }
        write_atomically(settings.json, json.dumps(record, indent=2) + "\n")
    if failed or wrong:
        lines = [f"{failed} of {len(checks)} checks failed"] if failed else []
        lines += [f"{wrong[0]} is wrong" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")] if wrong else []
        print(f"scatterfold: {'; '.join(lines)}", file=sys.stderr)
        return 1
    print(f"all {len(checks)} checks passed" + (f", and {ranks['world']} ranks agree" if ranks else ""))
    return 0
