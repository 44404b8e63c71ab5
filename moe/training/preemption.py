"""SIGTERM asks a run to save and leave: the signal that schedulers send before they take a machine away."""

from __future__ import annotations

import signal
from types import FrameType


class Preemption:
    """Remembers that SIGTERM (or SIGUSR1, which SLURM can be told to send) arrived; a context manager.

    The loop reads `requested` between steps, so that a save always happens at a whole step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        for number in self.SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: a library use, where the caller owns the signals
                return self
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
