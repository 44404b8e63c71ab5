"""What there is: versions, processors, disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...moe.training.environment import device_name

PACKAGES = (
    "scatterfold",
    "triton",
    "transformers",
    "megatron-core",
    "deepspeed",
    "quack-kernels",
    "hydra-core",
)


def describe_machine(run_dir: Path) -> dict[str, Any]:
    """Versions (None: not installed), CPU, GPUs, and the free bytes where `run_dir` is or would be made."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | _versions(),
        "cpu": {
            "name": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "disk": {"run_dir": str(run_dir), "free_bytes": shutil.disk_usage(_existing(run_dir)).free},
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _gpu(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
