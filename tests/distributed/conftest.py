"""Real processes over gloo, started as torchrun starts them."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
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


# Imports what ranks need once and forks them: imports would take most of a rank's time. One line of JSON is one job.
NURSERY = """
import json, os, runpy, sys, traceback

import torch
import torch.distributed.fsdp, torch.distributed.tensor.parallel
import scatterfold.moe.training.run

torch.set_num_threads(1)

def live(job, rank):
    os.environ.clear()
    os.environ.update(job["environments"][rank])
    log = os.open(job["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = job["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(len(job["logs"])):
        child = os.fork()
        if child == 0:
            code = live(job, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@pytest.fixture(scope="session")
def nursery():
    """The process that forks ranks, for all modules that this worker runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # a line is read when it is waited for, and no further
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def run_ranks(nursery, tmp_path_factory) -> Start:
    """`run_ranks(world, file, function, *arguments)`: call a function of a test file in every rank, and wait.

    The file ends with `if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])`. Fails with what the ranks
    printed if one of them fails or they take longer than `timeout` seconds.
    """

    def run(world: int, file: str | Path, function: str, *arguments: object, timeout: float = 300.0) -> None:
        folder, port = tmp_path_factory.mktemp("ranks"), free_port()
        logs = [folder / f"{rank}.log" for rank in range(world)]
        job = {
            "argv": [str(file), function, *map(str, arguments)],
            "environments": [rank_environment(rank, world, port) for rank in range(world)],
            "logs": [str(log) for log in logs],
        }
        nursery.stdin.write(json.dumps(job).encode() + b"\n")
        ranks = json.loads(nursery.stdout.readline())
        late = not select.select([nursery.stdout], [], [], timeout)[0]
        for rank in ranks if late else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        codes = json.loads(nursery.stdout.readline())
        if late or any(codes):
            text = "\n".join(
                f"--- rank {rank}, exit code {codes[rank]}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs)
            )
            pytest.fail(f"{function} in {world} ranks {'took too long' if late else 'failed'}\n{text}", pytrace=False)

    return run
