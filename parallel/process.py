"""The processes of a run: one alone, or the ranks that torchrun started.

    with running(device="auto") as process:
        ...                                     # sum_over_ranks, broadcast and barrier work here, alone as well

Alone there is no process group and every collective is a no-op, so that code above asks no questions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.errors import ConfigError, InputError

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Process:
    """Which process this is, and the device that it computes on.

    Attributes:
        rank: number of this process among all, from 0.
        local_rank: number among the processes of this machine.
        world: how many processes there are.
        device: cpu, or cuda with the index of the local rank.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0


def start(device: str = "auto", timeout_s: float = 1800.0) -> Process:
    """Join the process group that torchrun's environment describes, or stay alone if there is none.

    gloo carries CPU tensors and nccl CUDA tensors. On CPU the ranks of one machine share its cores.

    Args:
        device: auto takes cuda where there is one.
        timeout_s: how long a collective waits for the other ranks.

    Raises: ConfigError for an unknown device, cuda where there is none, or an incomplete environment.
    """
    rank, local_rank, local_world, world = _environment()
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        if chosen.type == "cpu":
            _share_cores(local_world)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Process(rank, local_rank, world, chosen)


def stop() -> None:
    """Leave the process group. Does nothing where there is none, so it may be called twice and after errors."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def running(device: str = "auto", timeout_s: float = 1800.0) -> Iterator[Process]:
    """`start`, and `stop` at the end whatever happens."""
    process = start(device, timeout_s)
    try:
        yield process
    finally:
        stop()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place over all ranks and return the tensor, the same bits on every rank; alone, the tensor as it is."""
    if _grouped():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast(value: T) -> T:
    """The value that rank 0 has; what other ranks pass is ignored. Any value that pickles."""
    if not _grouped():
        return value
    box = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """What each rank passes, by rank; alone, one value. Any value that pickles."""
    if not _grouped():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def place() -> tuple[int, int]:
    """Rank of this process and how many there are, once they know of each other; alone, 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)


def world_size() -> int:
    """How many processes the run has, by torchrun's environment, before they know of each other.

    Raises: ConfigError for an incomplete environment.
    """
    return _environment()[3]


def barrier() -> None:
    """Wait until every rank is here, without a word to the accelerator."""
    sum_over_ranks(torch.zeros(1))


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action`, which does not communicate, on every rank; if it fails on one, raise on all, so that none hangs.

    An InputError of another rank arrives as the same error; any other error arrives as RuntimeError with its text.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if _grouped():
        own = None if error is None else (type(error) if isinstance(error, InputError) else None, str(error))
        everyone: list[tuple[type[InputError] | None, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
        if error is None:
            for rank, failure in enumerate(everyone):
                if failure is not None:
                    kind, text = failure
                    raise kind(text) if kind is not None else RuntimeError(f"rank {rank} failed: {text}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _environment() -> tuple[int, int, int, int]:
    """Rank, local rank, local world size and world size from torchrun's variables; alone without them."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1, 1
    world = _number("WORLD_SIZE", least=1)
    if world == 1:
        return 0, 0, 1, 1
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"the environment has WORLD_SIZE={world} but no {name}, allowed: all that torchrun sets")
    rank = _number("RANK", least=0)
    if rank >= world:
        raise ConfigError(f"the environment has RANK={rank}, allowed: 0 to {world - 1} (WORLD_SIZE={world})")
    local_world = _number("LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in os.environ else world
    return rank, _number("LOCAL_RANK", least=0), local_world, world


def _number(name: str, least: int) -> int:
    text = os.environ[name]
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"the environment has {name}={text!r}, allowed: a whole number of {least} or more")
    return int(text)


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in DEVICES:
        raise ConfigError(f"trainer.device={device!r} is unknown, allowed: {', '.join(DEVICES)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("trainer.device='cuda' needs a CUDA device and torch finds none here, allowed: auto, cpu")
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device of its own, this machine shows {count}, "
            f"allowed: --nproc-per-node up to {count}, or trainer.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _share_cores(local_world: int) -> None:
    """Split the cores among the ranks of this machine.

    torchrun sets OMP_NUM_THREADS=1 for its children, which leaves most of a machine idle when there are fewer ranks
    than cores. Any other value was set by the user and stays.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, usable_cores() // local_world))


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, and the quota of its control group where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max" for no quota
        return cores
