"""The Hydra launcher that runs each trial of a sweep in a process of its own."""

# No `from __future__ import annotations`: Hydra loads this module in a way that dataclasses cannot resolve them in.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, List  # noqa: UP035, which OmegaConf's structured configs read

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class TrialLauncherConfig:
    """The node `hydra.launcher`.

    Attributes:
        parallel: trials at the same time; the GPUs that are visible are shared out among them.
        seeds: run every combination once with each, and judge it by the mean of their losses; [] for `seed` as it is.
    """

    _target_: str = "hydra_plugins.scatterfold_trials.launcher.TrialLauncher"
    parallel: int = 1
    seeds: List[int] = field(default_factory=list)  # noqa: UP006


ConfigStore.instance().store(group="hydra/launcher", name="scatterfold_trials", node=TrialLauncherConfig)


class TrialLauncher(Launcher):
    """Hands the trials of a batch to the sweep that Hydra's task function belongs to."""

    def __init__(self, parallel: int = 1, seeds: Sequence[int] = ()) -> None:
        self.parallel, self.seeds = parallel, list(seeds)
        self._sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep = task_function.__self__  # type: ignore[attr-defined]
        self._config = config
        self._loader = hydra_context.config_loader

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        numbered = [(initial_job_idx + index, tuple(words)) for index, words in enumerate(job_overrides)]
        return self._sweep.launch(numbered, self._config, self._loader, self.parallel, self.seeds)
