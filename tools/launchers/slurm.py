"""Runs as SLURM jobs: a batch script that starts one launcher on each node."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ...kernels.errors import ConfigError
from .. import rank_report
from ..files import write_atomically
from ..run_folder import VARIABLE
from ..trial import RESULT


@dataclass(frozen=True)
class Slurm:
    """Write a batch script and give it to `sbatch`.

    Attributes:
        nodes: machines.
        nproc_per_node: ranks on each: a number, gpu, cpu or auto.
        gpus_per_node, cpus_per_task, mem, partition, account, qos, constraint, time, job_name: as sbatch takes them;
            None to leave the cluster's default.
        signal_seconds: how long before the end of its time the run is told to save.
        max_restarts: how often ranks are started again after a failure.
        wait: stay until the job has ended, and return its exit code.

    Raises: ConfigError for a value that cannot be.
    """

    nodes: int = 1
    nproc_per_node: int | str = "auto"
    gpus_per_node: int | str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    job_name: str = "scatterfold"
    signal_seconds: int = 120
    max_restarts: int = 0
    wait: bool = False

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("signal_seconds", 0), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"launcher.{name}={getattr(self, name)} is too small, allowed: {least} or more")

    def run(self, words: list[str], folder: Path) -> int:
        """Write RUN/job.sh for `scatterfold train WORDS` and submit it. Returns sbatch's exit code."""
        if shutil.which("sbatch") is None:
            raise ConfigError("launcher=slurm needs sbatch, which is not here, allowed: a machine that submits jobs")
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "job.sh"
        write_atomically(script, self.script(words, folder))
        in_sweep = RESULT in os.environ
        command = ["sbatch", "--parsable", *(["--wait"] if self.wait or in_sweep else []), str(script)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode == 0:
            print(f"job {result.stdout.strip().partition(';')[0]}: {script}", flush=True)
            return 0
        rank_report.tell(f"sbatch {script} ended with exit code {result.returncode}", 1)
        return result.returncode if result.returncode in (1, 2) else 1

    def script(self, words: list[str], folder: Path | None) -> str:
        """The batch script.

        Args:
            words: of `scatterfold train`.
            folder: run folder; None for one named after the job, which a requeued job finds again.
        """
        # In every srun task runs one launcher; they meet at the first node of the job.
        options = [f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in self._options(folder)]
        run_dir = "runs/slurm_$SLURM_JOB_ID" if folder is None else str(folder.absolute())
        run_dir = f'"{run_dir}"' if folder is None else shlex.quote(run_dir)
        launch = [
            *(sys.executable, "-m", "scatterfold.tools.launch"),
            *("--nproc-per-node", str(self.nproc_per_node)),
            *("--max-restarts", str(self.max_restarts)),
        ]
        lines = [
            "#!/usr/bin/env bash",
            "# Written by scatterfold. Submit it with sbatch; the same job again, or requeued, resumes its run folder.",
            *options,
            "",
            "set -euo pipefail",
            f"cd {shlex.quote(os.getcwd())}",
            "",
            f"export {VARIABLE}=${{{VARIABLE}:-{run_dir}}}" if folder is None else f"export {VARIABLE}={run_dir}",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "head=${hosts%%$'\\n'*}",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
            "",
            "srun --kill-on-bad-exit=1 \\",
            f"  {shlex.join(launch)} \\",
            '  --nnodes "$SLURM_NNODES" --rdzv-endpoint "$head:$port" \\',
            f"  {shlex.join(['train', *words])}",
            "",
        ]
        return "\n".join(lines)

    def _options(self, folder: Path | None) -> list[tuple[str, object]]:
        log = "slurm-%j.log" if folder is None else f"{folder.absolute()}/slurm-%j.log"
        given = [
            ("job_name", self.job_name),
            ("nodes", self.nodes),
            ("ntasks_per_node", 1),
            ("gpus_per_node", self.gpus_per_node),
            ("cpus_per_task", self.cpus_per_task),
            ("mem", self.mem),
            ("partition", self.partition),
            ("account", self.account),
            ("qos", self.qos),
            ("constraint", self.constraint),
            ("time", self.time),
            ("signal", f"TERM@{self.signal_seconds}" if self.signal_seconds else None),
            ("output", log),
            ("open_mode", "append"),
        ]
        return [(name, value) for name, value in given if value is not None]
