"""How the processes of a run speak to the person who started them.

Alone, a process prints to stderr. Under `scatterfold launch`, a rank leaves its last words in the launcher's folder
(`SCATTERFOLD_LAUNCH_DIR`), and the launcher prints one line for all ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "SCATTERFOLD_LAUNCH_DIR"


@dataclass(frozen=True)
class LastWords:
    """What a rank said before it left with `code`, at `time` (seconds since the epoch)."""

    rank: int
    message: str
    code: int
    time: float


def rank() -> int:
    """The rank of this process, 0 if it is alone."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def world() -> int:
    """How many processes run together."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


def under_torchrun() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def tell(message: str, code: int) -> None:
    """Say why this process stops."""
    folder = os.environ.get(FOLDER)
    if folder and under_torchrun():
        words = {"rank": rank(), "message": message, "code": code, "time": time.time()}
        try:
            unfinished = Path(folder, f"{rank()}.telling")
            unfinished.write_text(json.dumps(words))
            unfinished.replace(Path(folder, f"{rank()}.error"))  # whole or not at all: a launcher may end this process
            return
        except OSError:
            pass  # the launcher is gone or its disk is full: say it here
    who = f"scatterfold (rank {rank()})" if world() > 1 and rank() > 0 else "scatterfold"
    print(f"{who}: {message}", file=sys.stderr, flush=True)


def register() -> None:
    """Let the launcher know this rank's process, so that signals can be passed on. Exits if it was told to stop."""
    folder = os.environ.get(FOLDER)
    if not folder or not under_torchrun():
        return
    Path(folder, f"{rank()}.pid").write_text(str(os.getpid()))
    if Path(folder, "stop").exists():
        raise SystemExit(0)


def leave_unfinished() -> None:
    """Let the launcher know that this rank has saved and left although there are steps left."""
    folder = os.environ.get(FOLDER)
    if folder and under_torchrun():
        Path(folder, "unfinished").touch()


def is_unfinished(folder: Path) -> bool:
    """Whether a rank has left with steps left."""
    return Path(folder, "unfinished").exists()


def forget(folder: Path) -> None:
    """Before ranks are started again: what those before them said does not count any more."""
    for path in (*folder.glob("*.pid"), *folder.glob("*.error"), *folder.glob("unfinished")):
        path.unlink(missing_ok=True)


def registered(folder: Path) -> list[int]:
    """Process ids of the ranks that have started."""
    return [int(text) for path in sorted(folder.glob("*.pid")) if (text := path.read_text())]


def last_words(folder: Path) -> list[LastWords]:
    """What the ranks said, the most telling first: bad input before anything else, then the earliest."""
    words = [LastWords(**json.loads(path.read_text())) for path in folder.glob("*.error")]
    return sorted(words, key=lambda said: (said.code != 2, said.rank if said.code == 2 else 0, said.time))
