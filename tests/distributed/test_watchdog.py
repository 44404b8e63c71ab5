"""A rank that stands still is named, whether it computes for ever, is stopped, or waits in another collective."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from scatterfold.parallel.communication.watchdog import Watchdog
from scatterfold.parallel.process import running

pytestmark = pytest.mark.distributed

TIMEOUT_S = 2.0


def computes_for_ever(rank):
    if rank == 1:
        while True:
            time.sleep(0.1)
    dist.all_reduce(torch.zeros(1))


def is_stopped(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))


def waits_elsewhere(rank):
    if rank == 1:
        dist.all_reduce(torch.zeros(1), group=OTHER)
    dist.all_reduce(torch.zeros(1))


def gets_on(rank):
    for _ in range(4):
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.3 * TIMEOUT_S)
        WATCHDOG.alive()


def begins_slowly(rank):
    time.sleep(2 * TIMEOUT_S)
    WATCHDOG.alive()
    computes_for_ever(rank)


def worker(action):
    global OTHER, WATCHDOG
    with running("cpu", timeout_s=60) as process:
        OTHER = dist.new_group()
        first_s = 10 * TIMEOUT_S if action == "begins_slowly" else 0.0
        with Watchdog(process, TIMEOUT_S, tell=print, first_s=first_s) as WATCHDOG:
            dist.barrier()
            WATCHDOG.alive()
            globals()[action](process.rank)


@pytest.fixture
def start(start_ranks):
    """`start(action) -> [(exit code or None if it had to be killed, stdout, stderr)]` of two ranks."""

    def start(action):
        ranks = start_ranks(2, __file__, "worker", action, timeout=60.0, grace=5.0)
        return [(rank.code, rank.out, rank.err) for rank in ranks]

    return start


def test_a_rank_that_computes_for_ever_is_named_with_its_line_and_stack(start):
    (code, said, _), (other, _, stack) = start("computes_for_ever")
    assert code == 1 and other == 1
    assert said.count("\n") == 1
    assert "rank 1 hangs at" in said and "(computes_for_ever)" in said and "test_watchdog.py" in said
    assert "rank 0 waits in all_reduce" in said
    assert "time.sleep(0.1)" in stack


def test_the_first_step_may_take_longer_and_no_other(start):
    (code, said, _), (other, _, _) = start("begins_slowly")
    assert code == 1 and other == 1
    assert "rank 1 hangs at" in said and "(computes_for_ever)" in said and "rank 0 waits in all_reduce" in said


def test_a_stopped_rank_is_named_by_its_silence(start):
    (code, said, _), (other, _, _) = start("is_stopped")
    assert code == 1 and other is None
    assert "rank 1 gives no sign of life" in said and "rank 0 waits in all_reduce" in said


def test_ranks_in_different_collectives_are_all_named(start):
    (code, said, _), (other, _, _) = start("waits_elsewhere")
    assert code == 1 and other == 1
    assert "rank 0 waits in all_reduce" in said and "rank 1 waits in all_reduce" in said
    assert said.count("(waits_elsewhere)") == 2


def test_ranks_that_get_on_are_left_alone(start):
    assert [(code, said) for code, said, _ in start("gets_on")] == [(0, ""), (0, "")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
