"""What a run ran on and which code it was, for its folder and its checkpoints.

Nothing here may tell a secret: names of variables and keys that look like one (token, password, …) are left out, and a
password inside of an address is replaced. Names of machines are left out as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...kernels.processor import cpuinfo

PACKAGES = (
    *("scatterfold", "torch", "triton", "numpy", "megatron-core", "safetensors", "tokenizers", "hydra-core"),
    *("transformers", "deepspeed", "wandb", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12"),
)
# Variables that change what is computed, how it communicates or how fast it is.
PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "CUBLAS_",
    "OMP_",
    "MKL_",
    "TRITON_",
    "SCATTERFOLD_",
)
NAMES = (
    *("LD_PRELOAD", "PYTHONHASHSEED", "HF_HUB_OFFLINE", "FI_PROVIDER", "UCX_TLS", "PET_NNODES", "PET_NPROC_PER_NODE"),
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT"),
)
_OF_THE_LAUNCHER = ("SCATTERFOLD_LAUNCH_DIR", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE")
_SECRET = re.compile(r"key|token|secret|passw|passphrase|credential|auth|cookie|private", re.IGNORECASE)
_PASSWORD = re.compile(r"(\w+://)[^/@\s]+@")
_HIDDEN = "***"


def describe_environment(device: torch.device, world: int) -> dict[str, Any]:
    """Versions, device, command, variables that matter, and git revisions of the working directory and of our code."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_secrets(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))}
        | {"torch": torch.__version__},  # it alone says which CUDA the build is for
        "device": device_name(device),
        "processes": world,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "nccl": nccl_version(),
        "driver": driver_version(),
        "variables": variables_that_matter(os.environ),
        "git": git_revision(Path.cwd()),
        "code": _revision_of_code(),
    }


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine() or "CPU"


def driver_version() -> str | None:
    """Of NVIDIA's kernel driver; None where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        return found.group(1) if found else None
    return None


def nccl_version() -> str | None:
    """Of the NCCL that torch brings; None for a build without."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]


def variables_that_matter(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that change a run, sorted; none that looks like a secret."""
    return {
        name: _PASSWORD.sub(rf"\1{_HIDDEN}@", value)
        for name, value in sorted(environment.items())
        if (name.startswith(PREFIXES) or name in NAMES) and not _SECRET.search(name) and name not in _OF_THE_LAUNCHER
    }


def without_secrets(words: Iterable[str]) -> list[str]:
    """The words of a command; the value of `some.api_key=VALUE` or `--token VALUE` is hidden."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        key, equals, _ = word.partition("=")
        is_secret = bool(_SECRET.search(key)) and not key.startswith(("data.", "model."))
        if hide_next:
            shown.append(_HIDDEN)
        elif equals and is_secret:
            shown.append(f"{key}={_HIDDEN}")
        else:
            shown.append(_PASSWORD.sub(rf"\1{_HIDDEN}@", word))
        hide_next = not hide_next and not equals and is_secret and word.startswith("--")
    return shown


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The commit that is checked out in `folder`, and how tracked files differ from it; None outside a repository.

    Returns: `commit`, `changed`, and if so `changed_files` and `diff_sha256`, the hash of `git diff HEAD --binary`: two
        runs with the same commit and hash ran the same code.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(folder, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color") or b""
    revision: dict[str, Any] = {"commit": commit.decode().strip(), "changed": bool(diff)}
    if diff:
        names = _git(folder, "diff", "HEAD", "--name-only") or b""
        revision["changed_files"] = names.decode(errors="replace").splitlines()
        revision["diff_sha256"] = hashlib.sha256(diff).hexdigest()
    return revision


def _revision_of_code() -> dict[str, Any] | None:
    """Of the repository that this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return git_revision(root) if (root / ".git").exists() else None


def package_version(name: str) -> str | None:
    """Of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
