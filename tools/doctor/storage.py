"""Room and speed of disks, shared memory, and the limits of a process."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")
LIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "locked_memory_bytes": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
    "file_bytes": resource.RLIMIT_FSIZE,
    "core_bytes": resource.RLIMIT_CORE,
}


def describe_storage(run_dir: Path, megabytes: int) -> dict[str, Any]:
    """Free bytes where `run_dir` is or would be made, for temporary files and in shared memory, and limits.

    Args:
        megabytes: of a file that is written and read in both folders to measure their speed; 0 measures nothing.
    """
    temporary = Path(tempfile.gettempdir())
    return {
        "disk": {"run_dir": str(run_dir), **_disk(run_dir, megabytes)},
        "temporary": {"folder": str(temporary), **_disk(temporary, megabytes)},
        "shared_memory_bytes": shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        "limits": {name: _limit(number) for name, number in LIMITS.items()},
    }


def _disk(folder: Path, megabytes: int) -> dict[str, Any]:
    folder = existing(folder)
    free = shutil.disk_usage(folder).free
    if not megabytes:
        return {"free_bytes": free}
    if free < 2 * megabytes * 2**20:
        return {"free_bytes": free, "problem": f"no room for a file of {megabytes} MiB"}
    try:
        write, read = speed(folder, megabytes)
    except OSError as error:
        return {"free_bytes": free, "problem": error.strerror or str(error)}
    return {"free_bytes": free, "write_bytes_per_second": write, "read_bytes_per_second": read}


def speed(folder: Path, megabytes: int) -> tuple[float, float]:
    """Bytes a second of writing a file to the disk and of reading it back, past the cache where the system lets us.

    Raises: OSError if it cannot be written.
    """
    block = os.urandom(2**20)  # a disk that compresses must not look fast
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".scatterfold-doctor-") as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(2**20):
            pass
        was_read = time.perf_counter() - start
    size = megabytes * 2**20
    return size / written, size / was_read


def existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _limit(number: int) -> int | None:
    """The soft limit; None for none."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft
