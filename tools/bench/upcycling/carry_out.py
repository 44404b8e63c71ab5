"""Train what is not trained yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ....kernels import ConfigError
from ....moe.training.resume import flatten
from ....moe.training.run import train
from ....parallel.checkpoint import checkpoints, newest_checkpoint
from .arms import ARMS
from .plan import Experiment, Run

# What does not change what is trained.
FREE = (
    *("run_dir", "resume", "init_from", "logger", "launcher", "layout", "experts.backend", "data.cache_dir"),
    *("data.workers", "data.prefetch", "trainer.checkpoint_every", "trainer.keep_last", "trainer.keep_best"),
    *("trainer.hang_timeout_s", "trainer.log_every", "trainer.report", "trainer.baselines", "experiment"),
)


class Stopped(Exception):
    """A signal stopped a run; it is saved, and the same command goes on."""


def carry_out(experiment: Experiment, planned: Sequence[Sequence[Run]], say: Callable[[str], None]) -> None:
    """Train every run that has not finished, one after the other.

    Args:
        planned: of each seed the dense training, and what follows it, the longest run of each arm first.

    Raises: Stopped.
    """
    total, done = sum(map(len, planned)), 0
    for base, *runs in planned:
        for run in (base, *runs):
            done += 1
            if not is_finished(run):
                say(f"{done} of {total}: {run.folder}, {run.steps:,} steps")
                _train(run, start_of(experiment, run, base, runs))
                say(f"    {summary_of(run)['bits_per_byte']:.4f} bits per byte")


def is_finished(run: Run) -> bool:
    return bool(summary_of(run).get("completed"))


def summary_of(run: Run) -> dict[str, Any]:
    """summary.json of a run; empty if it has not finished."""
    file = run.folder / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def check_same(run: Run) -> None:
    """Raise ConfigError if the folder holds a run that differs in anything that could change its result."""
    file = run.folder / "config.yaml"
    if not file.exists():
        return
    before, now = flatten(yaml.safe_load(file.read_text(encoding="utf-8"))), flatten(run.config)
    for name, value in before.items():
        is_free = any(name == free or name.startswith(f"{free}.") for free in FREE)
        if not is_free and now.get(name, value) != value:
            raise ConfigError(
                f"{run.folder} holds a run with {name}={value}, not {now[name]}, allowed: the same settings, or "
                "another output"
            )


def start_of(experiment: Experiment, run: Run, base: Run, runs: Sequence[Run]) -> Mapping[str, str]:
    """What a run begins with, as init_from or resume; a run that was interrupted goes on by itself."""
    if newest_checkpoint(run.folder / "checkpoints") is not None or run is base:
        return {}
    shared = shared_checkpoint(run, [other for other in runs if other.arm == run.arm and other is not run])
    if shared is not None:
        return {"resume": str(shared)}
    arm = ARMS[run.arm]
    if not arm.continues:
        return {}
    if arm.experts is None or arm.method is None:
        return {"init_from": str(base.folder)}
    from .start import make_start

    start = experiment.start(run.arm, run.seed)
    make_start(arm.experts, arm.method, base.folder, start, run.seed)
    return {"init_from": str(start)}


def shared_checkpoint(run: Run, others: Sequence[Run]) -> Path | None:
    """The last checkpoint of other runs of the same arm and seed before which nothing differs from this run."""
    shared: dict[int, Path] = {}
    for other in others:
        until = min(run.stable_steps, other.stable_steps)
        shared |= {
            meta["step"]: path for path, meta in checkpoints(other.folder / "checkpoints") if meta["step"] <= until
        }
    return shared[max(shared)] if shared else None


def _train(run: Run, start: Mapping[str, str]) -> None:
    config = {**run.config, "resume": "auto", "init_from": None, **start, "run_dir": str(run.folder)}
    if not train(config, run.folder).completed:
        raise Stopped
