"""A collective that not all ranks join in time: one line that says which, where and for how long."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..process import Process
from .watchdog import standing

_GLOO_WORDS = "Timed out waiting"


class CollectiveTimeout(RuntimeError):
    """Ranks did not join a collective in time."""


@contextmanager
def naming_timeouts(process: Process, timeout_s: float, record: Callable[[], None]) -> Iterator[None]:
    """Turn gloo's time-out, which names neither the collective nor the place, into one that does.

    NCCL ends the process by itself, and its words name the collective; the launcher finds them in the rank's log.

    Args:
        timeout_s: how long collectives wait.
        record: called before the error is raised, to write down what the rank did last.

    Raises: CollectiveTimeout.
    """
    try:
        yield
    except RuntimeError as error:
        if _GLOO_WORDS not in str(error):
            raise
        record()
        inside_out = reversed(list(traceback.walk_tb(error.__traceback__)))
        at = standing(process.rank, inside_out)
        raise CollectiveTimeout(
            f"rank {at.rank} waited {timeout_s:g} s (communication.timeout_s) in {at.waits_in or 'a collective'} at "
            f"{at.where} and not all other ranks came"
        ) from error
