"""Compile the C++ sources once for this processor, and load what came out."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..cache_folder import cache_folder
from ..processor import cpuinfo

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),
)


class BuildError(Exception):
    """In one line, why there is no library."""


@functools.cache
def library() -> ctypes.CDLL | BuildError:
    """The library, or why there is none. Compiles it (10 to 30 s) where no earlier process has."""
    try:
        return ctypes.CDLL(str(_built()))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled kernels cannot be used: {error}")


def _built() -> Path:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BuildError(f"the C++ kernels are for Linux on x86_64, not {platform.system()} on {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++, or what CXX names) to compile the kernels with")
    target = cache_folder() / f"native-{_key(compiler)}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "native.lock").open("w") as lock:  # of many ranks, one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, "library.so")
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCES / "moe_mlp.cpp")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise BuildError(f"{compiler} could not compile the kernels: {first.strip()}")
        made.replace(target)


def _key(compiler: str) -> str:
    """Of all that the library depends on: sources, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]pp"))]
    return hashlib.sha256("\0".join((*FLAGS, version, *sorted(processor_flags()), *sources)).encode()).hexdigest()[:16]


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words."""
    return frozenset(cpuinfo("flags").split())
