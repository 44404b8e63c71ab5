"""The command: check, start the ranks, show what they found."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ....kernels import ConfigError
from ....moe.training.environment import device_name
from ....parallel.dispatchers.base import check_spread
from ...close_match import did_you_mean
from ...files import check_target, write_atomically
from ..kernels.shapes import parse_shapes
from ..ranks import measure_in_ranks
from .case import ROUTINGS

if TYPE_CHECKING:
    from ..command import Dispatch

FORMAT = "scatterfold bench dispatch 1"
DISPATCHERS = ("all_to_all", "all_gather")
DEFAULT_SHAPES = {"cpu": "1024,512,256,64,8; 1024,512,1024,8,2", "cuda": "qwen3_30b,mixtral"}
COLUMNS = ("dispatcher", "rows MB", "/ bound", "/ copies", "other MB", "messages", "dropped", "forward ms", "train ms")


def run(settings: Dispatch) -> int:
    """Measure; returns the exit code."""
    device = _device(settings)
    shapes = parse_shapes(settings.shapes or DEFAULT_SHAPES[device], device)
    if settings.ranks % settings.etp:
        raise ConfigError(f"etp={settings.etp} does not divide ranks={settings.ranks}")
    for shape in shapes:
        check_spread(shape.experts, shape.expert_width, settings.ranks // settings.etp, settings.etp)
    check_target(settings.json)
    asked = {name: getattr(settings, name) for name in ("etp", "dtype", "chunks", "capacity_factor", "repeats", "seed")}
    asked |= {
        "routings": _names("routings", settings.routings or ("uniform", "zipf"), ROUTINGS),
        "dispatchers": _names("dispatchers", settings.dispatchers or DISPATCHERS, DISPATCHERS),
    }
    asked |= {"device": device, "shapes": [dataclasses.asdict(shape) for shape in shapes]}
    records = measure_in_ranks("scatterfold.tools.bench.dispatch.worker", asked, settings.ranks, settings.timeout)
    _print(records, settings)
    if settings.json is not None:
        conditions = {"device": device_name(torch.device(device)), "ranks": settings.ranks, "torch": torch.__version__}
        found = {"format": FORMAT, "conditions": conditions, "settings": asked, "records": records}
        write_atomically(settings.json, json.dumps(found, indent=1) + "\n")
    return 0


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Figures over the ranks: bytes and dropped assignments are sums, times those of the slowest rank."""
    ranks = record["ranks"]
    total = {name: sum(rank[name] for rank in ranks) for name in ("rows_bytes", "other_bytes", "dropped")}
    bound, copies = (sum(rank[name] for rank in ranks) for name in ("bound_bytes", "copies_bytes"))
    return {
        **total,
        "to_bound": total["rows_bytes"] / bound if bound else float("nan"),
        "to_copies": total["rows_bytes"] / copies if copies else float("nan"),
        "messages": statistics.fmean(rank["messages"] for rank in ranks),
        "forward_ms": max(rank["forward_ms"] for rank in ranks),
        "training_ms": max(rank["training_ms"] for rank in ranks),
    }


def _names(field: str, names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{field}={name} is unknown{did_you_mean(name, allowed)}, allowed: {', '.join(allowed)}")
    return list(names)


def _device(settings: Dispatch) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and count < settings.ranks):
        return "cpu"
    if count < settings.ranks:
        raise ConfigError(f"ranks={settings.ranks} with device=cuda, but torch finds {count} CUDA devices here")
    return "cuda"


def _print(records: list[dict[str, Any]], settings: Dispatch) -> None:
    """One table per shape and routing; a pipe gets one line a row."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    cases: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        shape = record["shape"]
        numbers = ", ".join(
            f"{letter} {shape[name]:,}"
            for letter, name in zip("TDFEK", ("tokens", "width", "expert_width", "experts", "top_k"))
        )
        title = f"{record['routing']}: {numbers}, {settings.dtype}, ep {settings.ranks // settings.etp}"
        cases.setdefault(title + (f", etp {settings.etp}" if settings.etp > 1 else ""), []).append(record)
    for title, of_case in cases.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "dispatcher" else "right", no_wrap=True)
        for record in of_case:
            table.add_row(record["dispatcher"], *_cells(summary(record)))
        console.print(table)
        console.print()
    for line in (
        f"T tokens on each of {settings.ranks} ranks. MB: 10^6 bytes to other ranks, all of them, forward.",
        "Bound: a row for each distinct (token, other rank), one sum back; copies: the same per (token, expert).",
        "Times: median of the slowest rank, with the experts.",
    ):
        console.print(line, style="dim")


def _cells(figures: dict[str, float]) -> list[str]:
    return [
        f"{figures['rows_bytes'] / 1e6:.3f}",
        f"{figures['to_bound']:.3f}",
        f"{figures['to_copies']:.3f}",
        f"{figures['other_bytes'] / 1e6:.3f}",
        f"{figures['messages']:.0f}",
        f"{figures['dropped']:.0f}",
        f"{figures['forward_ms']:.2f}",
        f"{figures['training_ms']:.2f}",
    ]
