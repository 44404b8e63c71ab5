"""`scatterfold`: the command that finds the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .close_match import did_you_mean

COMMANDS = {
    "train": "train a model, or sweep over configurations with -m",
    "sample": "write text with a trained model",
    "data": "prepare text corpora",
    "convert": "write a trained model in another format",
    "upcycle": "make a mixture of experts from a dense model",
    "experts": "prune, merge or grow the experts of a model",
    "plan": "estimate memory, messages, time and cost of every layout",
    "layout": "show which rank is where, and what its groups communicate",
    "launch": "start several ranks on one machine or many, or write a SLURM script or a PyTorchJob",
    "sweep": "report on the trials of a sweep",
    "bench": "measure the kernels against their peers",
    "doctor": "check this machine: devices, links, disks, kernels, collectives of ranks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Modules are loaded when they are needed: help does not wait for torch."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"scatterfold {__version__}")
        return 0
    if words[0] not in COMMANDS:
        suggestion = did_you_mean(words[0], COMMANDS)
        print(f"scatterfold: {words[0]} is no command{suggestion}, allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(f".{words[0]}", __package__).main(words[1:])


def _help() -> str:
    commands = "\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items())
    return f"""Scatterfold {__version__}: Mixture-of-Experts training.

Usage: scatterfold COMMAND [arguments]

{commands}

Each command explains itself: scatterfold COMMAND --help

Example:
  scatterfold train experiment=demo run_dir=runs/demo
  scatterfold sample source=runs/demo prompt="def " max_tokens=300 temperature=0.5 top_p=0.9"""


if __name__ == "__main__":
    sys.exit(main())
