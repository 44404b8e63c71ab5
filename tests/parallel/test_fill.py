"""A live state filled from lazy tensors: every rank reads its own part, and nothing when something does not fit."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from scatterfold.kernels import CheckpointError
from scatterfold.parallel.checkpoint import LazyTensor, fill, model_state
from scatterfold.parallel.checkpoint.lazy import in_memory
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.process import Process

SOURCE = Path("some/folder")
WHOLE = {
    "w": torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1)),
    "b": torch.randn(7, generator=torch.Generator().manual_seed(2)),
    "count": torch.tensor(3, dtype=torch.int64),
}


def recorded(tensors):
    """The same tensors, and the part that was read of each by name."""
    parts = {}

    def lazily(name, tensor):
        def fetch(index):
            parts[name] = tuple((cut.start, cut.stop) for cut in index)
            return tensor[index].clone()

        return LazyTensor(tensor.shape, tensor.dtype, fetch)

    return {name: lazily(name, tensor) for name, tensor in tensors.items()}, parts


def test_plain_tensors_are_read_whole_into_the_memory_that_they_have():
    state = {"w": torch.zeros(5, 6, 4, dtype=torch.bfloat16), "b": torch.zeros(7), "count": torch.tensor(0)}
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    fill(state, {name: in_memory(tensor) for name, tensor in WHOLE.items()}, SOURCE)
    for name, tensor in state.items():
        assert torch.equal(tensor, WHOLE[name].to(tensor.dtype)) and tensor.data_ptr() == places[name]


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), [Shard(0)]),  # 5 rows over 4 ranks: two each, the last rank has none
        ((4,), [Shard(2)]),
        ((4,), [Replicate()]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(1)]),
        ((2, 2), [Shard(1), Shard(1)]),
    ],
    ids=str,
)
def test_a_rank_reads_its_own_part_and_no_more(monkeypatch, rank, shape, placements):
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", shape)
        live = distribute_tensor(torch.zeros_like(WHOLE["w"]), mesh, placements, src_data_rank=None)
        expected = distribute_tensor(WHOLE["w"], mesh, placements, src_data_rank=None).to_local()
        # A group that only pretends to communicate cannot tell the others what went wrong.
        monkeypatch.setattr(importlib.import_module(fill.__module__), "together", lambda action: action())
        tensors, parts = recorded({"w": WHOLE["w"]})
        fill({"w": live}, tensors, SOURCE)
        assert torch.equal(live.to_local(), expected)
        assert tuple(stop - start for start, stop in parts["w"]) == tuple(expected.shape)
    finally:
        dist.destroy_process_group()


def test_what_other_ranks_hold_is_not_read():
    tensors, parts = recorded(WHOLE)
    state = {"b": torch.zeros(7)}
    fill(state, tensors, SOURCE, elsewhere={"w", "count"})
    assert parts == {"b": ((0, 7),)} and torch.equal(state["b"], WHOLE["b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(5, 6)}, r"w is \(5, 6\) there and \(5, 6, 4\) here"),
        ({"w": torch.zeros(1), "b": torch.zeros(1)}, r"w is \(1,\) there and \(5, 6, 4\) here \(1 more differ\)"),
        ({"b": None}, "1 missing there, first b"),
        ({"extra": torch.zeros(1)}, "1 unknown here, first extra"),
        ({"b": None, "bias": torch.zeros(7)}, "1 missing there, first b; 1 unknown here, first bias"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, message):
    held = {name: tensor for name, tensor in {**WHOLE, **change}.items() if tensor is not None}
    tensors, parts = recorded(held)
    state = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    with pytest.raises(CheckpointError, match=f"^some/folder is of another model: {message}$"):
        fill(state, tensors, SOURCE)
    assert not parts and not any(tensor.any() for tensor in state.values())


def test_an_engine_takes_weights_and_what_an_optimizer_remembers_from_anywhere():
    trained, fresh = make_engine(0), make_engine(1)
    for _ in range(3):
        trained.run([{"x": torch.ones(2, 3)}], 1.0)
        trained.step()
        trained.zero_grad()
    lazily = {name: in_memory(tensor) for name, tensor in trained.state_dict().items()}
    weights = {name.removeprefix("model."): tensor for name, tensor in lazily.items() if name.startswith("model.")}
    memory = {
        name.removeprefix("optimizer."): tensor for name, tensor in lazily.items() if name.startswith("optimizer.")
    }
    assert set(memory) == {f"linear.{part}.{what}" for part in ("weight", "bias") for what in OF_ADAM}
    with pytest.raises(CheckpointError, match="1 missing there, first linear.bias.exp_avg"):
        fresh.load_optimizer({name: memory[name] for name in memory if name != "linear.bias.exp_avg"}, SOURCE)
    assert not fresh.optimizer.state  # as before
    fresh.load_weights(weights, SOURCE)
    assert not fresh.optimizer.state
    fresh.load_optimizer(memory, SOURCE)
    for engine in (trained, fresh):
        engine.run([{"x": torch.full((2, 3), 2.0)}], 1.0)
        engine.step()
    expected = model_state(*trained.parts)
    for name, tensor in model_state(*fresh.parts).items():
        assert torch.equal(tensor, expected[name]), name


OF_ADAM = ("step", "exp_avg", "exp_avg_sq")


class Loss(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x).square().sum()


def make_engine(seed):
    return TorchEngine().prepare(Loss(seed), lambda model: torch.optim.Adam(model.parameters()), process=Process())
