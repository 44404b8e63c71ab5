"""`scatterfold plan calibrate`: start the ranks, and write what they reached."""

from __future__ import annotations

import json
import platform
import sys
from typing import TYPE_CHECKING

import torch

from ...kernels import ConfigError
from ...moe.estimate import Device, Workload
from ..bench.ranks import measure_in_ranks
from ..files import check_target, write_atomically
from .calibration import device_of, document_of
from .configuration import compose, read

if TYPE_CHECKING:
    from .command import Calibrate


def calibrate(settings: Calibrate, overrides: list[str]) -> int:
    """The command; returns its exit code."""
    config = compose(overrides)
    check_target(settings.output)
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    ranks = _ranks(settings.ranks, device)
    workload = Workload.of(read(config), device)
    if workload.plan.data.sequence_length < 32:
        raise ConfigError(
            f"data.sequence_length={workload.plan.data.sequence_length} is too short, allowed: 32 or more"
        )
    data, profiles = config["data"], {}
    for count in ranks:
        # As a data-parallel rank of so many has them: experts are faster with more rows.
        batch = data["micro_batch_size"] or max(1, data["global_batch_size"] // count)
        shared = {**data, "global_batch_size": batch * count, "micro_batch_size": batch}
        asked = {"config": {**config, "data": shared, "layout": {}}, "device": device, "seconds": settings.seconds}
        found = measure_in_ranks("scatterfold.tools.plan.calibrate_worker", asked, count, settings.timeout)
        profiles[count] = device_of(found)
        print(_line(count, profiles[count]), flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    conditions = {
        "command": ["scatterfold", *sys.argv[1:]],
        "measured_with": {name: config[name] for name in ("model", "data", "trainer")},
    }
    document = document_of(profiles, versions, conditions)
    write_atomically(settings.output, json.dumps(document, indent=1) + "\n")
    print(f"written: {settings.output}")
    return 0


def _ranks(asked: tuple[int, ...], device: str) -> list[int]:
    """Raises: ConfigError for more ranks than CUDA devices, but for the default of 2 on a machine with one."""
    count = torch.cuda.device_count()
    if device == "cpu":
        return sorted(set(asked))
    fitting = sorted({ranks for ranks in asked if ranks <= count})
    if not fitting:
        raise ConfigError(f"ranks={min(asked)} with device=cuda, but torch finds {count} CUDA devices here")
    return fitting


def _line(count: int, device: Device) -> str:
    rates, link = device.rates["fp32"], device.inside["all_reduce"]
    found = f"{count} rank{'s' if count > 1 else ''}: fp32 GFLOP/s dense {rates.dense / 1e9:.1f}, "
    found += f"experts {rates.experts / 1e9:.1f}, attention {rates.attention / 1e9:.1f}, head {rates.head / 1e9:.1f}; "
    found += f"memory {device.bandwidth / 1e9:.2f} GB/s; a layer {1e3 * device.layer_seconds['dense']:.2f} (dense) and "
    found += f"{1e3 * device.layer_seconds['moe']:.2f} ms (MoE) of calls"
    if count > 1:
        found += f"; all-reduce {link.bandwidth / 1e9:.2f} GB/s, {1e6 * link.latency:.0f} us"
    return found
