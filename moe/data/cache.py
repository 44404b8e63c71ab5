"""The cache folder, and how several processes share it: locks, temporary names, renames."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...kernels.errors import DataError
from ...parallel.disk import write_whole


class WriteError(DataError):
    """A folder cannot be written: no permission, or no space."""


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, or $XDG_CACHE_HOME/scatterfold, or ~/.cache/scatterfold; made if it does not exist.

    Raises: WriteError if it cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(configured if configured is not None else Path(base) / "scatterfold").expanduser().absolute()
    with writing(folder, field="data.cache_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "probe"):
            pass
    return folder


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of a folder: others wait. The system releases it when the process ends, however it ends."""
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{name}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(path: Path, field: str = "output") -> Iterator[None]:
    """Turn a failure to write below `path` into a WriteError that says what is wrong with it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full, allowed: a folder with more space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "no permission to write, allowed: a writable folder"
        else:
            reason = f"{error.strerror or error}, allowed: a writable folder"
        raise WriteError(f"{field}={path} cannot be written: {reason}") from error


def digest(value: Any) -> str:
    """A short name for any JSON value, equal for equal values on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either absent or whole under its name."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))
