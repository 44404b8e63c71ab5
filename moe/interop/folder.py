"""A folder that is written whole, by one process or by all ranks, or is not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ...kernels import ConfigError
from ...parallel.disk import flush
from ...parallel.process import barrier, broadcast, place, together

T = TypeVar("T")


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


def check_space(folder: Path, output: Path, needed: int) -> None:
    """Raise ConfigError if the disk of `folder`, which will become `output`, has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"output={output} needs {needed:,} bytes and its disk has {free:,}, allowed: a disk with space left"
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to fill; at the end it is brought to the disk and gets its name.

    Every rank must enter it: rank 0 makes one folder for all, and names it when all have left. What may fail on one
    rank alone belongs into `parallel.process.together` inside, so that all of them leave with the error.

    Raises: ConfigError if `output` holds something, or cannot be written. Nothing is left behind then.
    """
    rank, _ = place()
    output = Path(os.path.abspath(output))
    hidden = broadcast(output.with_name(f".{output.name}.{os.getpid()}"))
    made: list[Path] = []  # outermost last

    def make() -> None:
        check_new(output)
        made.extend([hidden, *(folder for folder in output.parents if not folder.exists())])
        hidden.mkdir(parents=True)

    def publish() -> None:
        for path in (*hidden.rglob("*"), hidden):
            flush(path)
        os.rename(hidden, output)
        flush(output.parent)

    def remove() -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in made[1:]:
            with contextlib.suppress(OSError):
                folder.rmdir()

    try:
        together(lambda: or_config_error(output, make) if rank == 0 else None)
        yield hidden
        together(lambda: or_config_error(output, publish) if rank == 0 else None)
    except BaseException as error:
        if made:
            remove()
        if isinstance(error, Exception):
            with contextlib.suppress(RuntimeError):
                barrier()  # a launcher ends all ranks as soon as one has: not before the folder is gone
        if isinstance(error, OSError):
            raise _cannot_write(output, error) from error
        raise


def or_config_error(output: Path, action: Callable[[], T]) -> T:
    """What `action` returns; raises ConfigError where it raises OSError."""
    try:
        return action()
    except OSError as error:
        raise _cannot_write(output, error) from error


def _cannot_write(output: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"output={output} cannot be written ({reason}), allowed: a new folder on a disk with space left")
