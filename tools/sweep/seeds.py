"""Trials that differ only in their seed, taken together: mean and spread, and which configuration is best."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .results import TrialResult
from .trial import FINISHED

SEED = "seed"


@dataclass(frozen=True)
class SeedGroup:
    """The trials of one configuration.

    Attributes:
        values: what their overrides set, the seed aside.
        results: the trials, best first.
    """

    values: dict[str, str]
    results: list[TrialResult]

    @property
    def finished(self) -> list[TrialResult]:
        return [result for result in self.results if result.status == FINISHED and result.valid_loss is not None]

    @property
    def losses(self) -> list[float]:
        """Final validation losses."""
        return [result.valid_loss for result in self.finished if result.valid_loss is not None]

    @property
    def mean(self) -> float | None:
        return fmean(self.losses) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        return stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The order of groups: the lowest mean first, those with missing trials behind the complete ones."""
        return not self.losses, len(self.losses) < len(self.results), self.mean or 0.0

    def as_row(self, keys: list[str]) -> dict[str, Any]:
        """The group as plain values."""
        return {
            "varied": {key: self.values.get(key) for key in keys if key != SEED},
            "trials": [result.name for result in self.results],
            "seeds": [result.values.get(SEED) for result in self.results],
            "finished": len(self.losses),
            "valid_loss_mean": self.mean,
            "valid_loss_spread": self.spread,
        }


def by_seed(results: list[TrialResult]) -> list[SeedGroup]:
    """The configurations of a sweep, the lowest mean loss first."""
    groups: dict[tuple[tuple[str, str], ...], list[TrialResult]] = {}
    for result in results:
        groups.setdefault(tuple(sorted(_without_seed(result).items())), []).append(result)
    made = [SeedGroup(_without_seed(members[0]), members) for members in groups.values()]
    return sorted(made, key=lambda group: group.rank)


def best_trial(groups: list[SeedGroup]) -> TrialResult | None:
    """The best seed of the best configuration; None if no trial has finished."""
    return groups[0].finished[0] if groups and groups[0].finished else None


def _without_seed(result: TrialResult) -> dict[str, str]:
    return {key: value for key, value in result.values.items() if key != SEED}
