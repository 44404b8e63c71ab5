"""Start the processes of a measurement on this machine, and get back what the first of them found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A rank that is done leaves at once: tearing down torch's threads once aborted a process that had found everything.
_RUN = """
import os, runpy, sys
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
sys.stdout.flush()
os._exit(0)
"""


def measure_in_ranks(module: str, settings: dict[str, Any], ranks: int, timeout_s: float) -> Any:
    """Run `python -m MODULE SETTINGS RESULT` in each rank, with the variables that torchrun sets.

    Args:
        settings: handed over as JSON.

    Returns: the JSON that rank 0 wrote to the file RESULT.
    Raises: RuntimeError with the last words of the first rank that failed, or if they take too long.
    """
    with tempfile.TemporaryDirectory(prefix="scatterfold-bench-") as folder:
        result, port = Path(folder, "result.json"), _free_port()
        command = [sys.executable, "-c", _RUN, module, json.dumps(settings), str(result)]
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        processes = [_start(command, rank, ranks, port, log) for rank, log in enumerate(logs)]
        try:
            _wait(processes, logs, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads(result.read_text())


def _start(command: list[str], rank: int, ranks: int, port: int, log: Path) -> subprocess.Popen:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in variables.items()}}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _wait(processes: list[subprocess.Popen], logs: list[Path], deadline: float) -> None:
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code:
                lines = [line for line in logs[rank].read_text().splitlines() if line.strip()]
                raise RuntimeError(f"rank {rank} stopped with exit code {code}: {lines[-1] if lines else 'no word'}")
            if code == 0:
                del waiting[rank]
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, waiting))} took too long")
        time.sleep(0.05)


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
