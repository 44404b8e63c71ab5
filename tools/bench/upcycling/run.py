"""The command: check everything, train what is missing, measure inference, write the figures."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....kernels import ConfigError
from ....moe.training.environment import device_name
from ...composition import session
from ...files import write_atomically
from ...request import Request
from ...train import checked
from ..kernels.report import make_folder
from .arms import ARMS, DEFAULT_ARMS, DENSE
from .carry_out import Stopped, carry_out, check_same
from .page import write_page
from .plan import Experiment, Run
from .results import record, summarise
from .speed import measure

if TYPE_CHECKING:
    from ..command import Upcycling

FORMAT = "scatterfold bench upcycling 1"
# What the benchmark itself sets for each run.
OWN = ("seed", "run_dir", "resume", "init_from", "experiment", "schedule", "launcher", "model.num_experts")


def run(settings: Upcycling) -> int:
    """Train, measure, write; returns the exit code."""
    arms = settings.arms or DEFAULT_ARMS
    check(settings, arms)
    experiment = experiment_of(settings)
    planned = [[experiment.base(seed), *experiment.successors(arms, seed)] for seed in settings.seeds]
    for run in (run for of_seed in planned for run in of_seed):
        check_same(run)
    make_folder(settings.output)
    try:
        carry_out(experiment, planned, say)
    except Stopped:
        say("stopped and saved; the same command goes on from there")
        return 0
    for path in write(settings, experiment, arms, [run for of_seed in planned for run in of_seed]):
        print(f"written: {path}")
    return 0


def experiment_of(settings: Upcycling) -> Experiment:
    """Compose configs/experiment/upcycling.yaml with what the user changes. Raises: ConfigError."""
    for change in settings.changes:
        key = change.partition("=")[0].lstrip("+~")
        if key in OWN:
            raise ConfigError(f"changes={change} is set for each run, allowed: other keys of scatterfold train")
    request = Request.parse(["experiment=upcycling", *settings.changes])
    with session(request) as hydra:
        config = checked(hydra.resolve(hydra.compose()), request)
    if settings.data is not None:
        if not settings.data.exists():
            raise ConfigError(f"data={settings.data} is not there, allowed: a file or folder of text")
        config["data"]["path"] = str(settings.data)
    if settings.steps is not None:
        config["trainer"]["steps"] = settings.steps
    config["logger"]["display"] = "none"
    return Experiment(settings.output, config, settings.extra, settings.all_flops)


def check(settings: Upcycling, arms: tuple[str, ...]) -> None:
    """Raise ConfigError for arms, seeds or budgets that make no comparison."""
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"arms={arm} is unknown, allowed: {', '.join(ARMS)}")
    for name, values in (("arms", arms), ("seeds", settings.seeds), ("extra", settings.extra)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}={list(values)} is empty or names one twice, allowed: different ones")
    wrong = [budget for budget in settings.extra if not budget > 0]
    if wrong:
        raise ConfigError(f"extra={wrong[0]:g} is no budget, allowed: above 0")


def write(settings: Upcycling, experiment: Experiment, arms: tuple[str, ...], runs: list[Run]) -> list[Path]:
    """Write upcycling.json, upcycling.png and README.md; returns their paths."""
    from .figure import save_figure

    output, seeds = settings.output, settings.seeds
    base = experiment.base(seeds[0])
    records = [record(run, base.flops) for run in runs]
    whole = {
        "format": FORMAT,
        "command": " ".join(["scatterfold bench upcycling", *asked(settings)]),
        "conditions": {
            "device": device_name(torch.device("cpu")),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "settings": {
            "seeds": list(seeds),
            "extra": list(settings.extra),
            "steps": base.steps,
            "tokens_per_step": base.tokens_per_step,
            "flops_of_dense_training": base.flops,
            "config": {name: base.config[name] for name in ("model", "data", "optimizer", "schedule", "trainer")},
        },
        "models": {arm: describe(experiment.runs(arm, seeds[0])) for arm in dict.fromkeys((DENSE, *arms))},
        "results": summarise(records, arms),
        "speed": speed_of(experiment, arms, seeds[0]) if settings.speed else None,
        "runs": records,
    }
    write_atomically(output / "upcycling.json", json.dumps(whole, indent=1) + "\n")
    figure = save_figure(records, arms, output / "upcycling.png")
    return [output / "upcycling.json", figure, write_page(whole, output / "README.md")]


def describe(runs: list[Run]) -> dict[str, Any]:
    """Sizes and costs of the model of an arm; steps by budget, smallest first."""
    return {
        "parameters": runs[0].parameters,
        "active": runs[0].active,
        "flops_per_token": runs[0].flops_per_step / runs[0].tokens_per_step,
        "steps": [run.steps for run in reversed(runs)],
    }


def speed_of(experiment: Experiment, arms: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Inference with the dense model and the upcycled ones of a seed; OUTPUT/speed.json, if it is there, is taken."""
    file = experiment.output / "speed.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    upcycled = [arm for arm in arms if ARMS[arm].method is not None]
    sources = {arm: experiment.runs(arm, seed)[0].folder for arm in upcycled}
    found = measure({DENSE: experiment.base(seed).folder, **sources})
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    return found


def asked(settings: Upcycling) -> list[str]:
    """The words that matter to the result, as a user would type them."""
    words = ["output=DIR", f"seeds=[{','.join(map(str, settings.seeds))}]"]
    words.append(f"extra=[{','.join(f'{budget:g}' for budget in settings.extra)}]")
    words += [] if settings.data is None else [f"data={settings.data}"]
    words += [] if settings.steps is None else [f"steps={settings.steps}"]
    words += [] if settings.all_flops else ["all_flops=false"]
    words += [] if settings.arms is None else [f"arms=[{','.join(settings.arms)}]"]
    return words + ([f"changes=[{','.join(settings.changes)}]"] if settings.changes else [])


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
