"""What there is: versions, processors, links, clocks, disks, limits."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ...moe.training.environment import device_name, driver_version, nccl_version, package_version
from .clocks import describe_clocks
from .links import describe_links
from .storage import describe_storage

PACKAGES = (
    "scatterfold",
    "triton",
    "transformers",
    "megatron-core",
    "deepspeed",
    "quack-kernels",
    "hydra-core",
)


def describe_machine(run_dir: Path, disk_megabytes: int) -> dict[str, Any]:
    """Versions (None: not installed), CPU, GPUs, links, clocks, disks and limits.

    Args:
        run_dir: where run folders are or will be.
        disk_megabytes: how much to write and read for the speed of disks; 0 for none.
    """
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: package_version(name) for name in PACKAGES},
        "cpu": {
            "name": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "nccl": nccl_version(),
        "links": describe_links(),
        "clocks": describe_clocks(),
        **describe_storage(run_dir, disk_megabytes),
    }


def _gpu(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability}
