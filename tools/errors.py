"""What a person sees when a command fails: one line and an exit code; a traceback only for a bug.

Exit codes: 0 done, 2 bad input, 1 anything else, 130 after Ctrl-C. SCATTERFOLD_DEBUG=1 shows the traceback always.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from . import rank_report

# What a user can change about files: permissions, a full disk, a path through a file.
FILE_ERRORS = {
    errno.EACCES: "a path that can be read and written",
    errno.EPERM: "a path that can be read and written",
    errno.EROFS: "a path that can be written",
    errno.ENOTDIR: "a path whose parents are folders",
    errno.EISDIR: "a file",
    errno.ENOSPC: "a disk with space left",
    errno.EDQUOT: "a disk with space left",
    errno.EFBIG: "files as large as this, see ulimit -f",
    errno.ENAMETOOLONG: "a shorter path",
}


def guarded(command: Callable[[], int]) -> int:
    """Run a command, report what it raises, and return the exit code."""
    try:
        return command()
    except KeyboardInterrupt:
        rank_report.tell("interrupted", code=130)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return report(error)


def report(error: Exception) -> int:
    """Tell the user about an error; returns the exit code."""
    message, code = describe(error)
    explains_itself = code == 2 or _is_expected(error)
    if not explains_itself or os.environ.get("SCATTERFOLD_DEBUG"):
        traceback.print_exception(error)
    rank_report.tell(message, code)
    return code


def describe(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    from ..kernels.errors import InputError

    for cause in causes(error):
        if isinstance(cause, InputError):
            return one_line(str(cause)), 2
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in FILE_ERRORS and cause.filename is not None:
            reason = (cause.strerror or "cannot be used").lower()
            return f"{os.fspath(cause.filename)}: {reason}, allowed: {FILE_ERRORS[cause.errno]}", 2
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full, allowed: a disk with space left", 2
    if _is_expected(error):
        return one_line(str(error)), 1
    return one_line(f"{type(error).__name__}: {error}"), 1


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def one_line(text: str) -> str:
    return " ".join(text.split())


def _is_expected(error: Exception) -> bool:
    """A run that diverged is no bug of ours: its message says all that a traceback could."""
    module = sys.modules.get("scatterfold.moe.training.step_guard")
    return module is not None and isinstance(error, module.NonFiniteError)
