"""Sweeps: every combination of values as a trial in a folder and a process of its own.

A trial that fails leaves the others alone; a trial that has finished in the same sweep folder is not run again, and one
that was stopped goes on from its last checkpoint. What became of a trial is in TRIAL/trial.json, what it printed in
TRIAL/trial.log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue
from statistics import fmean
from typing import TYPE_CHECKING

from ...kernels.errors import ConfigError
from ...parallel.environment_variables import environment_variables
from .. import rank_report
from ..errors import describe, report
from ..run_folder import VARIABLE
from .placing import Job, Placed, check_launcher, folder_of, remove_empty, seeded, shares, trials_in
from .trial import (
    DROPPED,
    FAILED,
    FINISHED,
    LOG_FILE,
    PAUSED,
    RESULT,
    UNFINISHED,
    Trial,
    figure,
    last_line,
    outcome,
    read_result,
    status_of,
)

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from ..composition import Session


class Stopped(Exception):
    """The sweep was asked to stop: no sweeper is to choose more trials."""


class Sweep:
    """All trials of one `scatterfold train -m`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._ended: dict[Path, Trial] = {}
        self._constant: set[str] = set()
        self._processes: set[subprocess.Popen] = set()
        self._owns_trials = False
        self._stopped_by: int | None = None

    def run(self) -> int:
        """Let Hydra's sweeper choose the trials and run them. Returns the exit code."""
        from hydra.core.hydra_config import HydraConfig

        from .optuna_study import prepare_study

        config = self.session.compose_sweep()
        HydraConfig.instance().set_config(config)
        folder = Path(str(config.hydra.sweep.dir))
        self._constant = self.session.constant_keys()
        with self._signals(), _plugins_for_children():
            try:
                if prepare_study(config, folder):
                    self.session.sweep(config, self.task)
            except Stopped:
                pass
            except Exception as error:
                # A sweeper such as optuna's gives up when every trial failed; those speak for themselves.
                ended = list(self._ended.values()) or [trial for trial, _ in trials_in(folder)]
                if not ended:
                    remove_empty(folder)
                if type(error).__module__.partition(".")[0] == "submitit":
                    # One of its jobs was killed. It waits for no other then, but the cluster runs them on.
                    what = (str(error).splitlines() or [type(error).__name__])[0]
                    rank_report.tell(f"a job has left no result ({what}); the other jobs run on, look again later", 1)
                    return 1
                if isinstance(error, ConfigError) or not any(trial.status == FAILED for trial in ended):
                    raise
        return self._conclude(folder)

    def task(self, config: DictConfig) -> float | None:
        """One trial in this process: what Hydra's other launchers (basic, joblib, submitit) call.

        Returns: the objective; None if there is none, which optuna takes for a failure and Hydra's sweeper ignores.
        """
        from hydra.core.hydra_config import HydraConfig

        from ..train import checked, run

        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        trial = Trial(int(hydra.job.num), self.session.typed(hydra.overrides.task)).save(folder)
        request = replace(self.session.request, overrides=trial.overrides, multirun=False)
        result_file, message = folder / "result.json", None
        start = time.monotonic()
        names = self._names(trial, Path(str(hydra.sweep.dir)))
        with environment_variables({RESULT: str(result_file.absolute()), **names}):
            try:
                code = run({**checked(self.session.resolve(config), request), "run_dir": str(folder)}, request)
            except Exception as error:
                code, message = report(error), describe(error)[0]
        ended = self._end(trial, folder, code, start, None, message or f"exit code {code}")
        if ended.status != FINISHED and not _tolerates(hydra.sweeper):
            raise RuntimeError(ended.message or ended.status)
        return ended.objective

    def halve(
        self, config: DictConfig, loader: ConfigLoader, words: Sequence[str], eta: int, min_steps: int | None
    ) -> None:
        """Run the sweep of the overrides `words` with successive halving; called by the Hydra sweeper."""
        from .halving import Halving, combinations

        Halving(self, config, loader, combinations(words, loader), eta, min_steps).run()

    def launch(
        self,
        numbered: Sequence[tuple[int, tuple[str, ...]]],
        config: DictConfig,
        loader: ConfigLoader,
        parallel: int,
        seeds: Sequence[int] = (),
    ) -> list[JobReturn]:
        """Run a batch of trials; called by the Hydra launcher. For the arguments see `run_batch`."""
        from hydra.core.utils import JobReturn, JobStatus

        jobs = [Job(number, overrides) for number, overrides in numbered]
        returns = []
        for job, placed in zip(jobs, self.run_batch(jobs, config, loader, parallel, seeds)):
            trials = [trial for trial, _ in placed]
            failed = next((trial for trial in trials if trial.status != FINISHED), None)
            if failed is None or _tolerates(config.hydra.sweeper):
                status, value = JobStatus.COMPLETED, None if failed else mean_or_none([t.objective for t in trials])
            else:
                status, value = JobStatus.FAILED, RuntimeError(failed.message or failed.status)
            returns.append(JobReturn(list(job.overrides), hydra_cfg=config, status=status, _return_value=value))
        return returns

    def run_batch(
        self,
        jobs: Sequence[Job],
        config: DictConfig,
        loader: ConfigLoader,
        parallel: int,
        seeds: Sequence[int] = (),
        stop_after: int | None = None,
    ) -> list[list[Placed]]:
        """Run the trials of a batch, `parallel` at a time.

        Args:
            seeds: run every job once for each; a job then is several trials.
            stop_after: the step after which trials pause; None to run them to the end.

        Returns: of each job, its trials as they ended.
        Raises: ConfigError before any trial starts; Stopped after a signal, when the trials have saved.
        """
        check_launcher(jobs, parallel, seeds)
        sweep_folder = Path(str(config.hydra.sweep.dir))
        self.announce(sweep_folder)
        placed = self.place(jobs, config, loader, seeds)
        slots: Queue[dict[str, str]] = Queue()
        # A SLURM job has its own machine, not a share of ours.
        elsewhere = all("launcher=slurm" in job.overrides for job in jobs)
        for share in [{}] * parallel if elsewhere else shares(parallel):
            slots.put(share)
        with ThreadPoolExecutor(parallel) as pool:
            ended = [
                [pool.submit(self._run_trial, *one, sweep_folder, slots, stop_after) for one in of_job]
                for of_job in placed
            ]
        done = [
            [Placed(future.result(), folder) for future, (_, folder) in zip(futures, of_job)]
            for futures, of_job in zip(ended, placed)
        ]
        self._ended.update({folder: trial for of_job in done for trial, folder in of_job})
        if self._stopped_by is not None:
            raise Stopped
        return done

    def announce(self, folder: Path) -> None:
        """Say, the first time, where the trials go; from now on a signal stops them rather than this process."""
        if not self._owns_trials:
            print(f"sweep {folder}", flush=True)
        self._owns_trials = True

    def place(
        self, jobs: Sequence[Job], config: DictConfig, loader: ConfigLoader, seeds: Sequence[int]
    ) -> list[list[Placed]]:
        """Find the folder of every trial, without running any."""
        sweep_folder = Path(str(config.hydra.sweep.dir))
        known, taken = trials_in(sweep_folder), set()
        placed: list[list[Placed]] = []
        for job in jobs:
            placed.append([])
            for number, overrides in seeded(job, seeds):
                trial = Trial(number, self.session.typed(overrides))
                folder = folder_of(trial, overrides, sweep_folder, config, loader, known, taken)
                taken.add(folder)
                placed[-1].append(Placed(trial, folder))
        return placed

    def settle(self, placed: Placed, status: str, message: str | None = None) -> None:
        """Write down what a sweeper decided about a trial."""
        trial = replace(placed.trial, status=status, message=message).save(placed.folder)
        self._ended[placed.folder] = trial

    def _run_trial(
        self, trial: Trial, folder: Path, sweep_folder: Path, slots: Queue[dict[str, str]], stop_after: int | None
    ) -> Trial:
        before = Trial.load(folder)
        if before is not None:
            if before.status == FINISHED or str(stop_after) in before.rungs:
                how = "finished" if before.status == FINISHED else f"at step {stop_after}"
                self._say(trial, f"{how} before, {figure(before)}")
                return replace(before, number=trial.number)
            trial = replace(trial, rungs=before.rungs, steps=before.steps, objective=before.objective)
        if self._stopped_by is not None:
            return replace(trial, status=UNFINISHED)
        trial.save(folder)
        self._say(trial, f"started, {folder / LOG_FILE}")
        result_file = folder / "result.json"
        result_file.unlink(missing_ok=True)
        start = time.monotonic()
        share = slots.get()
        # With ++, for an older configuration (--config-path) does not have the key.
        words = [*trial.overrides, *([f"++trainer.stop_after={stop_after}"] if stop_after else [])]
        environment = {**share, **self._names(trial, sweep_folder), RESULT: str(result_file.absolute())}
        try:
            code = self._wait(words, folder, environment)
        finally:
            slots.put(share)
        ended = self._end(trial, folder, code, start, stop_after, None)
        self._say(ended, outcome(ended))
        return ended

    def _end(
        self, trial: Trial, folder: Path, code: int, start: float, stop_after: int | None, message: str | None
    ) -> Trial:
        """Read what the run of a trial left, and write down how it ended."""
        result = read_result(folder / "result.json")
        (folder / "result.json").unlink(missing_ok=True)
        status = status_of(code, result, stop_after)
        if status == FAILED and self._stopped_by is not None:
            status = UNFINISHED
        return replace(
            trial,
            status=status,
            exit_code=code,
            objective=result.objective,
            message=(message or last_line(folder / LOG_FILE)) if status == FAILED else None,
            seconds=round(time.monotonic() - start, 1),
            steps=max(trial.steps, result.step),
            rungs={**trial.rungs, str(stop_after): result.objective} if status == PAUSED else trial.rungs,
        ).save(folder)

    def _names(self, trial: Trial, sweep_folder: Path) -> dict[str, str]:
        """Group and name of a trial in Weights & Biases, which reads them where the configuration gives none."""
        return {
            "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or sweep_folder.resolve().name,
            "WANDB_NAME": trial.varied(self._constant, f"trial {trial.number}")[:128],
        }

    def _say(self, trial: Trial, text: str) -> None:
        print(f"trial {trial.number} ({trial.varied(self._constant)}): {text}", flush=True)

    def _wait(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
        command = [sys.executable, "-m", "scatterfold.tools.train", *self.session.request.flags, *words]
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
    def _signals(self) -> Iterator[None]:
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
        """Show and write what came out of the sweep. Returns the exit code."""
        from .report import report_if_possible

        if not self._ended:
            self._ended = {place: trial for trial, place in trials_in(folder)}
        report_if_possible(folder)
        statuses = [trial.status for trial in self._ended.values()]
        counts = {status: statuses.count(status) for status in (FINISHED, DROPPED, PAUSED, FAILED, UNFINISHED)}
        parts = [f"{count} {status}" for status, count in counts.items() if count]
        print(
            f"sweep {folder}: {', '.join(parts) or 'no trials'}; scatterfold sweep report source={folder}", flush=True
        )
        if self._stopped_by == signal.SIGINT:
            return 130
        return 1 if counts[FAILED] else 0


def mean_or_none(losses: Sequence[float | None]) -> float | None:
    """The mean loss over seeds; None if one of them has none."""
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else None


def _plugins_for_children():
    """Let processes that a launcher of Hydra's starts (submitit) find our plugin when they unpickle their job."""
    from ..composition import PLUGINS

    before = os.environ.get("PYTHONPATH")
    return environment_variables({"PYTHONPATH": os.pathsep.join([*([before] if before else []), str(PLUGINS)])})


def _tolerates(sweeper: DictConfig) -> bool:
    """Whether trials may fail without an end of the sweep: always, but where the user bounds optuna's failure rate."""
    return float(sweeper.get("max_failure_rate", 1.0)) >= 1.0
