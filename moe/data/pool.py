"""Worker processes that answer jobs over pipes.

Plain processes rather than multiprocessing: nothing is forked from a process that has threads and a GPU, the caller's
script needs no main guard, and a worker whose parent was killed reads the end of its input and leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from ...kernels.errors import DataError
from .cache import WriteError


def light(program: str) -> str:
    """A program that enters the packages above this one without running their `__init__`, which would load torch: a
    worker needs NumPy and a tokenizer, starts in a fraction of a second, and there may be hundreds of them."""
    folder = Path(__file__).parent
    root = __name__.removesuffix(".moe.data.pool")
    packages = {
        root: folder.parents[1],
        f"{root}.kernels": folder.parents[1] / "kernels",
        f"{root}.parallel": folder.parents[1] / "parallel",
        f"{root}.moe": folder.parent,
        f"{root}.moe.data": folder,
    }
    lines = ["import sys, types"]
    for name, path in packages.items():
        lines.append(
            f"sys.modules[{name!r}] = package = types.ModuleType({name!r}); package.__path__ = [{str(path)!r}]"
        )
    return "\n".join([*lines, program])


PROGRAM = light(f"from {__name__.removesuffix('.pool')}.worker import main; main()")


class Pool:
    """Processes that each run `worker.main`.

    Args:
        workers: how many.
        setup: the first line that each of them reads.
    """

    def __init__(self, workers: int, setup: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                process_group=0,  # an interrupt from the keyboard is for the caller, who ends them
            )
            for _ in range(workers)
        ]
        self._setup = setup

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    # A job that was being written when its reader was killed is still in the buffer.
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def run(self, jobs: Sequence[dict[str, Any]], report: Callable[[int], None]) -> None:
        """Hand out the jobs; returns when all are done. `report` gets each amount of work done."""
        queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        for job in jobs:
            queue.put(job)
        lock = Lock()

        def locked_report(count: int) -> None:
            with lock:
                report(count)

        with ThreadPoolExecutor(len(self._processes)) as threads:
            running = [threads.submit(self._drive, process, queue, locked_report) for process in self._processes]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
                for future in running:
                    if future.done():
                        future.result()
            except BaseException:
                self._kill()  # their drivers read the end of the pipe and leave
                raise

    def _drive(
        self, process: subprocess.Popen[str], queue: SimpleQueue[dict[str, Any]], report: Callable[[int], None]
    ) -> None:
        try:
            self._send(process, self._setup)
            while True:
                try:
                    job = queue.get_nowait()
                except Empty:
                    return
                self._send(process, job)
                self._await(process, report)
        except (BrokenPipeError, EOFError):
            code = process.wait()
            raise DataError(f"a worker process ended with code {code} before its work was done") from None

    @staticmethod
    def _send(process: subprocess.Popen[str], value: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()

    @staticmethod
    def _await(process: subprocess.Popen[str], report: Callable[[int], None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise (WriteError if answer["write"] else DataError)(answer["error"])
            if "done" in answer:
                return
            report(answer["bytes"])
        raise EOFError
