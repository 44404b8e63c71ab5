"""The picture of a sweep: validation loss of every trial over steps, and where each ended.

Drawn on its own canvas, without pyplot: no screen is needed and no settings of a caller are touched.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...moe.report.figures import smooth
from .results import TrialResult, shown
from .seeds import SEED, SeedGroup, by_seed

# Okabe and Ito: colours that people who confuse colours can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_LABELS = 40


def save_figure(results: list[TrialResult], keys: list[str], folder: Path) -> Path | None:
    """Draw FOLDER/sweep.png; None if no trial has a figure to draw yet."""
    drawn = [result for result in results if result.history.valid or result.history.train]
    if not drawn:
        return None
    ended = [result for result in drawn if result.valid_loss is not None]
    groups = by_seed(drawn)
    repeated = any(len(group.results) > 1 for group in groups)
    height = min(12.0, max(4.2, 1.6 + 0.32 * len(groups if repeated else ended)))
    figure = Figure(figsize=(13, height), dpi=130, layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colors = {r.name: color for group, color in zip(groups, _colors(len(groups))) for r in group.results}
    _draw_curves(curves, drawn, colors)
    if repeated and any(group.losses for group in groups):
        _draw_seeds(finals, [group for group in groups if group.losses][:MOST_LABELS], keys, colors)
    elif ended:
        _draw_finals(finals, ended[:MOST_LABELS], keys, colors)
    else:
        finals.set_visible(False)
    path = folder / "sweep.png"
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _draw_curves(axes: Axes, results: list[TrialResult], colors: dict[str, str]) -> None:
    longest = max(result.steps for result in results)
    shown: list[float] = []  # losses after the steep beginning, which would press all that differs into the bottom
    for result in reversed(results):  # the best last, on top
        color = colors[result.name]
        steps, losses = result.history.column("loss")
        if len(steps):
            axes.plot(steps, smooth(losses), color=color, linewidth=0.9, alpha=0.35)
            shown += smooth(losses)[steps >= 0.2 * longest].tolist()
        if result.history.valid:
            points = [(line["step"], line["valid_loss"]) for line in result.history.comparable]
            axes.plot(*zip(*points), color=color, marker="o", markersize=4, linewidth=1.7)
            shown += [loss for step, loss in points if step >= 0.2 * longest]
    if shown and max(shown) > min(shown):
        margin = 0.08 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.plot([], [], color="#555555", marker="o", markersize=4, linewidth=1.7, label="validation")
    axes.plot([], [], color="#555555", linewidth=0.9, alpha=0.5, label="training, smoothed")
    axes.legend(loc="upper right", frameon=False)
    _finish(axes, "Loss over steps", "optimizer step", "cross-entropy")
    axes.set_xlim(left=0)


def _draw_finals(axes: Axes, results: list[TrialResult], keys: list[str], colors: dict[str, str]) -> None:
    """A dot for each trial; the best on top."""
    losses = [result.valid_loss for result in results if result.valid_loss is not None]
    rows = range(len(results))
    axes.hlines(rows, min(losses), losses, color="#CCCCCC", linewidth=1.2, zorder=1)
    for row, result, loss in zip(rows, results, losses):
        is_final = result.status == "finished"
        color = colors[result.name]
        axes.scatter(loss, row, s=46, color=color if is_final else "white", edgecolor=color, linewidth=1.6, zorder=2)
        note = f"{loss:.3f}" if is_final else f"{loss:.3f}, {result.status}"
        axes.annotate(note, (loss, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(list(rows), [_label(result, keys) for result in results], fontsize=8.5)
    axes.set_ylim(len(results) - 0.4, -0.6)
    span = max(losses) - min(losses) or 0.01 * abs(losses[0]) or 1.0
    axes.set_xlim(min(losses) - 0.08 * span, max(losses) + 0.3 * span)
    _finish(axes, "Final validation loss", "cross-entropy", "")
    axes.grid(axis="y", visible=False)


def _draw_seeds(axes: Axes, groups: list[SeedGroup], keys: list[str], colors: dict[str, str]) -> None:
    """A row for each configuration: a dot for each of its seeds, and their mean with the spread."""
    every = [loss for group in groups for loss in group.losses]
    every += [(group.mean or 0.0) + side * (group.spread or 0.0) for group in groups for side in (-1, 1)]
    span = max(every) - min(every) or 0.01 * abs(every[0]) or 1.0
    for row, group in enumerate(groups):
        color, mean = colors[group.results[0].name], group.mean or 0.0
        axes.errorbar(mean, row, xerr=group.spread, fmt="|", color=color, markersize=16, capsize=4, linewidth=1.4)
        axes.scatter(group.losses, [row] * len(group.losses), s=30, color=color, alpha=0.55, zorder=2)
        note = f"{mean:.3f}" if group.spread is None else f"{mean:.3f} ± {group.spread:.3f}"
        right = max(*group.losses, mean + (group.spread or 0.0))
        axes.annotate(note, (right, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5)
    labels = [_label(group.results[0], [key for key in keys if key != SEED]) for group in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=8.5)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(min(every) - 0.08 * span, max(every) + 0.4 * span)
    _finish(axes, "Final validation loss, mean and spread over seeds", "cross-entropy", "")
    axes.grid(axis="y", visible=False)


def _label(result: TrialResult, keys: list[str]) -> str:
    """What sets the trial apart, in the last words of its keys where they are clear."""
    leaves = [key.rpartition(".")[2] for key in keys]
    names = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves)]
    words = [f"{name}={shown(result.values[key])}" for key, name in zip(keys, names) if key in result.values]
    text = "  ".join(words) or f"trial {result.name}"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _colors(count: int) -> list[str]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    shades = colormaps["viridis"]
    return [shades(0.92 * index / (count - 1)) for index in range(count)]  # type: ignore[misc]


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
