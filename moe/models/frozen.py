"""Parameters that a run does not train: by name, before anything is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ...kernels import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let no gradient be computed for the parameters whose names match a pattern (`*` stands for dots too).

    A pattern that matches nothing here may match in another part of the model.
    """
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of `model.frozen` matches the name of a parameter."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_frozen(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raises: ConfigError for a pattern that matches no parameter of the whole model, or patterns that leave none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(is_frozen(name, [pattern]) for name in names):
            raise ConfigError(
                f"model.frozen={pattern} matches no parameter, allowed: patterns of names such as {names[0]} or "
                f"{names[len(names) // 2]}"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.frozen={list(patterns)} leaves nothing to train, allowed: patterns that spare some")
