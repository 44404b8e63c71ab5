"""How long ranks wait for each other, and what NCCL and gloo say: the `communication` group of a config.

torch, NCCL and gloo read all but the time from environment variables, when the process group is made. A variable that
the user has set stays; a setting that contradicts it is an error, because either of the two would be a surprise.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ...kernels.errors import ConfigError
from ..environment_variables import environment_variables
from ..torch_private import set_group_timeouts, write_flight_record

NCCL_DEBUG = ("version", "warn", "info", "trace")
# The numbers of TORCH_NCCL_ASYNC_ERROR_HANDLING.
NCCL_ERRORS = {"ignore": 0, "tear_down": 1, "clean_up": 2, "skip_clean_up": 3}
MEETING_S = 600.0  # ranks that start on many machines meet within this time, however short `timeout_s` is
WATCHDOG_FIRST_S = 300.0  # the watchdog, which can say who hangs, speaks before a collective gives up
FOLDER = "flight_recorder"


@dataclass(frozen=True)
class CommunicationSettings:
    """What the `communication` group of a config holds; None leaves a thing as the environment has it.

    Attributes:
        timeout_s: a collective that not all ranks join within this time ends the run; None for
            trainer.hang_timeout_s + 300. Counts from the first step on: until then ranks wait for data to be prepared.
        interface: the network interface through which NCCL and gloo find each other.
        nccl_debug: version, warn, info or trace.
        nccl_debug_subsystems: which parts of NCCL speak, such as INIT,NET.
        nccl_errors: what torch does when an NCCL collective fails or times out: ignore, tear_down (end the process),
            clean_up (abort the communicators) or skip_clean_up (end at once; torch's own choice).
        flight_recorder: so many of the latest collectives of each rank are remembered, and written to
            RUN/flight_recorder when the run stands still; 0 for none.

    Raises: ConfigError for a value that cannot be.
    """

    timeout_s: float | None = None
    interface: str | None = None
    nccl_debug: str | None = None
    nccl_debug_subsystems: str | None = None
    nccl_errors: str | None = None
    flight_recorder: int | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"communication.timeout_s={self.timeout_s} is out of range, allowed: null, above 0")
        if self.flight_recorder is not None and self.flight_recorder < 0:
            raise ConfigError(
                f"communication.flight_recorder={self.flight_recorder} is too small, allowed: null, 0 or more"
            )
        for name, allowed in (("nccl_debug", NCCL_DEBUG), ("nccl_errors", tuple(NCCL_ERRORS))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"communication.{name}={value!r} is unknown, allowed: null, {', '.join(allowed)}")

    def variables(self, run_dir: Path) -> dict[str, tuple[str, str]]:
        """Environment variables that the settings stand for: value and the name of the setting, by variable."""
        found: dict[str, tuple[str, str]] = {}

        def add(setting: str, value: object, *variables: str) -> None:
            found.update({variable: (str(value), setting) for variable in variables})

        if self.interface is not None:
            add("interface", self.interface, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if self.nccl_debug is not None:
            add("nccl_debug", self.nccl_debug.upper(), "NCCL_DEBUG")
        if self.nccl_debug_subsystems is not None:
            add("nccl_debug_subsystems", self.nccl_debug_subsystems, "NCCL_DEBUG_SUBSYS")
        if self.nccl_errors is not None:
            add("nccl_errors", NCCL_ERRORS[self.nccl_errors], "TORCH_NCCL_ASYNC_ERROR_HANDLING")
        if self.flight_recorder is not None:  # the second names are those of older versions of torch
            add("flight_recorder", self.flight_recorder, "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
        if self.flight_recorder:
            prefix = (run_dir / FOLDER).absolute() / "nccl-rank-"
            add("flight_recorder", prefix, "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
            add("flight_recorder", 1, "TORCH_NCCL_DUMP_ON_TIMEOUT")
        return found

    def check(self, run_dir: Path) -> None:
        """Raise ConfigError if this machine has no such interface, or the environment says something else."""
        interfaces = [name for _, name in socket.if_nameindex()]
        if self.interface is not None and self.interface not in interfaces:
            raise ConfigError(
                f"communication.interface={self.interface} is no network interface of this machine, "
                f"allowed: null, {', '.join(interfaces)}"
            )
        for variable, (value, setting) in self.variables(run_dir).items():
            there = _of_user(variable)
            if there is not None and there != value and not variable.endswith("TEMP_FILE"):
                raise ConfigError(
                    f"communication.{setting}={getattr(self, setting)}, but the environment has {variable}={there}, "
                    f"allowed: communication.{setting}=null, or without {variable}"
                )

    @contextmanager
    def in_environment(self, run_dir: Path) -> Iterator[None]:
        """Set the variables, as the process group that is made inside must find them. Raises: as `check`."""
        self.check(run_dir)
        new = {name: value for name, (value, _) in self.variables(run_dir).items() if _of_user(name) is None}
        with environment_variables(new):
            yield

    def waiting_time(self, hang_timeout_s: float) -> float:
        """How long a collective waits while training, in seconds."""
        return self.timeout_s if self.timeout_s is not None else hang_timeout_s + WATCHDOG_FIRST_S

    def meeting_time(self, hang_timeout_s: float) -> float:
        """How long ranks wait for each other before training: to meet, and for data to be prepared."""
        return max(self.waiting_time(hang_timeout_s), hang_timeout_s + WATCHDOG_FIRST_S, MEETING_S)

    def start_counting(self, hang_timeout_s: float) -> float:
        """From now on no collective of any group waits longer than `waiting_time`, which is returned."""
        if dist.is_initialized():
            set_group_timeouts(self.waiting_time(hang_timeout_s))
        return self.waiting_time(hang_timeout_s)

    def make_folder(self, run_dir: Path) -> None:
        """Where NCCL writes what it remembers; it makes no folder itself."""
        if self.flight_recorder:
            (run_dir / FOLDER).mkdir(exist_ok=True)

    def write_record(self, run_dir: Path, rank: int) -> None:
        """Write the latest collectives of this rank, as JSON, if they were to be remembered."""
        if self.flight_recorder:
            write_flight_record(run_dir / FOLDER / f"rank-{rank}.json")


def _of_user(variable: str) -> str | None:
    """What the user's environment gives for a variable; torchrun sets one of them for its ranks by itself."""
    value = os.environ.get(variable)
    is_of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and (variable, value) == (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "1",
    )
    return None if is_of_torchrun else value
