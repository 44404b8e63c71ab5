"""What a run folder says about the run, read back for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BASELINE_NAMES = {"unigram": "byte unigram", "trigram": "byte trigram", "gzip": "gzip -9"}


@dataclass(frozen=True)
class ExpertLoads:
    """Load of every expert over time.

    Attributes:
        layers: (L,) numbers of the MoE layers in the model.
        steps: (S,) optimizer steps at which the load was written down.
        loads: (S, L, E) share of a layer's assignments that an expert got; the balanced value is 1 / E.
    """

    layers: list[int]
    steps: np.ndarray
    loads: np.ndarray


@dataclass(frozen=True)
class RunHistory:
    """The lines and summaries of a run folder; what is missing is empty."""

    name: str
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    experts: ExpertLoads | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""

    @property
    def comparable(self) -> list[dict[str, Any]]:
        """Evaluations on the same text as the first one: a run's last evaluation may be on more of it."""
        return [line for line in self.valid if line.get("valid_tokens") == self.valid[0].get("valid_tokens")]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure of the train lines, where it was finite."""
        points = [(line["step"], line[name]) for line in self.train if line.get(name) is not None]
        steps, values = zip(*points) if points else ((), ())
        return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def read_history(run_dir: Path) -> RunHistory:
    """Read a run folder."""
    run_dir = Path(run_dir)
    lines = _lines(run_dir / "metrics.jsonl")
    config = run_dir / "config.yaml"
    return RunHistory(
        name=run_dir.resolve().name,
        train=[line for line in lines if "loss" in line],
        valid=[line for line in lines if line.get("valid_loss") is not None],
        experts=_expert_loads(_lines(run_dir / "experts.jsonl")),
        summary=_object(run_dir / "summary.json"),
        environment=_object(run_dir / "environment.json"),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


def _expert_loads(lines: list[dict[str, Any]]) -> ExpertLoads | None:
    if not lines:
        return None
    layers = [layer["layer"] for layer in lines[-1]["layers"]]
    loads = [[layer["load"] for layer in line["layers"]] for line in lines]
    return ExpertLoads(layers, np.asarray([line["step"] for line in lines]), np.asarray(loads, dtype=float))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects


def _object(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
