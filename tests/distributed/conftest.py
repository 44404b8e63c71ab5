"""Real processes over gloo, started as torchrun starts them."""

import contextlib
import json
import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
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
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in ((1, job["out"][rank]), (2, job["err"][rank])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
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
    job, ranks = json.loads(line), {}
    for rank in range(len(job["out"])):
        child = os.fork()
        if child == 0:
            code = live(job, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks[child] = rank
    print(json.dumps(list(ranks)), flush=True)
    for _ in list(ranks):
        child, status = os.wait()
        print(json.dumps([ranks[child], os.waitstatus_to_exitcode(status)]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, None if it had to be killed, and what it printed."""

    code: int | None
    out: str
    err: str


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
def start_ranks(nursery, tmp_path_factory) -> Callable[..., list[Ended]]:
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
        out, err = ([folder / f"{rank}.{stream}" for rank in range(world)] for stream in ("out", "err"))
        job = {
            "argv": [str(file), function, *map(str, arguments)],
            "environments": [rank_environment(rank, world, port) for rank in range(world)],
            "out": [str(path) for path in out],
            "err": [str(path) for path in err],
        }
        nursery.stdin.write(json.dumps(job).encode() + b"\n")
        children = json.loads(nursery.stdout.readline())
        deadline, codes = time.monotonic() + timeout, {}
        while len(codes) < world:
            if select.select([nursery.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                rank, code = json.loads(nursery.stdout.readline())
                codes.setdefault(rank, code)
                if rank == 0:
                    deadline = min(deadline, time.monotonic() + grace)
                continue
            late = [rank for rank in range(world) if rank not in codes]
            for rank in late:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(children[rank], signal.SIGKILL)
                codes[rank] = None
            for _ in late:
                nursery.stdout.readline()
        return [Ended(codes[rank], out[rank].read_text(), err[rank].read_text()) for rank in range(world)]

    return start


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Overrides of a run that takes a second."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120)))
    return [
        *(
            "model=tiny",
            "model.layers=1",
            "model.width=16",
            "model.heads=2",
            "model.kv_heads=1",
            "model.head_width=null",
        ),
        *("model.ffn_width=16", "model.expert_width=16", "model.num_experts=4", f"data.path={folder}"),
        *(f"data.cache_dir={folder.parent / 'cache'}", "data.sequence_length=32", "data.global_batch_size=4"),
        *("trainer.steps=3", "trainer.eval_every=0", "trainer.checkpoint_every=0", "trainer.report=false"),
        *("trainer.device=cpu", "schedule.warmup_steps=1"),
    ]


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
