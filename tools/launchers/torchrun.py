"""Several ranks on this machine, or on several machines that each start a launcher, through torch.distributed.run."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.errors import ConfigError
from ...parallel.environment_variables import environment_variables
from .. import rank_report
from ..run_folder import VARIABLE
from .machines import parse_endpoint, parse_nodes, parse_rendezvous

if TYPE_CHECKING:
    from .rank_logs import RankLogs

WORDS = ("auto", "gpu", "cpu")
UNFINISHED = "unfinished"  # in RUN/logs: the run was stopped and has saved, and has steps left


@dataclass(frozen=True)
class Torchrun:
    """Start N ranks of `scatterfold train` and stay until they have ended.

    Attributes:
        nproc_per_node: ranks on this machine: a number, gpu, cpu, or auto for one a GPU or else one a core.
        nnodes: machines; with several, the same command must run on each. MIN:MAX for a run that goes on, from its
            newest checkpoint, when machines leave or join.
        rdzv_endpoint: HOST:PORT of one of the machines, where they find each other.
        max_restarts: how often all ranks are started again after one has failed; they resume from the checkpoint.
        rdzv_conf: how long machines wait for each other, KEY=SECONDS,… with the keys of torch's rendezvous.
        local_addr: how other machines reach this one; None for its host name.
        node_rank: number of this machine, of which 0 is the one at `rdzv_endpoint`; None to tell by its name.
        stopped_code: exit code of a run that a signal stopped, after it has saved.

    Raises: ConfigError for a value that cannot be.
    """

    nproc_per_node: int | str = "auto"
    nnodes: int | str = 1
    rdzv_endpoint: str | None = None
    max_restarts: int = 0
    rdzv_conf: str | None = None
    local_addr: str | None = None
    node_rank: int | None = None
    stopped_code: int = 0

    def __post_init__(self) -> None:
        nproc = self.nproc_per_node
        if isinstance(nproc, str) and nproc not in WORDS or isinstance(nproc, int) and nproc < 1:
            raise ConfigError(
                f"launcher.nproc_per_node={nproc} is no number of processes, allowed: 1 or more, {', '.join(WORDS)}"
            )
        least, most = self.machines
        parse_rendezvous(self.rdzv_conf)
        if self.rdzv_endpoint is not None:
            parse_endpoint(self.rdzv_endpoint)
        if not 0 <= self.stopped_code < 256:
            raise ConfigError(f"launcher.stopped_code={self.stopped_code} is no exit code, allowed: 0 to 255")
        if self.max_restarts < 0:
            raise ConfigError(f"launcher.max_restarts={self.max_restarts} is negative, allowed: 0 or more")
        if least < most and self.max_restarts == 0:
            raise ConfigError(
                f"launcher.nnodes={self.nnodes} with max_restarts=0 would end with the first machine that leaves, "
                "allowed: --max-restarts 1 or more"
            )
        if most > 1 and self.rdzv_endpoint is None:
            raise ConfigError(
                f"launcher.nnodes={self.nnodes} needs a place to meet, allowed: --rdzv-endpoint HOST:PORT, the same on "
                "every machine"
            )

    @property
    def machines(self) -> tuple[int, int]:
        """Fewest and most."""
        return parse_nodes(self.nnodes)

    def run(self, words: list[str], folder: Path) -> int:
        """Run `scatterfold train WORDS` on every rank, in the run folder `folder`."""
        return _Group(self, folder).run([sys.executable, "-m", "scatterfold.tools.train", *words])


class _Group:
    """The ranks of one machine while they run."""

    def __init__(self, settings: Torchrun, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.logs = folder / "logs"
        self.meeting = Path(tempfile.mkdtemp(prefix="scatterfold_"))
        self.stopped_by: int | None = None
        self.rank_logs: RankLogs | None = None

    def run(self, command: list[str]) -> int:
        is_new = [path for path in (self.folder, self.logs) if not path.exists()]
        try:
            with self._environment(), self._signals():
                code = self._launch(command)
            if code == 2:  # bad input: nothing happened, so leave nothing behind
                self._remove(is_new)
            if code == 0 and rank_report.is_unfinished(self.meeting):
                (self.logs / UNFINISHED).touch()  # for whoever starts the job again; see Slurm
                code = self.settings.stopped_code
            return 130 if self.stopped_by == signal.SIGINT else code
        finally:
            shutil.rmtree(self.meeting, ignore_errors=True)

    def _launch(self, command: list[str]) -> int:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        from torch.distributed.run import determine_local_world_size

        from .rank_logs import RankLogs

        nproc = determine_local_world_size(str(self.settings.nproc_per_node))
        least, most = self.settings.machines
        alone = most == 1
        try:
            self.rank_logs = RankLogs(self.logs, before_start=lambda: rank_report.forget(self.meeting))
            (self.logs / UNFINISHED).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.folder} cannot be made ({error.strerror}), allowed: a folder that can be written"
            ) from error
        config = LaunchConfig(
            min_nodes=least,
            max_nodes=most,
            nproc_per_node=nproc,
            run_id=str(self.folder).replace("/", "_"),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if alone else self.settings.rdzv_endpoint or "",
            rdzv_configs=self._rendezvous(alone),
            local_addr="localhost" if alone else self.settings.local_addr,
            max_restarts=self.settings.max_restarts,
            monitor_interval=0.1,
            logs_specs=self.rank_logs,
            role="",
            log_line_prefix_template="${role_name}",  # empty: what rank 0 prints is what the user sees
            signals_to_handle="SIGQUIT",  # the others are passed on below, so that ranks have all the time they need
        )
        if nproc > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun; on CPU the ranks then share the cores
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # rank 0's lines appear when they are printed
        try:
            elastic_launch(config, command[0])(*command[1:])
            return 0
        except ChildFailedError as error:
            return self._failure(error.failures)
        except SignalException as error:
            return 128 + error.sigval
        except RendezvousError as error:
            if self.stopped_by is not None:
                return 128 + self.stopped_by
            place, reason = self.settings.rdzv_endpoint, str(error) or type(error).__name__
            rank_report.tell(f"the machines of this run did not meet at {place} ({reason.splitlines()[0]})", 1)
            return 1

    def _rendezvous(self, alone: bool) -> dict[str, Any]:
        """What torch's rendezvous takes besides the place."""
        found: dict[str, Any] = dict(parse_rendezvous(self.settings.rdzv_conf))
        if self.settings.node_rank is not None and not alone:
            found["is_host"] = self.settings.node_rank == 0
        return found

    def _failure(self, failures: dict[int, Any]) -> int:
        """Print one line for all ranks and return the exit code that they asked for."""
        from .rank_logs import nccl_timeout

        words = rank_report.last_words(self.meeting)
        if self.stopped_by is not None and not words:
            return 128 + self.stopped_by  # asked to stop before training began: there was nothing to save
        if words:
            first = words[0]
            where = "" if first.code == 2 else f" (rank {first.rank}; its traceback is in {self._log(first.rank)})"
            rank_report.tell(first.message + where, first.code)
            return first.code
        rank, failure = next(iter(sorted(failures.items())))
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        waited = nccl_timeout(self._log(rank))
        why = f"waited too long in NCCL: {waited}" if waited else f"ended with {how}"
        rank_report.tell(f"rank {rank} {why}; its log is {self._log(rank)}", 1)
        return 1

    def _log(self, rank: int) -> Path:
        known = self.rank_logs.errors if self.rank_logs is not None else {}
        return known.get(rank, self.logs)

    def _remove(self, paths: list[Path]) -> None:
        for path in reversed(paths):
            if path == self.logs:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.rmdir()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """What the ranks inherit: the run folder and where to leave word. torch's own warnings stay out of sight."""
        given = {VARIABLE: str(self.folder), rank_report.FOLDER: str(self.meeting)}
        # Ranks that are started again must not find the addresses of those that died, so they meet at a new store.
        given["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        disabled = logging.root.manager.disable
        if not os.environ.get("SCATTERFOLD_DEBUG"):
            logging.disable(logging.CRITICAL)
        try:
            with environment_variables(given):
                yield
        finally:
            logging.disable(disabled)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass a request to stop on to the ranks, which save and end; a second Ctrl-C does not wait for them."""

        def stop(number: int, frame: object) -> None:
            if self.stopped_by is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped_by = number
            (self.meeting / "stop").touch()
            for process in rank_report.registered(self.meeting):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
