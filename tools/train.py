"""`scatterfold train`: compose a configuration and train, sweep over configurations, or show one.

Works as `scatterfold train`, `python -m scatterfold.tools.train` and `torchrun -m scatterfold.tools.train`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rank_report
from .errors import guarded

if TYPE_CHECKING:
    from .composition import Session
    from .request import Request

HELP = """Train a Mixture-of-Experts language model.

The configuration is put together by Hydra from groups (model, router, experts, dispatcher, data, optimizer, schedule,
trainer, logger, layout, engine, launcher, communication, experiment); every word key=value changes it.

Usage: scatterfold train [flags] [group=choice] [key=value]

  -m, --multirun        one run for each combination of values: router=top_k,threshold optimizer.lr=1e-3,3e-4
  -c, --cfg job         show the configuration and leave; with --resolve, interpolations resolved
  --config-path RUN     take RUN/config.yaml, the configuration of an earlier run, and run it again in a new folder
  --config-name NAME    another file than config.yaml
  --config-dir DIR      a folder of your own configs, looked up besides the built-in ones

  run_dir=DIR           where everything about the run goes [runs/DATE_TIME]; the same folder again resumes
  resume=auto           auto, never, or a checkpoint
  init_from=DIR         begin with the model in DIR, of any format; it is the model unless model=NAME chooses one
  hydra.sweep.dir=DIR   where the trials of -m go [multirun/DATE_TIME]; the same folder again skips finished trials
  hydra.launcher.parallel=N   trials at the same time; the GPUs are shared out among them
  hydra.launcher.seeds=[0,1]  every combination once with each seed
  hydra/sweeper=halving       all trials to a first rung, the best 1/eta on to the next: hydra.sweeper.eta=3
                              hydra.sweeper.min_steps=N, the first rung
  hydra/sweeper=optuna        optuna chooses: 'optimizer.lr=tag(log,interval(1e-4,1e-2))' hydra.sweeper.n_trials=20

SCATTERFOLD_DEBUG=1 shows the traceback of bad input too. Exit codes: 0 done, 2 bad input, 1 anything else.

Example:
  scatterfold train experiment=demo trainer.steps=200 router.top_k=1"""

ROOT_KEYS = ("seed", "run_dir", "resume", "init_from", "init_optimizer")
GROUPS = (
    *("model", "router", "experts", "dispatcher", "data", "optimizer", "schedule"),
    *("trainer", "logger", "layout", "engine", "launcher", "communication"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("--help", "-h") for word in words):
        print(HELP)
        return 0
    return guarded(lambda: _run(words))


def _run(argv: list[str]) -> int:
    rank_report.register()
    config, request = _compose(argv)
    if isinstance(config, int):
        return config
    return run(config, request)


def _compose(argv: list[str]) -> tuple[dict[str, Any] | int, Request]:
    """The resolved configuration, or an exit code where there is nothing more to do."""
    from .composition import session
    from .request import Request

    try:
        request = Request.parse(argv)
        with session(request) as hydra:
            if request.show is not None:
                hydra.show()
                return 0, request
            if request.multirun:
                return sweep(hydra), request
            return checked(hydra.resolve(hydra.compose()), request), request
    except Exception:
        if rank_report.rank() > 0 and rank_report.FOLDER not in os.environ:
            raise SystemExit(2) from None  # every rank composes the same: one line is enough, rank 0 prints it
        raise


def checked(config: dict[str, Any], request: Request) -> dict[str, Any]:
    """The configuration, if it has the groups that it must have and nothing else. Raises: ConfigError."""
    from ..kernels.errors import ConfigError
    from .close_match import did_you_mean

    allowed = (*ROOT_KEYS, *GROUPS)
    config = {"communication": {}, **config}  # a rerun of a run from before the group was there
    for key, value in config.items():
        if key not in allowed:
            raise ConfigError(f"{key} is an unknown key{did_you_mean(key, allowed)}, allowed: {', '.join(allowed)}")
        if key in GROUPS and not isinstance(value, dict):
            raise ConfigError(f"{key}={value} is no choice of the group {key}, allowed: a file of configs/{key}")
    for group in GROUPS:
        if group not in config:
            raise ConfigError(f"{group} is missing, allowed: {group}=CHOICE, a file of configs/{group}")
    for key in ("run_dir", "resume", "init_from"):
        if not isinstance(config.get(key), str | None):
            raise ConfigError(f"{key}={config[key]!r} has the wrong type, allowed: a path in quotes, or null")
    if not isinstance(config.get("init_optimizer"), bool | None):
        raise ConfigError(f"init_optimizer={config['init_optimizer']!r} has the wrong type, allowed: true or false")
    if request.config_path is not None and request.value_of("run_dir") is None:
        config = {**config, "run_dir": None}  # a rerun is a run of its own
    return config


def run(config: dict[str, Any], request: Request) -> int:
    """Train here, or start the processes that the launcher group asks for."""
    from .launchers import Local, launcher_of
    from .run_folder import run_folder

    launcher = Local() if rank_report.under_torchrun() else launcher_of(config)
    with run_folder(config["run_dir"]) as folder:
        if not isinstance(launcher, Local):
            return launcher.run([*request.flags, *request.overrides], folder)
        train(config, folder)
        return 0


def train(config: dict[str, Any], folder: Path) -> float:
    """Train on this rank; returns the objective of a sweep, the final validation loss (NaN if there is none)."""
    from ..moe.training.run import train as train_run
    from .sweep.trial import Result, write_result

    result = train_run({**config, "run_dir": str(folder)}, folder, tell=lambda message: rank_report.tell(message, 1))
    if not result.completed and result.step != config["trainer"].get("stop_after"):
        rank_report.leave_unfinished()
    if rank_report.rank() == 0:
        write_result(Result(result.completed, result.step, result.valid_loss))
    return math.nan if result.valid_loss is None else result.valid_loss


def sweep(hydra: Session) -> int:
    """Run every trial of a sweep; 1 if any failed."""
    from ..kernels.errors import ConfigError
    from .sweep.trials import Sweep

    if rank_report.under_torchrun():
        raise ConfigError(
            "-m under torchrun would start a sweep on every rank, allowed: scatterfold train -m … launcher=torchrun "
            "launcher.nproc_per_node=N"
        )
    if hydra.request.value_of("run_dir") is not None:
        raise ConfigError(
            f"run_dir={hydra.request.value_of('run_dir')} would be shared by all trials, allowed: hydra.sweep.dir=DIR"
        )
    return Sweep(hydra).run()


if __name__ == "__main__":
    sys.exit(main())
