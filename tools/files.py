"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside `path`, bring it to the disk, and give it its name.

    Raises: ConfigError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error.strerror) from error
        raise


def check_target(path: Path | None) -> None:
    """Raise ConfigError before the work whose result belongs into `path`, if there is no folder for it."""
    if path is not None and not path.parent.is_dir():
        raise _cannot_write(path, f"{path.parent} is no folder")


def _cannot_write(path: Path, reason: str | None) -> Exception:
    from ..kernels.errors import ConfigError

    return ConfigError(f"{path} cannot be written ({reason}), allowed: a file in a folder that can be written")
