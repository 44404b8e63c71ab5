"""Collectives and errors over two real processes."""

import os
import sys

import pytest
import torch
import torch.distributed as dist

from scatterfold.kernels import DataError
from scatterfold.parallel.process import barrier, broadcast, running, sum_over_ranks, together


def two_ranks():
    with running("cpu", timeout_s=60) as process:
        assert (process.rank, process.world) == (int(os.environ["RANK"]), 2)
        assert process.is_main is (process.rank == 0)
        tensor = torch.tensor([1.0, 10.0]) * (process.rank + 1)
        assert sum_over_ranks(tensor).tolist() == [3.0, 30.0]
        assert broadcast({"from": process.rank}) == {"from": 0}
        barrier()
        assert together(lambda: process.rank) == process.rank
        for failing in (0, 1):

            def fail(on=failing):
                if process.rank == on:
                    raise DataError("the corpus is broken")
                return process.rank

            with pytest.raises(DataError, match="^the corpus is broken$"):
                together(fail)

        def bug():
            if process.rank == 1:
                raise KeyError("x")

        with pytest.raises(KeyError if process.rank == 1 else RuntimeError, match="x"):
            together(bug)
    assert not dist.is_initialized()


def one_rank_fails():
    """An error inside of `running` leaves no group behind; the other rank, left waiting, fails soon as well."""
    with pytest.raises((ZeroDivisionError, RuntimeError)), running("cpu", timeout_s=60) as process:
        if process.rank == 1:
            raise ZeroDivisionError
        barrier()
    assert not dist.is_initialized()


@pytest.mark.distributed
@pytest.mark.parametrize("function", ["two_ranks", "one_rank_fails"])
def test_two_processes(run_ranks, function):
    run_ranks(2, __file__, function)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
