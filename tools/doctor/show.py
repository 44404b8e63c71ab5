"""What the doctor prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .checks import NumericCheck
from .choices import BackendChoice


def show_machine(machine: dict[str, Any]) -> None:
    """One line for each thing that there is."""
    rows = [(name, version or "not installed") for name, version in machine["versions"].items()]
    if machine["driver"]:
        rows.append(("driver, NCCL", f"{machine['driver']}, {machine['nccl'] or 'none'}"))
    for name, value in (*rows, *_processors(machine), *_links(machine["links"]), *_storage(machine)):
        print(f"{name:<16}{value}")
    print()


def _processors(machine: dict[str, Any]) -> Iterable[tuple[str, str]]:
    cpu, clock = machine["cpu"], machine["clocks"]["cpu"]
    text = f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, load {clock['load']:.1f}"
    if clock["governor"]:
        text += f", governor {clock['governor']}"
    yield "CPU", text
    clocks = machine["clocks"]["gpus"]
    for number, gpu in enumerate(machine["gpus"]):
        text = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:,.0f} GiB, compute capability {gpu['capability']}"
        if number < len(clocks) and clocks[number]["clock_mhz"] is not None:
            text += f", {clocks[number]['clock_mhz']:g} of {clocks[number]['max_clock_mhz']:g} MHz"
            text += f", {clocks[number]['celsius']:g} °C"
        yield f"GPU {number}", text
    if not machine["gpus"]:
        yield "GPU", "none found"


def _links(links: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if links["gpu_links"]:
        yield "GPU links", ", ".join(f"{kind} between {count} pairs" for kind, count in links["gpu_links"].items())
    interfaces = [
        f"{one['name']} {one['state']}" + (f" {one['megabits'] / 1000:g} Gbit/s" if one["megabits"] else "")
        for one in links["interfaces"]
    ]
    yield "network", ", ".join(interfaces) or "none found"
    ports = [f"{port['device']}:{port['port']} {port['state']} {port['rate']}" for port in links["infiniband"]]
    yield "InfiniBand", ", ".join(ports) or "none found"


def _storage(machine: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, key in (("disk", "run_dir"), ("temporary", "folder")):
        disk = machine["disk" if key == "run_dir" else "temporary"]
        text = f"{disk['free_bytes'] / 2**30:,.1f} GiB free for {disk[key]}"
        if "write_bytes_per_second" in disk:
            text += f", writes {_rate(disk['write_bytes_per_second'])}, reads {_rate(disk['read_bytes_per_second'])}"
        yield name, text + (f", {disk['problem']}" if disk.get("problem") else "")
    shared = machine["shared_memory_bytes"]
    yield "shared memory", "none" if shared is None else f"{shared / 2**30:,.1f} GiB free"
    limits = machine["limits"]
    locked = limits["locked_memory_bytes"]
    yield (
        "limits",
        f"{limits['open_files'] or 'any number of'} open files, {limits['processes'] or 'any number of'} processes, "
        + ("any" if locked is None else f"{locked / 2**20:,.0f} MiB of")
        + " locked memory",
    )


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"


def show_ranks(ranks: dict[str, Any]) -> None:
    """Whether collectives are right, how fast they are, and which rank is the slowest."""
    print(f"collectives of {ranks['world']} ranks" + (f" on {ranks['device']}" if "device" in ranks else ""))
    for line in ranks["wrong"]:
        print(f"  {'FAILED':<8}{line}")
    for name in ("all_reduce", "all_to_all"):
        if name in ranks:
            figures = ranks[name]
            right = "ok" if not ranks["wrong"] else ""
            print(f"  {right:<8}{name:<12}{figures['latency_us']:,.0f} us, {figures['gb_per_s']:.2f} GB/s")
    if "links" in ranks:
        worst = min(ranks["links"], key=lambda link: link["gb_per_s"])
        print(f"  {'':<8}slowest link: rank {worst['from']} to {worst['to']}, {worst['gb_per_s']:.2f} GB/s")
        slowest = ranks["slowest_rank"]
        took, median = ranks["compute_ms"][slowest], statistics.median(ranks["compute_ms"])
        print(f"  {'':<8}slowest rank: {slowest}, {took:.2f} ms for a matrix product, the median is {median:.2f}")
        offset = max(ranks["clock_offset_ms"], key=abs)
        print(f"  {'':<8}clocks: up to {abs(offset):.1f} ms apart")
    print()


def show_choices(choices: Sequence[BackendChoice]) -> None:
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


def show_checks(checks: Sequence[NumericCheck]) -> None:
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
