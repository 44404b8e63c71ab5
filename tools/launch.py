"""`scatterfold launch`: several ranks of a command, on this machine or on many."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .close_match import did_you_mean
from .errors import guarded

HELP = """Start several ranks of a command (torch.distributed.run), or write a SLURM script that does.

All ranks share one run folder; what each prints is in RUN/logs/rank-N.out and rank-N.err. SIGTERM and Ctrl-C are passed
on, so that the ranks save before they leave; their exit code is the launcher's.

Usage: scatterfold launch [flags] train [overrides]

  --nproc-per-node N    ranks on each machine: a number, gpu, cpu, or auto: one a GPU, or else one a core [auto]
  --nnodes N            machines; the same command must be started on each [1]
  --rdzv-endpoint HOST:PORT   where the machines meet: any free port of one of them
  --max-restarts N      start all ranks again, from the last checkpoint, when one fails [0]

  --slurm FILE          write a batch script to FILE instead; submit it with sbatch. It takes:
  --partition --account --qos --constraint --time --mem --gpus-per-node --cpus-per-task --job-name --signal-seconds

Example:
  scatterfold launch --nproc-per-node 8 train experiment=demo layout.dp_shard=8
  scatterfold launch --slurm job.sh --nnodes 2 --nproc-per-node 8 --gpus-per-node 8 --time 4:00:00 train model=small"""

COMMANDS = ("train",)
SLURM_TEXT = ("partition", "account", "qos", "constraint", "time", "mem", "gpus_per_node", "job_name")
SLURM_NUMBERS = ("cpus_per_task", "signal_seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command_at = next((i for i, word in enumerate(words) if word in COMMANDS), len(words))
    if any(word in ("--help", "-h") for word in words[:command_at]):
        print(HELP)
        return 0
    return guarded(lambda: _run(words, command_at))


def _run(words: list[str], command_at: int) -> int:
    flags = _parser().parse_args(words[:command_at])
    if command_at == len(words):
        given = flags.command or ""
        raise _error(f"{given or 'no command'!r} cannot be launched{did_you_mean(given, COMMANDS)}, allowed: train")
    if flags.command is not None:
        raise _error(f"{flags.command!r} before {words[command_at]} is no flag, allowed: see scatterfold launch --help")
    overrides = words[command_at + 1 :]
    if any(word in ("--help", "-h") for word in overrides):
        from .train import main as train

        return train(["--help"])
    return _write_script(flags, overrides) if flags.slurm else _launch(flags, overrides)


def _launch(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Compose once here, so that bad input is told before any process is started; then start the ranks."""
    from .composition import session
    from .launchers import Torchrun
    from .request import Request
    from .run_folder import VARIABLE, run_folder
    from .train import checked

    request = Request.parse(overrides)
    if request.multirun:
        raise _error("launch … train -m would sweep on every rank, allowed: scatterfold train -m … launcher=torchrun")
    for name in (*SLURM_TEXT, *SLURM_NUMBERS):
        if getattr(flags, name) is not None:
            raise _error(f"--{name.replace('_', '-')} is for a SLURM script, allowed: together with --slurm FILE")
    launcher = Torchrun(_number_or_word(flags.nproc_per_node), flags.nnodes, flags.rdzv_endpoint, flags.max_restarts)
    with session(request) as hydra:
        if request.show is not None:
            hydra.show()
            return 0
        config = checked(hydra.resolve(hydra.compose()), request)
    if flags.nnodes > 1 and config["run_dir"] is None and VARIABLE not in os.environ:
        raise _error(f"run_dir=null with --nnodes {flags.nnodes}, allowed: run_dir=DIR, the same on every machine")
    with run_folder(config["run_dir"]) as folder:
        return launcher.run(overrides, folder)


def _write_script(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Compose once, so that a job does not wait in a queue only to find a misspelled key; then write the script."""
    from .composition import session
    from .files import write_atomically
    from .launchers import Slurm
    from .request import Request
    from .train import checked

    given = {name: getattr(flags, name) for name in (*SLURM_TEXT, *SLURM_NUMBERS) if getattr(flags, name) is not None}
    request = Request.parse(overrides)
    slurm = Slurm(
        nodes=flags.nnodes,
        nproc_per_node=_number_or_word(flags.nproc_per_node),
        max_restarts=flags.max_restarts,
        **given,
    )
    with session(request) as hydra:
        config = checked(hydra.resolve(hydra.compose()), request)
    folder = Path(config["run_dir"]) if config["run_dir"] else None
    write_atomically(Path(flags.slurm), slurm.script(overrides, folder))
    print(f"{flags.slurm}: submit it with sbatch {flags.slurm}")
    return 0


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _error(message: str) -> Exception:
    from ..kernels.errors import ConfigError

    return ConfigError(message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _error(f"{message}, allowed: see scatterfold launch --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scatterfold launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc-per-node", default="auto")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--slurm")
    for name in SLURM_TEXT:
        parser.add_argument(f"--{name.replace('_', '-')}")
    for name in SLURM_NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("command", nargs="?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
