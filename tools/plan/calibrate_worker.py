"""One rank of a calibration: `python -m scatterfold.tools.plan.calibrate_worker SETTINGS RESULT`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...moe.estimate import Device, Job, Workload
from ...moe.estimate.devices import COLLECTIVES, Link, Rates
from ...moe.training.environment import device_name
from ...moe.training.run_plan import RunPlan
from ...parallel.layout import ResolvedLayout
from ...parallel.process import Process, gather, running
from .layer_fit import with_steps
from .links import measure_links
from .rates import DTYPES, Clock, bandwidth, peak, rates


def main(settings: dict[str, Any], result: Path) -> None:
    """Measure with all ranks at work; rank 0 writes the slowest figures as a device."""
    with running(settings["device"]) as process:
        device = _measure(settings, process)
        if process.is_main:
            found = asdict(device)
            result.write_text(json.dumps({key: found[key] for key in found if key not in ("source", "measured")}))


def _measure(settings: dict[str, Any], process: Process) -> Device:
    clock = Clock(process.device, settings["seconds"])
    job = _job(RunPlan.from_config(settings["config"]), process.world, process.device.type)
    links: dict[str, Link] = dict.fromkeys(COLLECTIVES, Link(1e12, 0.0))  # of one rank, which sends nothing
    if process.world > 1:
        links = measure_links(clock)
    device = Device(
        name=device_name(process.device),
        kind=process.device.type,
        memory=_memory(process),
        peaks={name: _slowest(peak(clock, dtype)) for name, dtype in DTYPES.items()},
        rates={name: _slowest_rates(rates(job, clock, name)) for name in DTYPES},
        bandwidth=_slowest(bandwidth(clock)),
        inside=links,
        network=links["send"],
        ranks_per_node=max(process.world, torch.cuda.device_count()),
        reserved=2 * 2**30 if process.device.type == "cuda" else 0,
        asynchronous=process.device.type == "cuda",
        overlap=0.8 if process.device.type == "cuda" else 0.0,
    )
    return with_steps(settings["config"], job, process, device)


def _job(plan: RunPlan, ranks: int, device_type: str) -> Job:
    """One micro-batch as a data-parallel rank of so many has it."""
    workload = Workload.of(plan, device_type)
    return Job(workload, ResolvedLayout(dp_replicate=ranks))


def _memory(process: Process) -> int | None:
    if process.device.type == "cuda":
        return torch.cuda.get_device_properties(process.device).total_memory
    return None


def _slowest(speed: float) -> float:
    return min(gather(speed))


def _slowest_rates(found: Rates) -> Rates:
    return Rates(**{name: _slowest(speed) for name, speed in asdict(found).items()})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
