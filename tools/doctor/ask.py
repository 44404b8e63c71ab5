"""Small questions to files and programs that may not be there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SECONDS = 20.0  # nvidia-smi takes seconds where the driver is not kept loaded


def read(path: Path) -> str | None:
    """The text of a file without the spaces around it; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # such as the speed of an interface that is down
        return None


def answer_of(*command: str) -> str | None:
    """What a program prints; None if it is not there, fails, or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
