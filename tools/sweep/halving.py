"""Successive halving (Jamieson and Talwalkar, 1502.07943; synchronous, as in Hyperband, 1603.06560, section 3).

All trials run to the first rung; the best 1/eta of them, by validation loss, go on to the next, each from its own
checkpoint and on the learning-rate schedule of the full budget, so that a survivor's run is the run that never paused.
The others stop. What was decided is in SWEEP/halving.json: a sweep that goes on later decides no rung a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.errors import ConfigError
from ..files import write_atomically
from .placing import Job, Placed, check_launcher, trials_in
from .trial import DROPPED, FAILED
from .trials import Sweep, mean_or_none

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

HALVING_FILE = "halving.json"


@dataclass(frozen=True)
class Rung:
    """What was decided at a rung.

    Attributes:
        step: optimizer steps that its trials had done.
        losses: validation loss by number of a job (its mean over seeds); None where it failed or was not finite.
        promoted: numbers of those that went on, the best first.
    """

    step: int
    losses: dict[str, float | None]
    promoted: list[int]


@dataclass(frozen=True)
class Record:
    """halving.json.

    Attributes:
        steps: of the rungs, the last of which is the full budget.
        jobs: overrides of each job, by number.
        seeds: of the launcher: the runs that a job is.
        decided: rungs so far.
    """

    eta: int
    steps: list[int]
    jobs: list[list[str]]
    seeds: list[int] = field(default_factory=list)
    decided: list[Rung] = field(default_factory=list)

    @property
    def full_grid(self) -> int:
        """Optimizer steps of all trials without halving."""
        return len(self.jobs) * max(1, len(self.seeds)) * self.steps[-1]

    def save(self, folder: Path) -> None:
        write_atomically(folder / HALVING_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record of a sweep; None if it was not halved."""
        path = folder / HALVING_FILE
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            return cls(**{**record, "decided": [Rung(**rung) for rung in record["decided"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read, allowed: the file that the sweep wrote") from error


def rung_steps(jobs: int, steps: int, eta: int, min_steps: int | None) -> list[int]:
    """Where trials are compared, ascending; the last is the full budget `steps`.

    Args:
        min_steps: the first rung, from which they grow by the factor eta; None for as many rungs below `steps` as leave
            one of `jobs` trials at the end, at least one.

    Raises: ConfigError for values that cannot be.
    """
    if eta < 2:
        raise ConfigError(f"hydra.sweeper.eta={eta} is too small, allowed: 2 or more")
    if steps < 2:
        raise ConfigError(f"trainer.steps={steps} leaves nothing to halve, allowed: 2 or more")
    if min_steps is not None and not 1 <= min_steps < steps:
        raise ConfigError(
            f"hydra.sweeper.min_steps={min_steps} is out of range, allowed: 1 to {steps - 1}, less than trainer.steps"
        )
    if min_steps is None:
        rungs = 1
        while eta ** (rungs + 1) <= jobs:
            rungs += 1
        return sorted({max(1, steps // eta**rung) for rung in range(rungs + 1)})
    found = [min_steps]
    while found[-1] * eta < steps:
        found.append(found[-1] * eta)
    return [*found, steps]


def best(losses: Mapping[int, float | None], eta: int) -> list[int]:
    """The best 1/eta of the jobs, at least one, the lowest loss first; of equal ones those with the lower numbers.

    A job without a loss counts in the number of jobs, and never goes on.
    """
    ranked = sorted((loss, number) for number, loss in losses.items() if loss is not None)
    return [number for _, number in ranked[: max(1, len(losses) // eta)]]


def combinations(words: Sequence[str], loader: ConfigLoader) -> list[Job]:
    """Every combination of the values that overrides name, as Hydra's own sweeper makes them.

    Raises: ConfigError for an interval, which names no values.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.input_line} names no values to halve, allowed: a list or a range of them; intervals with "
                "hydra/sweeper=optuna"
            )
    batch = BasicSweeper.split_arguments(overrides, None)[0]
    return [Job(number, tuple(combination)) for number, combination in enumerate(batch)]


class Halving:
    """The halving of one sweep.

    Args:
        jobs: the combinations of values.
        loader: of Hydra.

    Raises: ConfigError before any trial starts: for settings that cannot be, for trials of unequal length, and for a
        folder that holds another sweep.
    """

    def __init__(
        self,
        sweep: Sweep,
        config: DictConfig,
        loader: ConfigLoader,
        jobs: Sequence[Job],
        eta: int,
        min_steps: int | None,
    ) -> None:
        self.sweep, self.config, self.loader, self.jobs = sweep, config, loader, list(jobs)
        self.folder = Path(str(config.hydra.sweep.dir))
        launcher = config.hydra.launcher
        if "scatterfold_trials" not in str(launcher._target_):
            raise ConfigError(
                "hydra/launcher cannot be changed with hydra/sweeper=halving, which lets trials go on; allowed: "
                "launcher=local, torchrun or slurm, which start each trial in its own way"
            )
        self.parallel, self.seeds = launcher.parallel, list(launcher.seeds)
        check_launcher(jobs, self.parallel, self.seeds)
        steps = rung_steps(len(jobs), self._common_steps(), eta, min_steps)
        record = Record(eta, steps, [list(sweep.session.typed(job.overrides)) for job in jobs], self.seeds)
        self.record = self._same(record)

    def run(self) -> None:
        """Run rung after rung, up to the full budget."""
        from omegaconf import OmegaConf

        OmegaConf.save(self.config, self.folder / "multirun.yaml")  # as Hydra's own sweeper leaves it
        self.sweep.announce(self.folder)
        alive = list(self.jobs)
        for index, step in enumerate(self.record.steps[:-1]):
            if len(alive) < 2:
                break
            if index == len(self.record.decided):
                self._decide(index, step, alive)
            rung = self.record.decided[index]
            by_number = {job.number: job for job in alive}
            alive = [by_number[number] for number in rung.promoted]
        if alive:
            last = self.record.steps[-1]
            print(f"rung {last}: {len(alive)} of {len(self.jobs)} trials go to the end", flush=True)
            self.sweep.run_batch(alive, self.config, self.loader, self.parallel, self.seeds)

    def _decide(self, index: int, step: int, alive: list[Job]) -> None:
        """Bring all trials to a rung, keep the best, and write down which."""
        print(f"rung {step}: {len(alive)} of {len(self.jobs)} trials", flush=True)
        done = self.sweep.run_batch(alive, self.config, self.loader, self.parallel, self.seeds, stop_after=step)
        losses = {
            job.number: mean_or_none([trial.rungs.get(str(step)) for trial, _ in placed])
            for job, placed in zip(alive, done)
        }
        promoted = best(losses, self.record.eta)
        for job, placed in zip(alive, done):
            if job.number not in promoted:
                self._drop(placed, step)
        known = {str(number): loss for number, loss in losses.items()}
        self.record.decided.append(Rung(step, known, promoted))
        self.record.save(self.folder)
        print(f"rung {step}: {_describe(losses, promoted)}", flush=True)

    def _drop(self, placed: list[Placed], step: int) -> None:
        for one in placed:
            if one.trial.status != FAILED:
                finite = one.trial.rungs.get(str(step)) is not None
                message = None if finite else f"validation loss is not finite after step {step}"
                self.sweep.settle(one, DROPPED, message)

    def _common_steps(self) -> int:
        """trainer.steps of all trials, which are composed here, so that an error in one comes before any starts."""
        found: dict[int, str] = {}
        for job in self.jobs:
            trainer = self.loader.load_sweep_config(self.config, list(job.overrides)).trainer
            if trainer.get("stop_after") is not None:
                raise ConfigError(
                    f"trainer.stop_after={trainer.stop_after} is what halving sets, allowed: null, and "
                    "hydra.sweeper.min_steps for the first rung"
                )
            if not isinstance(trainer.steps, int):
                raise ConfigError(f"trainer.steps={trainer.steps} is no whole number, allowed: 2 or more")
            found.setdefault(trainer.steps, " ".join(job.overrides))
        if len(found) > 1:
            raise ConfigError(
                f"trainer.steps={', '.join(map(str, found))} differ between trials, allowed: the same for all trials "
                "that are halved"
            )
        return next(iter(found))

    def _same(self, record: Record) -> Record:
        """The record of this sweep's folder if there is one, else the new one."""
        before = Record.load(self.folder)
        other = "or another hydra.sweep.dir"
        if before is None:
            if trials_in(self.folder):
                raise ConfigError(f"hydra.sweep.dir={self.folder} holds a sweep without halving, allowed: a new folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            record.save(self.folder)
            return record
        if before.jobs != record.jobs or before.seeds != record.seeds:
            raise ConfigError(f"hydra.sweep.dir={self.folder} halves other trials, allowed: the same command, {other}")
        if before.steps != record.steps or before.eta != record.eta:
            raise ConfigError(
                f"hydra.sweeper.eta={record.eta} and rungs {record.steps} differ from {self.folder}, allowed: eta="
                f"{before.eta} and rungs {before.steps}, {other}"
            )
        return before


def _describe(losses: Mapping[int, float | None], promoted: Sequence[int]) -> str:
    """One line: who goes on, who is dropped, and who has no loss."""
    dropped = [number for number, loss in losses.items() if loss is not None and number not in promoted]
    lost = [number for number, loss in losses.items() if loss is None]
    parts = [f"{_names(promoted, losses)} go on" if promoted else "none goes on"]
    if dropped:
        parts.append(f"{_names(sorted(dropped, key=lambda number: losses[number] or 0.0), losses)} dropped")
    if lost:
        parts.append(f"{', '.join(map(str, lost))} failed or not finite")
    return "; ".join(parts)


def _names(numbers: Sequence[int], losses: Mapping[int, float | None]) -> str:
    return ", ".join(f"{number} ({losses[number]:.4f})" for number in numbers)
