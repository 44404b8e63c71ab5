"""Skips optimizer steps whose loss or gradients are not finite, and stops the run when there are too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NonFiniteError(Exception):
    """Too many optimizer steps had a loss or a gradient that is not finite."""


class StepGuard:
    """Counts skipped steps.

    Args:
        limit: the run stops when this many steps in a row had to be skipped.
        skipped, in_a_row: steps skipped so far in the run, in all and lately, from a checkpoint.
    """

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped
        self.in_a_row = in_a_row

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Whether to take the step; counts it as skipped if not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.in_a_row >= self.limit


def first_non_finite_gradient(norms: dict[str, float]) -> str | None:
    """Name of the parameter where gradients stopped being finite, of norms in the order of the forward pass.

    The backward pass runs from the last parameter to the first, and what is not finite spreads with it.
    """
    return next((name for name, norm in reversed(norms.items()) if not math.isfinite(norm)), None)


class FirstNonFiniteOutput:
    """Hooks that remember the first module, in forward order, whose output is not finite.

    Use as a context manager around one forward pass; `name` is None if all outputs were finite.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.name: str | None = None
        self._parts = parts
        self._handles: list = []

    def __enter__(self) -> FirstNonFiniteOutput:
        for name, module in (named for part in self._parts for named in part.named_modules()):
            if name and not list(module.children()):
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if self.name is not None or not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not bool(torch.isfinite(output).all()):
                self.name = name

        return look
