"""Runs as SLURM jobs: a batch script that starts one launcher on each node."""

from __future__ import annotations

import os
import re
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
from ..sweep.trial import RESULT
from .torchrun import UNFINISHED

# What sbatch takes: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.
TIME = re.compile(r"(?:\d+-)?\d+(?::\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
ARRAY = re.compile(r"\d+(?:-\d+(?::\d+)?)?(?:,\d+(?:-\d+(?::\d+)?)?)*(?:%\d+)?")
OWN = ("nodes", "ntasks-per-node", "signal", "output", "open-mode")  # options on which the script itself relies


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
        requeue: a job that was preempted, or came to the end of its time, waits in the queue again and goes on.
        array: several jobs, as sbatch takes them. Each has a folder of its own, run_dir/array-N; with %1 they are one
            run in several jobs, one after the other in the same folder.
        setup: lines of shell before the start, such as `module load cuda`; the path of a file stands for its lines.
        container_image, container_mounts: of enroot's plugin for SLURM (pyxis).
        python: the interpreter on the nodes; None for the one that runs now, or `python` inside of a container.
        sbatch: other options of sbatch, NAME=VALUE or NAME.

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
    requeue: bool = False
    array: str | None = None
    setup: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: str | None = None
    python: str | None = None
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("signal_seconds", 0), ("max_restarts", 0), ("cpus_per_task", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"launcher.{name}={value} is too small, allowed: {least} or more")
        for name, pattern, allowed in (
            ("time", TIME, "minutes, H:MM:SS or D-HH:MM:SS"),
            ("mem", MEMORY, "a number and K, M, G or T"),
            ("array", ARRAY, "such as 0-7, 1,3,5 or 1-10%1"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(str(value)):
                raise ConfigError(f"launcher.{name}={value} is nothing that sbatch takes, allowed: {allowed}")
        if self.container_mounts is not None and self.container_image is None:
            raise ConfigError(
                f"launcher.container_mounts={self.container_mounts} without a container, allowed: with container_image"
            )
        for option in self.sbatch:
            name = option.lstrip("-").partition("=")[0]
            if name in OWN or name.replace("-", "_") in self.__dataclass_fields__:
                raise ConfigError(f"launcher.sbatch={option} is set by the script itself, allowed: other options")
        for name, value in self._options(None):
            if any(character in str(value) for character in "\n\r"):
                raise ConfigError(f"launcher.{name}={value!r} has several lines, allowed: one")

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
        options = [
            f"#SBATCH --{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in self._options(folder)
        ]
        lines = [
            "#!/usr/bin/env bash",
            "# Written by scatterfold. Submit it with sbatch; the same job again, or requeued, resumes its run folder.",
            *options,
            "",
            "set -eo pipefail",
            f"cd {shlex.quote(os.getcwd())}",
            *(_sourced(line) for line in self.setup),
            "set -u",  # not before: what modules and conda do breaks it
            "",
            *self._run_folder(folder),
            # In every srun task runs one launcher; they meet at the first node of the job.
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "head=${hosts%%$'\\n'*}",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
            "",
            *self._srun(words),
            "",
        ]
        return "\n".join(lines)

    def _run_folder(self, folder: Path | None) -> list[str]:
        if folder is None:
            lines = [f'export {VARIABLE}=${{{VARIABLE}:-"runs/slurm_$SLURM_JOB_ID"}}']
        else:
            lines = [f"export {VARIABLE}={shlex.quote(str(folder.absolute()))}"]
        if folder is not None and not (self.array or "").endswith("%1"):
            lines.append(f'[ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || {VARIABLE}+=/array-$SLURM_ARRAY_TASK_ID')
        return lines

    def _srun(self, words: list[str]) -> list[str]:
        """Start the launchers, and what follows when they have ended."""
        srun = ["srun", "--kill-on-bad-exit=1"]  # a node that fails takes the others along: they would wait for it
        if self.cpus_per_task is not None:
            srun.append(f"--cpus-per-task={self.cpus_per_task}")  # srun does not take it from sbatch, from 22.05 on
        if self.container_image is not None:
            srun += [f"--container-image={self.container_image}", f"--container-workdir={os.getcwd()}"]
        if self.container_mounts is not None:
            srun.append(f"--container-mounts={self.container_mounts}")
        launch = [
            *(self._interpreter(), "-m", "scatterfold.tools.launch"),
            *("--nproc-per-node", str(self.nproc_per_node)),
            *("--max-restarts", str(self.max_restarts)),
        ]
        train = ["train", *(word for word in words if not word.startswith("run_dir="))]
        lines = [
            f"{shlex.join(srun)} \\",
            f"  {shlex.join(launch)} \\",
            '  --nnodes "$SLURM_NNODES" --rdzv-endpoint "$head:$port" \\',
            f"  {shlex.join(train)} \"run_dir='${VARIABLE}'\"",
        ]
        if self.requeue:
            lines[-1] += " || code=$?"
            lines = [
                "code=0",
                *lines,
                "# Told to stop, it has saved and has steps left: back to the queue, to go on from there.",
                f'if [ "$code" = 0 ] && [ -e "${VARIABLE}/logs/{UNFINISHED}" ]; then',
                '  scontrol requeue "$SLURM_JOB_ID"',
                "fi",
                'exit "$code"',
            ]
        return lines

    def _interpreter(self) -> str:
        return self.python or ("python" if self.container_image else sys.executable)

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
            ("array", self.array),
            ("requeue", self.requeue or None),
            ("signal", f"TERM@{self.signal_seconds}" if self.signal_seconds else None),
            ("output", log),
            ("open_mode", "append"),
        ]
        for option in self.sbatch:
            name, equals, value = option.lstrip("-").partition("=")
            given.append((name, value if equals else True))
        return [(name, value) for name, value in given if value is not None]


def _sourced(line: str) -> str:
    """A line of shell as it is, or the reading of a file of them."""
    path = Path(line).expanduser()
    return f"source {shlex.quote(str(path.absolute()))}" if path.is_file() else line
