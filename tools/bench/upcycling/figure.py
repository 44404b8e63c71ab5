"""The picture: curves over extra FLOPs, and what each budget ends at against the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from .arms import ARMS, DENSE, FINE_GRAINED, SCRATCH, SCRATCH_FINE, SPARSE
from .plan import BASE
from .results import Curve, gains, mean_curve, of_arm

# Okabe and Ito's colours that people who confuse colours can tell apart, and a mark and a line for each arm besides.
STYLES = {
    DENSE: ("#444444", "o", "-"),
    SPARSE: ("#D55E00", "s", "-"),
    FINE_GRAINED: ("#0072B2", "D", "-"),
    SCRATCH: ("#E69F00", "^", "--"),
    SCRATCH_FINE: ("#56B4E9", "v", "--"),
}


def save_figure(records: Sequence[dict[str, Any]], arms: Sequence[str], path: Path) -> Path:
    """Draw the PNG; returns its path."""
    figure = Figure(figsize=(13, 5.8), dpi=130, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for arm in arms:
        _draw_curves(curves, records, arm)
    _draw_gains(ends, records, arms)
    _finish_curves(curves, records, arms)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _draw_curves(axes: Axes, records: Sequence[dict[str, Any]], arm: str) -> None:
    """Of the longest run what it does at the peak rate, of every run how it decays."""
    color, mark, line = STYLES[arm]
    runs = of_arm(records, arm)
    if runs:
        longest = list((of_arm(records, arm, total=True) or runs).values())[-1]
        trunk = _over_seeds(longest, min(longest[0]["stable_until"], max(runs)))
        if ARMS[arm].continues and (start := _start(records)):
            trunk = tuple(np.append(point, rest) for point, rest in zip((0.0, *start), trunk))
        x, y, low, high = trunk
        axes.plot(x, y, color=color, linestyle=line, linewidth=1.7)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for entries in runs.values():
            tail_x, tail_y = _tail(entries, x, y)
            axes.plot(tail_x, tail_y, color=color, linestyle=line, linewidth=0.9, alpha=0.75)
            axes.plot(tail_x[-1:], tail_y[-1:], color=color, marker=mark, markersize=6.5, linestyle="", zorder=4)
    axes.plot([], [], color=color, marker=mark, linestyle=line, label=ARMS[arm].label)


def _tail(entries: Sequence[dict[str, Any]], trunk_x: np.ndarray, trunk_y: np.ndarray) -> Curve:
    """What a run does alone, from the last evaluation that it shares with the longest run."""
    x, y = mean_curve(entries)
    shared = trunk_x <= entries[0]["stable_until"] + 1e-9
    own = x > trunk_x[shared].max(initial=-1.0)
    return np.append(trunk_x[shared][-1:], x[own]), np.append(trunk_y[shared][-1:], y[own])


def _over_seeds(entries: Sequence[dict[str, Any]], until: float | None = None) -> tuple[np.ndarray, ...]:
    """x, and mean, least and most over seeds."""
    x, y = mean_curve(entries, until)
    if not len(x):
        return x, y, y, y
    values = np.stack([np.asarray(entry["curve"])[: len(x), 1] for entry in entries])
    return x, y, values.min(axis=0), values.max(axis=0)


def _start(records: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Where the dense training ends: mean, least and most."""
    ends = [entry["curve"][-1][1] for entry in records if entry["arm"] == BASE and entry["curve"]]
    return (float(np.mean(ends)), min(ends), max(ends)) if ends else None


def _finish_curves(axes: Axes, records: Sequence[dict[str, Any]], arms: Sequence[str]) -> None:
    """Show what differs: a run from scratch begins far above, and ends in sight."""
    shown = [(entry, y) for entry in records if entry["arm"] in arms for _, y in entry["curve"]]
    values = [y for entry, y in shown if ARMS[entry["arm"]].continues]
    values += [entry["curve"][-1][1] for entry, _ in shown if not entry["total"]]
    if start := _start(records):
        values.append(start[2])
    if values:
        margin = 0.05 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xlim(left=0)
    axes.set_ylabel("validation bits per byte, sample of each evaluation")
    _finish(axes, "Training at the peak rate; thin: as it decays; mark: its end")


def _draw_gains(axes: Axes, records: Sequence[dict[str, Any]], arms: Sequence[str]) -> None:
    found = {arm: gains(records, arm) for arm in arms if arm != DENSE}
    near = [spread for arm, spreads in found.items() if ARMS[arm].continues for spread in spreads.values()]
    reach = max((abs(spread.mean) + (spread.std or 0.0) for spread in near), default=1.0) * 1.3 or 1.0
    axes.axhline(0, color=STYLES[DENSE][0], linewidth=1.4)
    for arm, spreads in found.items():
        color, mark, line = STYLES[arm]
        means, errors = [s.mean for s in spreads.values()], [s.std or 0.0 for s in spreads.values()]
        axes.errorbar(list(spreads), means, errors, color=color, marker=mark, linestyle=line, markersize=6.5, capsize=3)
        for budget, mean in zip(spreads, means):
            if abs(mean) > reach:  # too far away to show to scale beside the others
                at = (budget, reach * 0.94 * np.sign(mean))
                axes.plot(*at, color=color, marker="^" if mean > 0 else "v", markersize=6.5)
                axes.annotate(f"{mean:+.3f}", at, xytext=(-7, 0), textcoords="offset points", ha="right", va="center")
    axes.set_ylim(-reach, reach)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.set_ylabel("bits per byte below the dense model, continued")
    _finish(axes, "At the end, on all validation text; above 0: better")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axes.set_xlabel("extra training FLOPs, in those of the dense training")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
