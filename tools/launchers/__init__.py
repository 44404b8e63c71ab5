"""How the processes of a run come to be: one class for each file of the `launcher` group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .local import Local
from .slurm import Slurm
from .torchrun import Torchrun

__all__ = ["Launcher", "Local", "Slurm", "Torchrun", "launcher_of"]


class Launcher(Protocol):
    """Starts `scatterfold train WORDS` somewhere else, in the given run folder; returns its exit code."""

    def run(self, words: list[str], folder: Any) -> int: ...


def launcher_of(config: Mapping[str, Any]) -> Local | Torchrun | Slurm:
    """The launcher that a configuration asks for. Raises: ConfigError."""
    from ...moe.components import build

    return build(config["launcher"], "launcher")
