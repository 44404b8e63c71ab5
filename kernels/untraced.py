"""Functions that torch.compile must call as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def untraced(function: F) -> F:
    """Let a compiled caller break its graph and call this function eagerly (torch.compiler.disable, with its type)."""
    return torch.compiler.disable(function)  # type: ignore[return-value]
