"""DeepSpeed itself: found, told which device it is for, and quiet."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from ....kernels.errors import ConfigError
from ...process import Process


def check_installed() -> None:
    """Raises: ConfigError where there is no DeepSpeed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed needs the package deepspeed, which is not installed, "
            "allowed: pip install 'scatterfold[deepspeed]', or engine=torch"
        )


def load(process: Process) -> Any:
    """The module `deepspeed`, for the device of this process and over its process group.

    DeepSpeed picks its accelerator when it is first imported; a process that stays on the CPU of a machine with GPUs
    has to say so before.

    Raises: ConfigError if it was imported for another device.
    """
    check_installed()
    device = process.device.type
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", str(process.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.ERROR)  # its start alone is forty lines
    found = get_accelerator().device_name()
    if found.split(":")[0] != device:
        raise ConfigError(
            f"trainer.device={device} with engine=deepspeed, which found {found}, allowed: DS_ACCELERATOR={device} in "
            "the environment"
        )
    _join(process)
    return deepspeed


def _join(process: Process) -> None:
    """Give DeepSpeed's communication the process group of the run; alone, a group of one, without which it cannot be.

    `process.stop` takes it down like any other.
    """
    import deepspeed
    from deepspeed import comm

    if not dist.is_initialized():
        backend = "gloo" if process.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if process.device.type == "cpu":
        # An all-reduce through shared memory, which it would compile now, while the ranks wait for each other.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    comm.comm.cdb = None  # of a run before this one in the same process, whose groups are gone
    comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    from deepspeed.utils import groups

    groups._release_process_group_references()


def single_rank_groups(world: int) -> list[Any]:
    """A process group for each rank alone, which every rank must make. DeepSpeed knows no absent group."""
    return [dist.new_group([rank]) for rank in range(world)]


def default_dtype_is_float32() -> bool:
    return torch.get_default_dtype() == torch.float32
