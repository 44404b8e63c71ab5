"""A folder that is written whole, or is not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...kernels import ConfigError
from ...parallel.disk import flush


def check_new(output: Path) -> None:
    """Raise ConfigError if `output` is a file, or a folder that holds something."""
    try:
        if not any(output.iterdir()):
            return
        reason = "is not empty"
    except FileNotFoundError:
        return
    except NotADirectoryError:
        reason = "is a file, or lies in one"
    except OSError as error:
        reason = f"cannot be used ({error.strerror})"
    raise ConfigError(f"output={output} {reason}, allowed: a folder that is empty or does not exist yet")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to fill; at the end it is brought to the disk and gets its name.

    Raises: ConfigError if `output` holds something, or cannot be written. Nothing is left behind then.
    """
    check_new(output)
    output = Path(os.path.abspath(output))
    hidden = output.with_name(f".{output.name}.{os.getpid()}")
    missing = [folder for folder in output.parents if not folder.exists()]  # innermost first
    try:
        hidden.mkdir(parents=True)
        yield hidden
        for file in hidden.iterdir():
            flush(file)
        flush(hidden)
        os.rename(hidden, output)
        flush(output.parent)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ConfigError(
                f"output={output} cannot be written ({reason}), allowed: a new folder on a disk with space left"
            ) from error
        raise
