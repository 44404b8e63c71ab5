"""The command: look, compute, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..arguments import argument
from ..subcommands import run_command

if TYPE_CHECKING:
    from .checks import NumericCheck
    from .choices import BackendChoice


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, devices, disk, which kernels run and why, and whether they compute correctly.

    Leaves with exit code 1 if a kernel computes something wrong.
    """

    EXAMPLE: ClassVar[str] = "scatterfold doctor json=doctor.json"

    run_dir: Path = argument("where run folders will be, for the free space of its disk", default=Path("runs"))
    json: Path | None = argument("also write all of it to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(Doctor, _run, argv)


def _run(settings: Doctor) -> int:
    from ..files import check_target, write_atomically
    from .checks import check_backends
    from .choices import backend_choices
    from .machine import describe_machine

    check_target(settings.json)
    machine = describe_machine(settings.run_dir)
    _print_machine(machine)
    choices = backend_choices()
    _print_choices(choices)
    checks = check_backends()
    _print_checks(checks)
    failed = [check for check in checks if not check.passed]
    if settings.json is not None:
        record = {
            **machine,
            "backends": [choice.record() for choice in choices],
            "checks": [check.record() for check in checks],
            "passed": not failed,
        }
        write_atomically(settings.json, json.dumps(record, indent=2) + "\n")
    if failed:
        print(f"scatterfold: {len(failed)} of {len(checks)} checks failed", file=sys.stderr)
        return 1
    print(f"all {len(checks)} checks passed")
    return 0


def _print_machine(machine: dict[str, Any]) -> None:
    versions = machine["versions"]
    rows = [(name, version or "not installed") for name, version in versions.items()]
    cpu = machine["cpu"]
    rows.append(("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"))
    for number, gpu in enumerate(machine["gpus"]):
        memory = f"{gpu['memory_bytes'] / 2**30:,.0f} GiB"
        rows.append((f"GPU {number}", f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"))
    if not machine["gpus"]:
        rows.append(("GPU", "none found"))
    disk = machine["disk"]
    rows.append(("disk", f"{disk['free_bytes'] / 2**30:,.1f} GiB free for {disk['run_dir']}"))
    for name, value in rows:
        print(f"{name:<16}{value}")
    print()


def _print_choices(choices: Sequence[BackendChoice]) -> None:
    """One paragraph for each answer, one line for the dtypes that get it with the same shapes."""
    print("backend of the experts, by dtype and (model width x expert width)")
    answers: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for choice in choices:
        by_dtype = answers.setdefault((choice.device, choice.backend, choice.why), {})
        by_dtype.setdefault(choice.dtype, []).append(f"{choice.width}x{choice.expert_width}")
    for (device, backend, why), by_dtype in answers.items():
        print(f"  {device:<6}{backend:<10}{why}")
        by_shapes: dict[str, list[str]] = {}
        for dtype, shapes in by_dtype.items():
            by_shapes.setdefault(", ".join(shapes), []).append(dtype)
        for shapes, dtypes in by_shapes.items():
            print(f"  {'':<16}{', '.join(dtypes)}: {shapes}")
    print()


def _print_checks(checks: Sequence[NumericCheck]) -> None:
    """One line for all that passed of a backend in a dtype; every failure by itself."""
    print("numbers of the kernels, output and gradients against float64")
    groups: dict[tuple[str, str, str], list[NumericCheck]] = {}
    for check in checks:
        groups.setdefault((check.device, check.backend, check.dtype), []).append(check)
    for (device, backend, dtype), group in groups.items():
        kind = f"{device:<6}{backend:<10}{dtype:<6}"
        passed = [check for check in group if check.passed]
        if passed:
            worst = max(passed, key=lambda check: check.error or 0.0)
            print(f"  {'ok':<8}{kind}{len(passed)} tensors, error {worst.error:.1e}, allowed {worst.allowed:.1e}")
        for check in group:
            if not check.passed:
                figures = check.problem or f"error {check.error:.1e}, allowed {check.allowed:.1e}"
                print(f"  {'FAILED':<8}{kind}{check.name}: {figures}")
    print()
