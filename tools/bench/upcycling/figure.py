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
from .results import gains, mean_curve, of_arm

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
    figure = Figure(figsize=(13, 5.6), dpi=130, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(1.35, 1))
    for arm in arms:
        _draw_curves(curves, records, arm)
        _draw_gains(ends, records, arm)
    _finish_curves(curves, records, arms)
    _finish_gains(ends)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _draw_curves(axes: Axes, records: Sequence[dict[str, Any]], arm: str) -> None:
    """The longest run whole, of the others what they do not share with it."""
    color, mark, line = STYLES[arm]
    runs = of_arm(records, arm)
    if not runs:
        return
    whole = of_arm(records, arm, total=True) or runs
    _, entries = list(whole.items())[-1]
    x, y = mean_curve(entries, min(entries[0]["stable_until"], max(runs)))
    axes.plot(x, y, color=color, linestyle=line, linewidth=1.6)
    low, high = _range(entries, x)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for entries in runs.values():
        tail_x, tail_y = mean_curve(entries)
        start = tail_x >= entries[0]["stable_until"] - (tail_x[1] - tail_x[0] if len(tail_x) > 1 else 0) - 1e-9
        axes.plot(tail_x[start], tail_y[start], color=color, linestyle=line, linewidth=0.9, alpha=0.75)
        axes.plot(tail_x[-1], tail_y[-1], color=color, marker=mark, markersize=6.5, linestyle="", zorder=4)
    axes.plot([], [], color=color, marker=mark, linestyle=line, label=ARMS[arm].label)


def _range(entries: Sequence[dict[str, Any]], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.stack([np.asarray(entry["curve"])[: len(x), 1] for entry in entries])
    return values.min(axis=0), values.max(axis=0)


def _draw_gains(axes: Axes, records: Sequence[dict[str, Any]], arm: str) -> None:
    color, mark, line = STYLES[arm]
    found = {} if arm == DENSE else gains(records, arm)
    if not found:
        return
    budgets, spreads = list(found), list(found.values())
    means, errors = [spread.mean for spread in spreads], [spread.std or 0.0 for spread in spreads]
    axes.errorbar(budgets, means, errors, color=color, marker=mark, linestyle=line, markersize=6.5, capsize=3)


def _finish_curves(axes: Axes, records: Sequence[dict[str, Any]], arms: Sequence[str]) -> None:
    """Show what differs: a run from scratch begins far above."""
    continued = [entry for entry in records if entry["arm"] in arms and ARMS[entry["arm"]].continues]
    values = [y for entry in continued for _, y in entry["curve"]]
    ends = [entry["curve"][-1][1] for entry in records if entry["arm"] in arms and entry["curve"]]
    if values:
        low, high = min(ends), max(*values, *ends)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_xlim(left=0)
    axes.set_xlabel("extra training FLOPs, in those of the dense training")
    axes.set_ylabel("validation bits per byte, on the sample of every evaluation")
    _finish(axes, "Lines: at the peak rate; thin: as it decays; marks: the end")


def _finish_gains(axes: Axes) -> None:
    color, mark, _ = STYLES[DENSE]
    axes.axhline(0, color=color, linewidth=1.4)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.set_xlabel("extra training FLOPs, in those of the dense training")
    axes.set_ylabel("bits per byte below the dense model, continued")
    _finish(axes, "At the end, on all of the validation text; above 0: better than dense")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
