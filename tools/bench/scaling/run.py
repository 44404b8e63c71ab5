"""The command: check, start the ranks of each layout, show what they found beside the formula."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import torch

from ....kernels import ConfigError
from ....moe.training.environment import device_name
from ...files import check_target, write_atomically
from ..ranks import measure_in_ranks
from ..traffic import PURPOSES
from .case import Model, parse_layouts, read_layout
from .formula import expected

if TYPE_CHECKING:
    from ..command import Scaling

FORMAT = "scatterfold bench scaling 1"


def run(settings: Scaling) -> int:
    """Measure; returns the exit code."""
    model = Model(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Model)})
    cases = parse_layouts(settings.layouts, settings.ranks)
    for ranks, layout in cases:
        check_case(model, layout, ranks)
    check_target(settings.json)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = settings.device if settings.device != "auto" else "cuda" if count >= max(settings.ranks) else "cpu"
    if device == "cuda" and count < max(settings.ranks):
        raise ConfigError(f"ranks={max(settings.ranks)} with device=cuda, but torch finds {count} CUDA devices here")
    asked = {name: getattr(settings, name) for name in ("steps", "seed", "precision")}
    asked |= {"device": device, "model": dataclasses.asdict(model)}
    records = []
    for ranks, layout in cases:
        found = measure_in_ranks(
            "scatterfold.tools.bench.scaling.worker", {**asked, "layout": layout}, ranks, settings.timeout
        )
        records.append({"ranks": ranks, "layout": layout, **summary(model, layout, ranks, settings.precision, found)})
        show_progress(len(records), len(cases))
    _print(records, model, settings)
    if settings.json is not None:
        conditions = {"device": device_name(torch.device(device)), "torch": torch.__version__}
        whole = {"format": FORMAT, "conditions": conditions, "settings": asked, "records": records}
        write_atomically(settings.json, json.dumps(whole, indent=1) + "\n")
    return 0


def check_case(model: Model, layout: str, ranks: int) -> None:
    """Raise ConfigError unless the batch and the model can be cut as a layout asks."""
    resolved = read_layout(layout).resolve(ranks)
    shares = resolved.data * model.micro_batches
    if model.sequences % shares:
        raise ConfigError(
            f"sequences={model.sequences} cannot be cut in {resolved.data} x micro_batches={model.micro_batches} with "
            f"layout {layout!r}, allowed: multiples of {shares}"
        )
    for name, size, cut in (
        ("experts", model.experts, resolved.ep),
        ("expert_width", model.expert_width, resolved.etp),
        ("heads", model.heads, resolved.tp),
        ("vocabulary", model.vocabulary, resolved.tp),
        ("length", model.length, 2 * resolved.cp * resolved.tp),
    ):
        if size % cut:
            raise ConfigError(f"{name}={size} does not divide by {cut} with layout {layout!r}")
    if resolved.pp > model.layers:
        raise ConfigError(f"layers={model.layers} are fewer than the stages of layout {layout!r}")


def summary(model: Model, layout: str, ranks: int, precision: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures over the ranks: times and memory of the worst, bytes sent as a mean, beside the formula."""
    by_purpose = dict.fromkeys(PURPOSES, 0.0)
    for rank in found:
        for purpose, _, count, _ in rank["sent"]:
            by_purpose[purpose] += count / ranks
    by_formula = expected(model, read_layout(layout).resolve(ranks), 2 if precision == "bf16" else 4)
    return {
        "loss": found[0]["loss"],
        "step_ms": max(rank["step_ms"] for rank in found),
        "state_bytes": max(rank["state_bytes"] for rank in found),
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "sent_bytes": by_purpose,
        "formula_bytes": by_formula,
        "per_rank": found,
    }


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} layouts", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _print(records: list[dict[str, Any]], model: Model, settings: Scaling) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("ranks", "layout", "step ms", "state MB", "peak MB", *(f"{name} MB" for name in PURPOSES)):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for record in records:
        table.add_row(
            str(record["ranks"]),
            record["layout"],
            f"{record['step_ms']:.1f}",
            f"{record['state_bytes'] / 1e6:.1f}",
            f"{record['peak_bytes'] / 1e6:.1f}",
            *(_against(record["sent_bytes"][name], record["formula_bytes"].get(name)) for name in PURPOSES),
        )
    console.print(table)
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(model).items())
    for line in (
        f"Model: {sizes}; {settings.precision}. The same batch in every layout.",
        "Step: median of the slowest rank. State: parameters, gradients, optimizer. Peak: growth of the process.",
        "MB: 10^6 bytes that a rank sends in a step, mean over ranks, counted in the collectives; in brackets the",
        "ratio to the formula, which takes tokens as spread evenly over the experts.",
    ):
        console.print(line, style="dim")


def _against(count: float, formula: float | None) -> str:
    if count == 0 and not formula:
        return "-"
    shown = f"{count / 1e6:.3f}"
    return f"{shown} ({count / formula:.2f})" if formula else shown
