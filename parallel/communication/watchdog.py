"""Finding the rank that stands still: a thread on every rank that notices when training no longer gets on.

A collective waits for every rank, so when one hangs all do, and the others look just as stuck as the culprit. When
nothing has moved for `timeout_s`, each rank's thread puts down where its main thread is, reads what the others put
down, and all come to the same verdict: the rank that gives no sign of life, else the ranks that are not waiting in a
collective, else the collectives in which ranks wait for each other. The process then ends with that one line; the
stacks go to stderr, which `scatterfold launch` keeps per rank.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType

import torch.distributed as dist

from ..process import Process
from ..torch_private import Store, own_store

EXIT_CODE = 1
FIRST_STEP_S = 120.0  # imports alone may take half a minute where ranks share few cores
_GRACE_S = 15.0  # how long ranks wait for each other's words; they notice at nearly the same time


@dataclass(frozen=True)
class Standing:
    """Where the main thread of a rank is: its innermost line outside of torch, and the collective it waits in there."""

    rank: int
    where: str
    waits_in: str | None


class Watchdog:
    """A context manager around training; does nothing for one process.

        with Watchdog(process, timeout_s=1800, tell=print) as watchdog:
            for step in range(steps):
                watchdog.alive()
                ...

    Args:
        timeout_s: how long nothing may move. Must cover the longest thing between two calls of `alive`.
        tell: called with the verdict, one line, before the process ends with exit code 1.
        record: called before that, to write down what the rank did last.
        first_s: the least time that the first step gets, which also imports, compiles and tunes.
    """

    def __init__(
        self,
        process: Process,
        timeout_s: float,
        tell: Callable[[str], None],
        record: Callable[[], None] = lambda: None,
        first_s: float = 0.0,
    ) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._tell = tell
        self._record = record
        self._first_s = first_s
        self._signs = 0
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._ending = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._process.world > 1 and dist.is_initialized():
            store = own_store("scatterfold/watchdog")  # the main thread may be waiting in its own
            self._thread = threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # What other ranks raise when the first of them ends must not keep this one from saying why it does.
        if exception[0] is None or not self._ending.is_set():
            self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def alive(self) -> None:
        """Say that this rank has got on."""
        self._moved = time.monotonic()
        self._signs += 1

    def _watch(self, store: Store) -> None:
        interval = min(5.0, self._timeout_s / 4)
        while not self._ended.wait(interval):
            if time.monotonic() - self._moved > self._allowed():
                return self._end(store)

    def _allowed(self) -> float:
        """Steps begin with a sign of life: the second one ends the first step."""
        return max(self._timeout_s, self._first_s) if self._signs < 2 else self._timeout_s

    def _end(self, store: Store) -> None:
        self._ending.set()
        frame = sys._current_frames().get(self._main)
        own = standing(self._process.rank, traceback.walk_stack(frame))
        stack = "".join(traceback.format_stack(frame))
        print(f"rank {self._process.rank} has stood still for {self._allowed():g} s at\n{stack}", file=sys.stderr)
        sys.stderr.flush()
        with suppress(OSError):  # a full disk must not keep the verdict back
            self._record()
        try:
            message = _verdict(self._gather(store, own), self._process.world, self._allowed())
        except Exception as error:  # the rank that keeps the store has ended already
            message = f"nothing has moved for {self._allowed():g} s; rank {own.rank} is at {own.where} ({error})"
        if self._ended.is_set():  # it moved at the last moment
            return
        self._tell(message)
        sys.stdout.flush()
        os._exit(EXIT_CODE)  # the main thread is inside of a call that may never return

    def _gather(self, store: Store, own: Standing) -> dict[int, Standing]:
        """What every rank that can still speak says, after giving all of them time to notice."""
        store.set(str(own.rank), json.dumps(asdict(own)))
        found: dict[int, Standing] = {}
        deadline = time.monotonic() + min(_GRACE_S, 2 * self._timeout_s)
        while len(found) < self._process.world and time.monotonic() < deadline:
            for rank in range(self._process.world):
                if rank not in found and store.check([str(rank)]):
                    found[rank] = Standing(**json.loads(store.get(str(rank))))
            time.sleep(0.2)
        # All leave together: the first to end makes the launcher stop the others before they have spoken.
        store.add("read", 1)
        while store.add("read", 0) < len(found) and time.monotonic() < deadline + 1.0:
            time.sleep(0.1)
        return found


def _verdict(standings: dict[int, Standing], world: int, timeout_s: float) -> str:
    """One line that names the ranks that keep the others waiting."""
    silent = [rank for rank in range(world) if rank not in standings]
    if silent:
        return (
            f"nothing has moved for {timeout_s:g} s and {_ranks(silent)} {_verb(silent)} no sign of life; "
            f"{_list(standings.values())}"
        )
    busy = [standing for standing in standings.values() if standing.waits_in is None]
    waiting = [standing for standing in standings.values() if standing.waits_in is not None]
    if busy and waiting:
        hanging = ", ".join(f"rank {standing.rank} hangs at {standing.where}" for standing in busy)
        return f"{hanging}: nothing has moved for {timeout_s:g} s while {_list(waiting)}"
    return f"nothing has moved for {timeout_s:g} s: {_list(standings.values())}"


def _list(standings: Iterable[Standing]) -> str:
    return ", ".join(
        f"rank {standing.rank} is at {standing.where}"
        if standing.waits_in is None
        else f"rank {standing.rank} waits in {standing.waits_in} at {standing.where}"
        for standing in standings
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _verb(ranks: list[int]) -> str:
    return "give" if len(ranks) > 1 else "gives"


def standing(rank: int, stack: Iterable[tuple[FrameType, int]]) -> Standing:
    """Read a stack of frames and lines from the inside out, up to the first line that is not torch's."""
    waits_in: str | None = None
    for inner, line in stack:
        path, name = inner.f_code.co_filename, inner.f_code.co_name
        if f"{os.sep}torch{os.sep}" not in path:
            return Standing(rank, f"{os.sep.join(path.split(os.sep)[-2:])}:{line} ({name})", waits_in)
        if waits_in is None and f"{os.sep}distributed{os.sep}" in path:
            waits_in = name
        elif waits_in is None and f"{os.sep}autograd{os.sep}" in path:
            waits_in = "a backward pass"  # a GPU's runs in a thread of its own
    return Standing(rank, "an unknown place", waits_in)
