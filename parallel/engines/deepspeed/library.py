"""DeepSpeed itself: found, told which device it is for, quiet, and over the process group of the run."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch.distributed as dist

from ....kernels.errors import ConfigError
from ...process import Process

OLDEST = (0, 19, 8)  # what `training` and `state` take from inside of DeepSpeed was read and tested there
_INSTALL = "allowed: pip install 'scatterfold[deepspeed]', or engine=torch"


def check_installed() -> None:
    """Raises: ConfigError where there is no DeepSpeed, or an old one."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(f"engine=deepspeed needs the package deepspeed, which is not installed, {_INSTALL}") from None
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"engine=deepspeed needs deepspeed {oldest} or newer and finds {found}, {_INSTALL}")


def check_disk() -> None:
    """Raises: ConfigError where what DeepSpeed reads and writes disks with cannot be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[reportAttributeAccessIssue]

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "engine.offload_optimizer or engine.offload_parameters=nvme needs DeepSpeed's async_io, for which libaio "
            "with its headers is missing, allowed: installing libaio-dev, or cpu"
        )


def load(process: Process) -> ModuleType:
    """The module `deepspeed`, for the device of this process and over its process group.

    DeepSpeed picks its accelerator when it is first imported; a process that stays on the CPU of a machine with GPUs
    has to say so before.

    Raises: ConfigError if it is not installed, or took another device.
    """
    check_installed()
    device = process.device.type
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.+` is deprecated", FutureWarning)  # once a call, in its code
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.ERROR)  # its start alone is forty lines
    found = get_accelerator().device_name()  # type: ignore[union-attr]
    if found.split(":")[0] != device:
        raise ConfigError(
            f"trainer.device={device} with engine=deepspeed, which took {found}, allowed: DS_ACCELERATOR={device} in "
            "the environment"
        )
    _join(process, deepspeed)
    return deepspeed


def _join(process: Process, deepspeed: ModuleType) -> None:
    """Give DeepSpeed the process group of the run; alone, a group of one, without which it cannot be.

    `process.stop` takes that down like any other. What DeepSpeed remembers of an earlier run in this process, whose
    groups may be gone, is forgotten.
    """
    from deepspeed.utils import groups

    if not dist.is_initialized():
        backend = "gloo" if process.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[reportPrivateImportUsage]
    if process.device.type == "cpu":
        # An all-reduce through shared memory, which it would compile now, while the ranks wait for each other.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references()
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
