"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside `path`, bring it to the disk, and give it its name.

    Raises: ConfigError if it cannot be written.
    """
    from ..parallel.disk import write_whole

    try:
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise _cannot_write(path, error.strerror) from error


def check_target(path: Path | None) -> None:
    """Raise ConfigError before the work whose result belongs into `path`, if there is no folder for it."""
    if path is not None and not path.parent.is_dir():
        raise _cannot_write(path, f"{path.parent} is no folder")


def _cannot_write(path: Path, reason: str | None) -> Exception:
    from ..kernels.errors import ConfigError

    return ConfigError(f"{path} cannot be written ({reason}), allowed: a file in a folder that can be written")
