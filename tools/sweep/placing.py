"""Where the trials of a sweep go: each to a folder of its own, and to its share of the machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...kernels.errors import ConfigError
from .trial import TRIAL_FILE, Trial

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig


class Job(NamedTuple):
    """What a sweeper asks for: the number of a combination of values, and its overrides."""

    number: int
    overrides: tuple[str, ...]


class Placed(NamedTuple):
    """A trial and its folder."""

    trial: Trial
    folder: Path


def seeded(job: Job, seeds: Sequence[int]) -> list[Job]:
    """The job once for each seed; the job as it is where there are none."""
    return [
        Job(job.number * len(seeds) + index, (*job.overrides, f"seed={seed}")) for index, seed in enumerate(seeds)
    ] or [job]


def check_launcher(jobs: Sequence[Job], parallel: int, seeds: Sequence[int]) -> None:
    """Raise ConfigError for a number of places, or for seeds, that cannot be."""
    if parallel < 1:
        raise ConfigError(f"hydra.launcher.parallel={parallel} is too small, allowed: 1 or more")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"hydra.launcher.seeds holds {seed!r}, allowed: whole numbers from 0 on, as in [0,1,2]")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"hydra.launcher.seeds={list(seeds)} holds a seed twice, allowed: each once")
    given = next((word for job in jobs for word in job.overrides if word.lstrip("+").startswith("seed=")), None)
    if seeds and given:
        raise ConfigError(f"{given} and hydra.launcher.seeds={list(seeds)} both set the seed, allowed: one of them")


def trials_in(sweep_folder: Path) -> list[Placed]:
    """All trials that a sweep folder holds, in the order of their folders."""
    found = ((file.parent, Trial.load(file.parent)) for file in sorted(sweep_folder.rglob(TRIAL_FILE)))
    return [Placed(trial, folder) for folder, trial in found if trial is not None]


def folder_of(
    trial: Trial,
    overrides: Sequence[str],
    sweep_folder: Path,
    config: DictConfig,
    loader: ConfigLoader,
    known: Sequence[Placed],
    taken: Collection[Path],
) -> Path:
    """Where a trial belongs: where the same overrides ran before, else the folder that `hydra.sweep.subdir` names.

    Args:
        overrides: what the sweeper asked for, to compose the configuration in which `hydra.sweep.subdir` resolves.
        known: trials that the sweep folder holds.
        taken: folders of other trials of the same batch.
    """
    for before, folder in known:
        if sorted(before.overrides) == sorted(trial.overrides) and folder not in taken:
            return folder
    subdir = _subdir(trial.number, overrides, config, loader)
    folder, suffix = sweep_folder / subdir, trial.number
    while folder in taken or (folder / TRIAL_FILE).exists():  # another trial of an earlier sweep lives there
        suffix += 1
        folder = sweep_folder / (str(suffix) if subdir == str(trial.number) else f"{subdir}_{suffix}")
    return folder


def _subdir(number: int, overrides: Sequence[str], config: DictConfig, loader: ConfigLoader) -> str:
    from omegaconf import OmegaConf, open_dict

    by_number = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if isinstance(by_number, dict) and by_number["subdir"] == "${hydra.job.num}":
        return str(number)  # Hydra's default; to compose a configuration takes a good part of a second
    composed = loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
    return str(composed.hydra.sweep.subdir)


def remove_empty(folder: Path) -> None:
    """Take back the folder of a sweep that had no trial: Hydra makes it before it looks at the trials."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {"multirun.yaml", "optuna.db"}:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            folder.parent.rmdir()


def shares(parallel: int) -> list[dict[str, str]]:
    """The visible GPUs, or the cores, shared out among trials that run at the same time.

    Trials that each use all cores wait for each other's threads, and are many times slower than in turn.

    Returns: environment variables for each of the `parallel` places. Where there are fewer GPUs than places, nothing:
        trials then share all of them.
    """
    if parallel == 1:
        return [{}]
    import torch

    from ...parallel.process import usable_cores

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not devices and "OMP_NUM_THREADS" not in os.environ:
        return [{"OMP_NUM_THREADS": str(max(1, usable_cores() // parallel))}] * parallel
    if len(devices) < parallel:
        return [{}] * parallel
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[index::parallel])} for index in range(parallel)]
