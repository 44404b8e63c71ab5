"""Activation checkpointing that replays decisions instead of taking them again.

A router that recomputes its choice in the backward pass may break a tie differently; the recomputed tensors then
differ in shape from the saved ones, and statistics are counted twice. Here the first forward records every
decision on a tape, the recomputation reads it back, and `recomputing()` tells side effects to stay away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from ..kernels.untraced import untraced

T = TypeVar("T")


class _Tape:
    """Decisions of one checkpointed call, in order."""

    def __init__(self) -> None:
        self.decisions: list[object] = []
        self.position = 0
        self.replaying = False


_current: ContextVar[_Tape | None] = ContextVar("scatterfold_tape", default=None)


def checkpointed(function: Callable[..., T], *args: object) -> T:
    """Call `function(*args)`, save only its inputs, and recompute it in the backward pass."""
    tape = _Tape()
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (_use(tape, False), _use(tape, True)))


@torch.compiler.disable(recursive=False)  # reads what the trace cannot know; `decide` itself may be compiled
def remember(decide: Callable[[], T]) -> T:
    """Take a decision, or, while recomputing, return the one that the first forward took."""
    tape = _current.get()
    if tape is None:
        return decide()
    if tape.replaying:
        decision = tape.decisions[tape.position]
        tape.position += 1
        return decision  # type: ignore[return-value]
    decision = decide()
    tape.decisions.append(decision)
    return decision


@untraced
def recomputing() -> bool:
    """True inside the recomputation of a checkpointed call."""
    tape = _current.get()
    return tape is not None and tape.replaying


@contextlib.contextmanager
def _use(tape: _Tape, replaying: bool) -> Iterator[None]:
    tape.replaying, tape.position = replaying, 0
    token = _current.set(tape)
    try:
        yield
    finally:
        _current.reset(token)
