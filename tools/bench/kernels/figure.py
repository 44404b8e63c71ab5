"""The picture: for each case, how long every entry takes beside the dense layer that one would train instead."""

from __future__ import annotations

from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ....kernels import BACKENDS
from .labels import label
from .results import OK, PASSES, CaseResult, EntryResult, Run

# Okabe and Ito's colours that people who confuse colours can tell apart, and a mark for each entry besides.
STYLES = {
    "ours": ("#D55E00", "D"),
    "triton": ("#D55E00", "^"),
    "quack": ("#D55E00", "v"),
    "dense_a": ("#777777", "|"),
    "pipeline": ("#0072B2", "o"),
    "transformers_grouped_mm": ("#009E73", "s"),
    "transformers_batched_mm": ("#009E73", "^"),
    "transformers_eager": ("#009E73", "x"),
    "deepspeed": ("#CC79A7", "P"),
    "scattermoe": ("#E69F00", "v"),
    "sonicmoe": ("#56B4E9", "*"),
    "megablocks": ("#000000", "h"),
    "liger": ("#B8A600", "<"),
}


def save_figure(runs: list[Run], path: Path) -> Path:
    """Two panels for each run, forward and forward+backward; a row for each shape and dtype."""
    heights = [max(len(_rows(run, direction)) for direction in PASSES) for run in runs]
    size = (13, 1.6 + sum(0.42 * height + 1.3 for height in heights))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False, height_ratios=[height + 2 for height in heights])
    handles: dict[str, Artist] = {}
    for run, pair in zip(runs, grid):
        for direction, axes in zip(PASSES, pair):
            handles |= _draw(axes, _rows(run, direction), f"{run.conditions.device}: {direction}")
        pair[1].tick_params(labelleft=False)
    order = [_key_label(name) for name in STYLES if _key_label(name) in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=5, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _rows(run: Run, direction: str) -> list[CaseResult]:
    return [case for case in run.cases if case.direction == direction]


def _draw(axes: Axes, cases: list[CaseResult], title: str) -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    for row, case in enumerate(cases):
        for entry in case.entries:
            key = "ours" if entry.name == case.default else entry.name
            if key not in STYLES or entry.status != OK or entry.to_dense_b is None:
                continue  # our fallbacks have no mark; dense (b) is the line at 1
            color, mark = STYLES[key]
            (handle,) = axes.plot(entry.to_dense_b, row, color=color, marker=mark, linestyle="", alpha=0.9)
            handle.set(markersize=9 if key == "ours" else 7, markeredgewidth=1.6, zorder=4 if key == "ours" else 3)
            handles[_key_label(key)] = handle
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.035, linewidth=0)
    axes.axvline(1, color="#444444", linewidth=1.2, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks)
    axes.set_yticks(range(len(cases)), [f"{case.shape.name}  {case.dtype}" for case in cases], fontsize=9)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("time / time of dense (b), the SwiGLU MLP of width K x F; left is faster")
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _key_label(key: str) -> str:
    return "ours" if key == "ours" else label(EntryResult(key, "ours" if key in BACKENDS else "peer"))
