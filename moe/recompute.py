"""Activation checkpointing that replays decisions instead of taking them again.

A router that recomputes its choice in the backward pass may break a tie differently; the recomputed tensors then
differ in shape from the saved ones, and statistics are counted twice. Here the first forward records every
decision on a tape, the recomputation reads it back, and `recomputing()` tells side effects to stay away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


# A plain global, because torch.compile guards on it: what was traced without a tape is traced anew with one.
_tape: _Tape | None = None


def checkpointed(function: Callable[..., T], *args: object) -> T:
    """Call `function(*args)`, save only its inputs, and recompute it in the backward pass."""
    tape = _Tape()
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (_use(tape, False), _use(tape, True)))


def remember(decide: Callable[[], T]) -> T:
    """Take a decision, or, while recomputing, return the one that the first forward took."""
    return decide() if _tape is None else _on_tape(decide)


def recomputing() -> bool:
    """True inside the recomputation of a checkpointed call."""
    return _tape is not None and _replaying()


@torch.compiler.disable(recursive=False)  # reads what the trace cannot know; `decide` itself may be compiled
def _on_tape(decide: Callable[[], T]) -> T:
    tape = _tape
    assert tape is not None
    if tape.replaying:
        decision = tape.decisions[tape.position]
        tape.position += 1
        return decision  # type: ignore[return-value]
    decision = decide()
    tape.decisions.append(decision)
    return decision


@untraced
def _replaying() -> bool:
    return _tape is not None and _tape.replaying


@contextlib.contextmanager
def _use(tape: _Tape, replaying: bool) -> Iterator[None]:
    global _tape
    tape.replaying, tape.position = replaying, 0
    before, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = before
