"""How a command of dataclass arguments starts: alone (scatterfold sample), or in a group (scatterfold data prepare)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .arguments import parse, usage, wants_help
from .close_match import did_you_mean
from .errors import guarded

Run = Callable[[Any], int]


def run_command(settings: type, run: Run, argv: Sequence[str] | None) -> int:
    """Read the arguments of a command and run it; returns the exit code.

    Args:
        settings: the dataclass of the arguments.
        run: what to do with them.
        argv: None for those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _start(settings, run, words))


def run_subcommand(group: str, help: str, commands: Mapping[str, tuple[type, Run]], argv: Sequence[str] | None) -> int:
    """Find the command in the first word, read its arguments and run it; returns the exit code.

    Args:
        group: the word before, for messages.
        help: what to print where no command is given.
        commands: by name, the dataclass of the arguments and what to do with them.
        argv: None for those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(help)
        return 0
    return guarded(lambda: _choose(group, commands, words))


def _choose(group: str, commands: Mapping[str, tuple[type, Run]], words: list[str]) -> int:
    name, arguments = words[0], words[1:]
    if name not in commands:
        from ..kernels.errors import ConfigError

        raise ConfigError(f"{group} {name} is no command{did_you_mean(name, commands)}, allowed: {', '.join(commands)}")
    return _start(*commands[name], arguments)


def _start(settings: type, run: Run, words: list[str]) -> int:
    if wants_help(words):
        print(usage(settings))
        return 0
    return run(parse(settings, words))


def on_all_ranks(command: Callable[[bool], None]) -> int:
    """Run a command whose ranks share the work, on the CPU; returns the exit code.

    Args:
        command: gets whether this is the main rank, which alone prints and writes receipts. It raises InputError on
            every rank or on none.
    """
    from ..kernels.errors import InputError
    from ..parallel.process import running

    with running("cpu") as process:
        try:
            command(process.is_main)
        except InputError:
            if process.is_main:
                raise
            return 2  # every rank has the same error: one line is enough
    return 0
