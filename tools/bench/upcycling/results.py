"""What the runs found: one record each, then means over seeds, gains over the dense model and where they begin."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....moe.report.history import read_history
from .arms import DENSE
from .carry_out import summary_of
from .plan import BASE, Run

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        std: sample standard deviation; None for a single seed.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(values))


def record(run: Run, unit: float) -> dict[str, Any]:
    """One finished run as plain values.

    Args:
        unit: FLOPs of the dense training, in which the x values of the curve are given.
    """
    summary, history = summary_of(run), read_history(run.folder)
    curve = [(line["step"] * run.flops_per_step / unit, line["bits_per_byte"]) for line in history.comparable]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "budget": run.budget,
        "total": run.total,
        "steps": run.steps,
        "flops": run.flops,
        "parameters": run.parameters,
        "active": run.active,
        "bits_per_byte": summary["bits_per_byte"],
        "stable_until": run.stable_steps * run.flops_per_step / unit,
        "training_tokens_per_second": summary.get("tokens_per_second"),
        "curve": curve,
    }


def of_arm(records: Sequence[dict[str, Any]], arm: str, total: bool = False) -> dict[float, list[dict[str, Any]]]:
    """The records of one arm by budget, smallest first; those of the seeds in order."""
    own = [entry for entry in records if entry["arm"] == arm and entry["total"] == total]
    budgets = sorted({entry["budget"] for entry in own})
    return {budget: [entry for entry in own if entry["budget"] == budget] for budget in budgets}


def finals(records: Sequence[dict[str, Any]], arm: str, total: bool = False) -> dict[float, Spread]:
    """Bits per byte of the whole validation text after the last step, by budget."""
    return {
        budget: Spread.of([entry["bits_per_byte"] for entry in entries])
        for budget, entries in of_arm(records, arm, total).items()
    }


def gains(records: Sequence[dict[str, Any]], arm: str, total: bool = False) -> dict[float, Spread]:
    """By how many bits per byte an arm is below the dense model that got as much and has the same seed.

    A run from scratch that got the dense training's FLOPs as well is held against the largest budget.
    """
    dense = of_arm(records, DENSE)
    if not dense:
        return {}
    found = {}
    for budget, entries in of_arm(records, arm, total).items():
        beside = {entry["seed"]: entry for entry in dense[max(dense) if total else budget]}
        found[budget] = Spread.of(
            [beside[entry["seed"]]["bits_per_byte"] - entry["bits_per_byte"] for entry in entries]
        )
    return found


def crossing(x: Sequence[float], gain: Sequence[float]) -> float | None:
    """From which x on the gain stays above zero, linearly between points.

    The first x if it is never below; None if it ends at zero or below.
    """
    if not len(gain) or gain[-1] <= 0:
        return None
    below = [index for index, value in enumerate(gain) if value <= 0]
    if not below:
        return x[0]
    last = below[-1]
    share = -gain[last] / (gain[last + 1] - gain[last])
    return x[last] + share * (x[last + 1] - x[last])


def mean_curve(entries: Sequence[dict[str, Any]], until: float | None = None) -> Curve:
    """Mean over seeds of the evaluations during the runs (which lie at the same steps), up to some x."""
    curves = [np.asarray(entry["curve"], dtype=float).reshape(-1, 2) for entry in entries]
    shortest = min(len(curve) for curve in curves)
    stacked = np.stack([curve[:shortest] for curve in curves])
    x, y = stacked[0, :, 0], stacked[:, :, 1].mean(axis=0)
    kept = np.ones(len(x), bool) if until is None else x <= until + 1e-9
    return x[kept], y[kept]


def curve_crossing(records: Sequence[dict[str, Any]], arm: str) -> float | None:
    """From which extra FLOPs on the mean curve of an arm stays below that of the dense model, both at the peak rate."""
    dense, own = _longest(records, DENSE), _longest(records, arm)
    if not dense or not own:
        return None
    until = min(dense[0]["stable_until"], own[0]["stable_until"])
    x, y = mean_curve(own, until)
    dense_x, dense_y = mean_curve(dense, until)
    within = (x >= dense_x.min(initial=np.inf)) & (x <= dense_x.max(initial=-np.inf))
    return crossing(x[within].tolist(), (np.interp(x[within], dense_x, dense_y) - y[within]).tolist())


def _longest(records: Sequence[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    own = [entry for entry in records if entry["arm"] == arm]
    return [entry for entry in own if entry["budget"] == max(other["budget"] for other in own)]


def summarise(records: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """The table, and the crossings, as plain values."""
    table = {}
    for arm in arms:
        gain = gains(records, arm)
        table[arm] = {
            "bits_per_byte": _plain(finals(records, arm)),
            "gain_over_dense": _plain(gain),
            "from_scratch_with_all_flops": _plain(finals(records, arm, total=True)),
            "its_gain_over_dense": _plain(gains(records, arm, total=True)),
            "pays_from": None if arm == DENSE else crossing(list(gain), [spread.mean for spread in gain.values()]),
            "pays_from_at_peak_rate": None if arm == DENSE else curve_crossing(records, arm),
        }
    return {"dense_training": _plain(finals(records, BASE)), "arms": table}


def _plain(spreads: dict[float, Spread]) -> dict[str, Any]:
    return {
        f"{budget:g}": {"mean": spread.mean, "std": spread.std, "seeds": list(spread.values)}
        for budget, spread in spreads.items()
    }
