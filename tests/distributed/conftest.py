"""Real processes over gloo, started as torchrun starts them."""

import contextlib
import json
import math
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, None if it had to be killed, and what it printed."""

    code: int | None
    out: str
    err: str


@pytest.fixture(scope="session")
def start_ranks(warm_python, tmp_path_factory) -> Callable[..., list[Ended]]:
    """`start_ranks(world, file, function, *arguments) -> [Ended, …]`: call a function of a test file in every rank.

    The file ends with `if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])`. Ranks that take longer than
    `timeout` seconds, or `grace` seconds longer than rank 0, are killed.
    """

    def start(
        world: int,
        file: str | Path,
        function: str,
        *arguments: object,
        timeout: float = 300.0,
        grace: float = math.inf,
    ) -> list[Ended]:
        folder, port = tmp_path_factory.mktemp("ranks"), free_port()
        command = [warm_python, str(file), function, *map(str, arguments)]
        out, err = ([folder / f"{rank}.{stream}" for rank in range(world)] for stream in ("out", "err"))
        ranks = []
        for rank in range(world):
            environment = rank_environment(rank, world, port)
            with open(out[rank], "w") as stdout, open(err[rank], "w") as stderr:
                ranks.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
                )
        codes = wait(ranks, timeout, grace)
        return [Ended(codes[rank], out[rank].read_text(), err[rank].read_text()) for rank in range(world)]

    return start


def wait(ranks: list[subprocess.Popen], timeout: float, grace: float) -> list[int | None]:
    """Exit codes of ranks, None of those that took too long and were killed."""
    deadline = time.monotonic() + timeout
    try:
        ranks[0].wait(timeout)
        deadline = min(deadline, time.monotonic() + grace)
        for rank in ranks:
            rank.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
    return codes


@pytest.fixture(scope="session")
def run_ranks(start_ranks) -> Start:
    """`start_ranks` of ranks that must all end well; fails with what they printed if one does not."""

    def run(world: int, file: str | Path, function: str, *arguments: object, timeout: float = 300.0) -> None:
        ranks = start_ranks(world, file, function, *arguments, timeout=timeout)
        if any(rank.code != 0 for rank in ranks):
            late = any(rank.code is None for rank in ranks)
            text = "\n".join(
                f"--- rank {number}, exit code {rank.code}\n{(rank.out + rank.err)[-4000:]}"
                for number, rank in enumerate(ranks)
            )
            pytest.fail(f"{function} in {world} ranks {'took too long' if late else 'failed'}\n{text}", pytrace=False)

    return run


@pytest.fixture(scope="session")
def tiny(tiny):
    """Overrides of a run that takes a second and writes no checkpoint before its end."""
    return [*tiny, "trainer.steps=3", "trainer.checkpoint_every=0"]


@pytest.fixture(scope="module")
def failures(request, run_ranks, tmp_path_factory) -> Callable[[int], list[dict[str, str]]]:
    """`failures(world)[rank]`: tracebacks by name of the case, that `run_all(folder)` of the test file wrote as JSON.

    Each world is started once.
    """
    found: dict[int, list[dict[str, str]]] = {}

    def of(world: int) -> list[dict[str, str]]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            run_ranks(world, request.path, "run_all", folder)
            found[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        return found[world]

    return of
