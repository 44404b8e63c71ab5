"""The picture of a validation: what was predicted beside what was measured, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, and two marks besides, for those who confuse colours.
PREDICTED, MEASURED = ("#0072B2", "o"), ("#D55E00", "x")
PANELS = (("memory", "memory of the fullest rank, MB", 1e-6), ("seconds", "step of the slowest rank, s", 1.0))


def save_figure(records: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the PNG; returns its path."""
    figure = Figure(figsize=(12, 1.6 + 0.34 * len(records)), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (quantity, label, scale) in zip(panels, PANELS):
        _draw(axes, records, quantity, scale)
        axes.set_xlabel(label)
    names = [f"{record['case']}, {record['ranks']} rank{'s' if record['ranks'] > 1 else ''}" for record in records]
    panels[0].set_yticks(range(len(records)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _draw(axes: Axes, records: Sequence[dict[str, Any]], quantity: str, scale: float) -> None:
    rows = range(len(records))
    found = {name: [scale * record[quantity][name] for record in records] for name in ("predicted", "measured")}
    axes.hlines(rows, found["predicted"], found["measured"], color="#999999", linewidth=1.5, zorder=1)
    for name, (color, mark) in (("predicted", PREDICTED), ("measured", MEASURED)):
        axes.scatter(found[name], rows, color=color, marker=mark, s=42, label=name, zorder=2)
    for row, record in zip(rows, records):
        right = max(found["predicted"][row], found["measured"][row])
        axes.annotate(
            f"{record[quantity]['error']:+.0%}", (right, row), (9, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.15 * max(max(values) for values in found.values()))
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
