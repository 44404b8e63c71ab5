"""One process alone: every collective is a no-op, and a wrong environment is said in one line."""

import pytest
import torch

from scatterfold.kernels import ConfigError, DataError
from scatterfold.parallel import process
from scatterfold.parallel.process import barrier, broadcast, running, start, stop, sum_over_ranks, together

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_alone(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    with running("cpu") as here:
        assert (here.rank, here.local_rank, here.world, here.device) == (0, 0, 1, torch.device("cpu"))
        assert here.is_main
        assert not torch.distributed.is_initialized()
        tensor = torch.ones(2)
        assert sum_over_ranks(tensor) is tensor
        value = object()
        assert broadcast(value) is value
        barrier()
        assert together(lambda: 3) == 3
    assert torch.get_num_threads() == threads
    stop()


def test_together_alone_raises_what_the_action_raised():
    with pytest.raises(DataError, match="broken"):
        together(lambda: (_ for _ in ()).throw(DataError("broken")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(ConfigError, match="trainer.device='cuda' needs a CUDA device .* allowed: auto, cpu"):
        start("cuda")
    assert start("auto").device.type == "cpu"


def test_cuda_devices_by_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process._choose_device("auto", 1) == torch.device("cuda", 1)
    assert process._choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="local rank 2 has no CUDA device of its own, this machine shows 2"):
        process._choose_device("cuda", 2)


def test_unknown_device():
    with pytest.raises(ConfigError, match="trainer.device='tpu' is unknown, allowed: auto, cpu, cuda"):
        start("tpu")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=2 but no MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', allowed: a whole number of 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0', allowed: a whole number of 1 or more"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            r"RANK=2, allowed: 0 to 1 \(WORLD_SIZE=2\)",
        ),
    ],
)
def test_incomplete_environment(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start("cpu")


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)])
def test_usable_cores_respect_the_quota(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(process.Path, "read_text", lambda self: quota)
    assert process.usable_cores() == cores


@pytest.mark.parametrize(("variable", "threads"), [(None, 4), ("1", 4), ("3", None)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, variable, threads):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(process, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    process._share_cores(2)
    assert asked == ([threads] if threads else [])
