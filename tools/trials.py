"""Sweeps: every combination of values as a trial in a folder and a process of its own.

A trial that fails leaves the others alone; a trial that has finished in the same sweep folder is not run again, and one
that was stopped goes on from its last checkpoint. What became of a trial is in TRIAL/trial.json, what it printed in
TRIAL/trial.log.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from ..kernels.errors import ConfigError
from .run_folder import VARIABLE
from .trial import FAILED, FINISHED, LOG_FILE, RESULT, TRIAL_FILE, UNFINISHED, Trial, read_result

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from .composition import Session


class Sweep:
    """All trials of one `scatterfold train -m`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.trials: list[Trial] = []
        self._constant: set[str] = set()
        self._processes: set[subprocess.Popen] = set()
        self._owns_trials = False
        self._stopped_by: int | None = None

    def run(self) -> int:
        """Let Hydra's sweeper choose the trials and run them. Returns the exit code."""
        from hydra.core.hydra_config import HydraConfig

        config = self.session.compose_sweep()
        HydraConfig.instance().set_config(config)
        folder = Path(str(config.hydra.sweep.dir))
        self._constant = self.session.constant_keys()
        with self._signals(), _plugins_for_children():
            try:
                self.session.sweep(config, self.task)
            except Exception:
                # A sweeper such as optuna's gives up when every trial failed; those speak for themselves.
                if not self.trials:
                    _remove_empty(folder)
                if not any(trial.status == FAILED for trial in self.trials) and self._stopped_by is None:
                    raise
        return self._conclude(folder)

    def task(self, config: DictConfig) -> float:
        """One trial in this process: what Hydra's other launchers (joblib, submitit) call."""
        from hydra.core.hydra_config import HydraConfig

        from .train import checked, run

        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        request = replace(self.session.request, overrides=self.session.typed(hydra.overrides.task), multirun=False)
        result_file = folder / "result.json"
        os.environ[RESULT] = str(result_file.absolute())
        resolved = {**checked(self.session.resolve(config), request), "run_dir": str(folder)}
        run(resolved, request)
        return read_result(result_file)[1]

    def launch(
        self, jobs: Sequence[tuple[int, tuple[str, ...]]], config: DictConfig, loader: ConfigLoader, parallel: int
    ) -> list[JobReturn]:
        """Run a batch of trials, `parallel` at a time; called by the Hydra launcher."""
        if parallel < 1:
            raise ConfigError(f"hydra.launcher.parallel={parallel} is too small, allowed: 1 or more")
        self._owns_trials = True
        sweep_folder = Path(str(config.hydra.sweep.dir))
        if not self.trials:
            print(f"sweep {sweep_folder}", flush=True)
        placed: list[tuple[Trial, Path]] = []
        for number, overrides in jobs:
            taken = {folder for _, folder in placed}
            trial = Trial(number, self.session.typed(overrides))
            placed.append((trial, _folder_of(trial, overrides, sweep_folder, config, loader, taken)))
        slots: Queue[dict[str, str]] = Queue()
        for share in _shares(parallel):
            slots.put(share)
        with ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(self._run_trial, trial, folder, slots) for trial, folder in placed]
            done = [future.result() for future in futures]
        self.trials += done
        tolerant = "basic_sweeper" in str(config.hydra.sweeper._target_)
        return [_job_return(trial, config, tolerant) for trial in done]

    def _run_trial(self, trial: Trial, folder: Path, slots: Queue[dict[str, str]]) -> Trial:
        before = Trial.load(folder)
        if before is not None and before.status == FINISHED:
            self._say(trial, f"finished before, {_figure(before)}")
            return replace(before, number=trial.number)
        if self._stopped_by is not None:
            return replace(trial, status=UNFINISHED)
        trial.save(folder)
        self._say(trial, f"started, {folder / LOG_FILE}")
        result_file = folder / "result.json"
        result_file.unlink(missing_ok=True)
        start = time.monotonic()
        share = slots.get()
        try:
            code = self._wait(trial, folder, {**share, RESULT: str(result_file.absolute())})
        finally:
            slots.put(share)
        completed, objective = read_result(result_file)
        result_file.unlink(missing_ok=True)
        status = FINISHED if code == 0 and completed else UNFINISHED if code == 0 else FAILED
        if code != 0 and self._stopped_by is not None:
            status = UNFINISHED
        ended = replace(
            trial,
            status=status,
            exit_code=code,
            objective=None if math.isnan(objective) else objective,
            message=_last_line(folder / LOG_FILE) if status == FAILED else None,
            seconds=round(time.monotonic() - start, 1),
        ).save(folder)
        self._say(ended, _outcome(ended))
        return ended

    def _say(self, trial: Trial, text: str) -> None:
        varied = [word for word in trial.overrides if word.partition("=")[0].lstrip("+~") not in self._constant]
        print(f"trial {trial.number} ({' '.join(varied) or 'nothing varies'}): {text}", flush=True)

    def _wait(self, trial: Trial, folder: Path, environment: dict[str, str]) -> int:
        command = [sys.executable, "-m", "scatterfold.tools.train", *self.session.request.flags, *trial.overrides]
        with open(folder / LOG_FILE, "a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches the sweep, which passes on SIGTERM, so that the trial saves.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, VARIABLE: str(folder.absolute())},
                start_new_session=True,
            )
            self._processes.add(process)
            if self._stopped_by is not None:
                process.terminate()
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    @contextmanager
    def _signals(self):
        """Pass a request to stop on to the running trials, and start no others."""

        def stop(number: int, frame: object) -> None:
            if not self._owns_trials:
                raise KeyboardInterrupt  # one of Hydra's launchers, whose trials may run in this process
            again = self._stopped_by is not None
            self._stopped_by = number
            for process in list(self._processes):
                process.kill() if again else process.terminate()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _conclude(self, folder: Path) -> int:
        counts = {status: sum(t.status == status for t in self.trials) for status in (FINISHED, FAILED, UNFINISHED)}
        parts = [f"{count} {status}" for status, count in counts.items() if count]
        print(
            f"sweep {folder}: {', '.join(parts) or 'no trials'}; scatterfold sweep report source={folder}", flush=True
        )
        if self._stopped_by == signal.SIGINT:
            return 130
        return 1 if counts[FAILED] else 0


def _folder_of(
    trial: Trial,
    overrides: tuple[str, ...],
    sweep_folder: Path,
    config: DictConfig,
    loader: ConfigLoader,
    taken: set[Path],
) -> Path:
    """Where a trial belongs: where the same overrides ran before, else the folder that `hydra.sweep.subdir` names."""
    from omegaconf import open_dict

    for file in sorted(sweep_folder.rglob(TRIAL_FILE)):
        known = Trial.load(file.parent)
        if known is not None and sorted(known.overrides) == sorted(trial.overrides) and file.parent not in taken:
            return file.parent
    composed = loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(trial.number)
        composed.hydra.job.num = trial.number
    subdir = str(composed.hydra.sweep.subdir)
    folder, suffix = sweep_folder / subdir, trial.number
    while folder in taken or (folder / TRIAL_FILE).exists():  # another trial of an earlier sweep lives there
        suffix += 1
        folder = sweep_folder / (str(suffix) if subdir == str(trial.number) else f"{subdir}_{suffix}")
    return folder


@contextmanager
def _plugins_for_children():
    """Let processes that a launcher of Hydra's starts (submitit) find our plugin when they unpickle their job."""
    from .composition import PLUGINS

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), str(PLUGINS)])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.__setitem__("PYTHONPATH", before)


def _remove_empty(folder: Path) -> None:
    """Take back the folder of a sweep that had no trial: Hydra makes it before it looks at the trials."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == ["multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            folder.rmdir()
            folder.parent.rmdir()


def _shares(parallel: int) -> list[dict[str, str]]:
    """The visible GPUs, or the cores, shared out among trials that run at the same time.

    Trials that each use all cores wait for each other's threads, and are many times slower than in turn.
    """
    if parallel == 1:
        return [{}]
    import torch

    from ..parallel.process import usable_cores

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not devices and "OMP_NUM_THREADS" not in os.environ:
        return [{"OMP_NUM_THREADS": str(max(1, usable_cores() // parallel))}] * parallel
    if len(devices) < parallel:
        return [{}] * parallel
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[index::parallel])} for index in range(parallel)]


def _job_return(trial: Trial, config: DictConfig, tolerant: bool) -> JobReturn:
    """What Hydra's sweeper learns. Its own sweeper stops at a failure, so for that one a failure is a NaN."""
    from hydra.core.utils import JobReturn, JobStatus

    value: Any = math.nan if trial.objective is None else trial.objective
    good = trial.status == FINISHED or tolerant
    return JobReturn(
        overrides=list(trial.overrides),
        hydra_cfg=config,
        status=JobStatus.COMPLETED if good else JobStatus.FAILED,
        _return_value=value if good else RuntimeError(trial.message or trial.status),
    )


def _figure(trial: Trial) -> str:
    return "no validation loss" if trial.objective is None else f"valid loss {trial.objective:.4f}"


def _outcome(trial: Trial) -> str:
    if trial.status == FAILED:
        return f"failed with exit code {trial.exit_code} after {trial.seconds:.0f} s: {trial.message}"
    if trial.status == UNFINISHED:
        return f"stopped after {trial.seconds:.0f} s, the same sweep goes on from its checkpoint"
    return f"finished in {trial.seconds:.0f} s, {_figure(trial)}"


def _last_line(log: Path) -> str:
    """The last thing that a process said, which for our commands is the reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("scatterfold")]
    return (said or lines or ["nothing was printed"])[-1]
