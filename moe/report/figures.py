"""Pictures of a run: loss, expert load, learning rate and gradient norm.

Colours are those of Okabe and Ito, which people who confuse colours can tell apart. Figures are drawn on their own
canvas, without pyplot, so that they neither need a screen nor touch the settings of a caller's own plots.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .history import BASELINE_NAMES, ExpertLoads, RunHistory

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
MAX_LAYERS = 24


def save_figures(history: RunHistory, folder: Path) -> list[tuple[str, Path]]:
    """Draw what the history has data for; returns titles and paths of the PNG files."""
    figures = [("Loss", "loss.png", draw_loss(history))]
    if history.experts is not None:
        figures.append(("Expert load", "experts.png", draw_experts(history.experts)))
        figures.append(("Routing", "routing.png", draw_routing(history)))
    figures.append(("Optimization", "optimization.png", draw_optimization(history)))
    saved = []
    for title, name, figure in figures:
        if figure is not None:
            FigureCanvasAgg(figure).print_png(str(folder / name))
            saved.append((title, folder / name))
    return saved


def draw_loss(history: RunHistory) -> Figure | None:
    """Bits per byte of training and validation text over steps, baselines as lines."""
    steps, bits = history.column("train_bits_per_byte")
    if not len(steps) and not history.valid:
        return None
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    if len(steps):
        axes.plot(steps, bits, color=SKY, linewidth=0.8, alpha=0.55, label="training")
        axes.plot(steps, smooth(bits), color=BLUE, linewidth=1.8, label="training, smoothed")
    if history.valid:
        _draw_validation(axes, history)
    _draw_baselines(axes, history.summary.get("baselines") or {})
    _finish(axes, "Cross-entropy on training and validation text", "bits per byte")
    axes.set_xlim(left=0)
    axes.legend(loc="upper right", framealpha=1.0, edgecolor="white")
    return figure


def _draw_validation(axes: Axes, history: RunHistory) -> None:
    """The curve of evaluations on one and the same text, and the last one apart if it was on more."""
    curve, last = history.comparable, history.valid[-1]
    points = [(line["step"], line["bits_per_byte"]) for line in curve]
    axes.plot(
        *zip(*points), color=RED, marker="o", markersize=4.5, linewidth=1.8, label=f"validation: {points[-1][1]:.3f}"
    )
    if last is not curve[-1]:
        label = f"whole validation text: {last['bits_per_byte']:.3f}"
        axes.plot(
            last["step"], last["bits_per_byte"], color="black", marker="*", markersize=11, linestyle="", label=label
        )


def _draw_baselines(axes: Axes, baselines: dict[str, float]) -> None:
    styles = ((GREEN, "--"), (PURPLE, "-."), (ORANGE, ":"))
    for (name, bits), (color, dashes) in zip(sorted(baselines.items(), key=lambda item: -item[1]), styles):
        label = f"{BASELINE_NAMES.get(name, name)}: {bits:.3f}"
        axes.axhline(bits, color=color, linestyle=dashes, linewidth=1.6, label=label)


def draw_experts(experts: ExpertLoads) -> Figure:
    """Load of every expert over time, a small picture a layer; 1 is the load of perfect balance."""
    chosen = _spread(len(experts.layers), MAX_LAYERS)
    columns = {1: 1, 2: 2, 4: 2}.get(len(chosen), 4 if len(chosen) > 9 or len(chosen) == 8 else 3)
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(2.0 + 3.1 * columns, 1.3 + 2.3 * rows), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = _edges(experts.steps)
    num_experts = experts.loads.shape[-1]
    image = None
    for axes, position in zip(grid.flat, chosen):
        relative = experts.loads[:, position].T * num_experts
        image = axes.pcolormesh(
            edges, np.arange(num_experts + 1) - 0.5, relative, cmap="PuOr_r", vmin=0.0, vmax=2.0, rasterized=True
        )
        axes.set_title(f"layer {experts.layers[position]}", fontsize=10)
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in list(grid.flat)[len(chosen) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    shown = "" if len(chosen) == len(experts.layers) else f" ({len(chosen)} of {len(experts.layers)} layers)"
    figure.suptitle(f"Load of each expert over time{shown}", fontsize=12, fontweight="bold")
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.9, extend="max", ticks=[0, 0.5, 1, 1.5, 2])
        bar.set_label("load / mean load (1: balanced)")
    return figure


def draw_routing(history: RunHistory) -> Figure | None:
    """How balanced and how sure the routers are, over all MoE layers."""
    panels = [
        ("experts/max_violation", "Busiest expert above the mean", "max load / mean load - 1", RED),
        ("experts/router_entropy", "Router entropy", "nats", BLUE),
        ("experts/per_token", "Experts per token", "experts", GREEN),
        ("experts/dropped_fraction", "Dropped assignments", "fraction", PURPLE),
    ]
    panels = [panel for panel in panels if len(history.column(panel[0])[0])]
    if not panels:
        return None
    figure = Figure(figsize=(9, 2.7 * math.ceil(len(panels) / 2)), dpi=130, layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False)
    for axes, (column, title, unit, color) in zip(grid.flat, panels):
        steps, values = history.column(column)
        axes.plot(steps, values, color=color, linewidth=1.4)
        if values.max() - values.min() < 1e-6:  # a constant: no axis that magnifies rounding
            axes.set_ylim(max(values.min() - 0.5, -0.05), values.max() + 0.5)
        _finish(axes, title, unit)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure


def draw_optimization(history: RunHistory) -> Figure | None:
    """Learning rate and gradient norm over steps."""
    if not history.train:
        return None
    figure = Figure(figsize=(9, 3.2), dpi=130, layout="constrained")
    rate, norm = figure.subplots(1, 2)
    rate.plot(*history.column("lr"), color=BLUE, linewidth=1.6)
    _finish(rate, "Learning rate", "lr")
    steps, norms = history.column("grad_norm")
    norm.plot(steps, norms, color=SKY, linewidth=0.8, alpha=0.7, label="as logged")
    norm.plot(steps, smooth(norms), color=BLUE, linewidth=1.6, label="smoothed")
    if len(norms) and norms.min() > 0:
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norm.yaxis.set_minor_formatter(NullFormatter())
    _finish(norm, "Gradient norm before clipping", "global L2 norm")
    norm.legend(loc="best", frameon=False, fontsize=8)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a twenty-fifth of the values around each, narrower at both ends."""
    reach = len(values) // 50
    total = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    half = np.minimum(np.minimum(position, len(values) - 1 - position), reach)
    return (total[position + half + 1] - total[position - half]) / (2 * half + 1)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns of a heatmap whose values were measured at the steps."""
    return np.concatenate([[0.0], steps.astype(float)]) if len(steps) else np.asarray([0.0, 1.0])


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` positions out of `count`, evenly spread, both ends included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
