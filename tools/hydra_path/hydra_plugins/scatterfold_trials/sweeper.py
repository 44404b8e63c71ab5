"""The Hydra sweeper `hydra/sweeper=halving`."""

# No `from __future__ import annotations`: Hydra loads this module in a way that dataclasses cannot resolve them in.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035, which OmegaConf's structured configs read

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class HalvingConfig:
    """The node `hydra.sweeper`.

    Attributes:
        eta: one in eta trials goes on from each rung.
        min_steps: the first rung, in optimizer steps; null: as many rungs as leave one trial for the full budget.
        params: overrides of every sweep, as those of Hydra's own sweeper.
    """

    _target_: str = "hydra_plugins.scatterfold_trials.sweeper.HalvingSweeper"
    eta: int = 3
    min_steps: Optional[int] = None  # noqa: UP045
    params: Optional[Dict[str, str]] = field(default_factory=dict)  # noqa: UP006, UP045


ConfigStore.instance().store(group="hydra/sweeper", name="halving", node=HalvingConfig)


class HalvingSweeper(Sweeper):
    """Hands the values to the sweep that Hydra's task function belongs to, which halves it (tools/sweep/halving.py)."""

    def __init__(self, eta: int, min_steps: int | None = None, params: Any = None) -> None:
        self.eta, self.min_steps, self.params = eta, min_steps, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep = task_function.__self__  # type: ignore[attr-defined]
        self._loader = hydra_context.config_loader
        self.config = config

    def sweep(self, arguments: List[str]) -> None:  # noqa: UP006
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        self._sweep.halve(self.config, self._loader, words, self.eta, self.min_steps)
