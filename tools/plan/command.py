"""The words after `scatterfold plan`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..arguments import argument, parse, usage, wants_help
from ..errors import guarded
from ..subcommands import run_subcommand

HELP = """
Every other word changes the configuration, as in `scatterfold train`: groups (model=, router=, experiment=, …) and keys
(data.sequence_length=, trainer.precision=, engine.reshard_after_forward=, …). A size of layout that is given, such as
layout.tp=2, is kept; the others are searched.

More commands:
  plan calibrate    measure this machine, for device=FILE
  plan validate     predict and measure memory and time of several configurations on this machine"""


@dataclass(frozen=True)
class Plan:
    """Estimate memory, messages, step time and cost of a configuration in every layout of so many devices.

    The fastest come first. Nothing is started and no data is read. What does not fit is listed last, with the reason.
    """

    EXAMPLE: ClassVar[str] = (
        "scatterfold plan experiment=qwen3_30b_a3b gpus=64 device=h100 price_per_hour=2.5 tokens=1e12"
    )

    gpus: int = argument("devices, one a rank", least=1)
    device: str = argument("h100, h200, a100, b200, cpu, or a file of plan calibrate", default="h100")
    gpus_per_node: int | None = argument("devices of a machine; the device's usual number", default=None, least=1)
    top: int = argument("rows of the table", default=10, least=1)
    imbalance: float = argument("load of the busiest rank's experts over the mean", default=1.0, least=1.0)
    price_per_hour: float | None = argument("of one device, for a cost", default=None, least=0.0)
    tokens: float | None = argument("to train on, for hours and a cost", default=None, least=1.0)
    json: Path | None = argument("also write all layouts to this file", default=None)


@dataclass(frozen=True)
class Calibrate:
    """Measure what this machine reaches, and write it as a device for `scatterfold plan device=FILE`.

    With each number of ranks, all at work at the same time: products of matrices of the model's shapes, experts,
    attention, head and loss; memory bandwidth; messages over gloo or NCCL; and steps of the engine itself, which tell
    what a layer takes besides. Other words change the configuration whose shapes are measured.
    """

    EXAMPLE: ClassVar[str] = "scatterfold plan calibrate output=this.json model=small data.sequence_length=256"

    output: Path = argument("file to write")
    device: str = argument("auto: cuda if there is one", default="auto", choices=("auto", "cpu", "cuda"))
    ranks: tuple[int, ...] = argument("numbers of ranks, as A,B", default=(1, 2), least=1)
    seconds: float = argument("to spend on each figure", default=0.5, least=0.0)
    timeout: float = argument("seconds until the ranks are stopped", default=600.0, least=1.0)


@dataclass(frozen=True)
class Validate:
    """Predict and then measure memory and step time of several configurations on this machine.

    Writes OUTPUT/plan.json, plan.png and README.md, every error stated. Other words change all the configurations.
    """

    EXAMPLE: ClassVar[str] = "scatterfold plan validate device=this.json output=docs/results/plan"

    output: Path = argument("folder for the results")
    device: str = argument("the calibration file of this machine")
    cases: tuple[str, ...] | None = argument("names of configurations, as A,B (all)", default=None)
    steps: int = argument("timed steps, whose median counts", default=5, least=1)
    seed: int = argument("of the tokens", default=0, least=0)
    timeout: float = argument("seconds until the ranks of one are stopped", default=600.0, least=1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["calibrate"]:
        return _with_overrides("calibrate", Calibrate, words)
    if words[:1] == ["validate"]:
        return _with_overrides("validate", Validate, words)
    if not words or wants_help(words):
        print(f"{usage(Plan)}\n{HELP}")
        return 0
    return guarded(lambda: _plan(words))


def _plan(words: list[str]) -> int:
    from .run import run

    own, overrides = split_words(Plan, words)
    return run(parse(Plan, own), overrides)


def _with_overrides(name: str, settings: type, words: list[str]) -> int:
    own, overrides = split_words(settings, words[1:])

    def run(parsed) -> int:
        if name == "calibrate":
            from .calibrate import calibrate

            return calibrate(parsed, overrides)
        from .validate import validate

        return validate(parsed, overrides)

    return run_subcommand("plan", HELP, {name: (settings, run)}, [name, *own])


def split_words(settings: type, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that the command takes itself, and overrides of the configuration."""
    names = {field.name for field in dataclasses.fields(settings)}
    own = [word for word in words if word.partition("=")[0] in names or wants_help([word])]
    return own, [word for word in words if word not in own]
