"""Real processes over gloo, started as torchrun starts them."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., None]


def free_port() -> int:
    """A port that nobody listens on, below those that outgoing connections of other tests may take until it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def choose_port() -> Callable[[], int]:
    return free_port


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank of one machine."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in variables.items()
    }


@pytest.fixture(scope="session")
def run_ranks() -> Start:
    """`run_ranks(world, file, function, *arguments)`: call a function of a test file in every rank, and wait.

    The file ends with `if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])`. Fails with what the ranks
    printed if one of them fails or they take longer than `timeout` seconds.
    """

    def run(world: int, file: str | Path, function: str, *arguments: object, timeout: float = 300.0) -> None:
        command = [sys.executable, str(file), function, *map(str, arguments)]
        port = free_port()
        ranks = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, world, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + timeout
        printed, late = [], False
        for process in ranks:
            try:
                printed.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                late = True
                for other in ranks:
                    other.kill()
                printed.append(process.communicate()[0])
        codes = [process.returncode for process in ranks]
        if late or any(codes):
            text = "\n".join(
                f"--- rank {rank}, exit code {codes[rank]}\n{out[-4000:]}" for rank, out in enumerate(printed)
            )
            pytest.fail(f"{function} in {world} ranks {'took too long' if late else 'failed'}\n{text}", pytrace=False)

    return run
