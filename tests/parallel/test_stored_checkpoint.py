"""Checkpoints as lazy tensors: what several ranks wrote in pieces reads as wholes, and in any other pieces."""

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from scatterfold.kernels import CheckpointError
from scatterfold.parallel import Process
from scatterfold.parallel.checkpoint import Checkpointer, open_checkpoint
from scatterfold.parallel.checkpoint.chunks import Rows
from scatterfold.parallel.checkpoint.distributed import open_distributed
from scatterfold.parallel.checkpoint.index import SafeReader, read_index

WORLD = 4


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


STATE = {
    "experts": (numbers(8, 6, 5, seed=1), [Shard(0), Shard(1)]),
    "uneven": (numbers(7, 4, seed=2), [Shard(0), Replicate()]),  # 4 and 3 rows
    "bf16": (numbers(6, 8, seed=3, dtype=torch.bfloat16), [Replicate(), Shard(1)]),
    "transposed": (numbers(8, 6, seed=4).t(), None),  # rows do not lie one after the other
    "float8": (numbers(4, 4, seed=5).to(torch.float8_e4m3fn), [Shard(0), Replicate()]),
    "same everywhere": (numbers(3, 2, seed=6), None),
    "step": (torch.tensor(17.0), None),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that DCP's writer filled for four ranks, one after the other in this process."""
    folder = tmp_path_factory.mktemp("written")
    planners, plans = [], []
    for rank in range(WORLD):
        dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
        mesh = init_device_mesh("cpu", (2, 2))
        state = {
            name: tensor if cut is None else distribute_tensor(tensor, mesh, cut, src_data_rank=None)
            for name, (tensor, cut) in STATE.items()
        }
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
        planners.append(planner)
        dist.destroy_process_group()
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planners[0].create_global_plan(plans)
    results = []
    for planner, plan in zip(planners, writer.prepare_global_plan(plans)):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writer.finish(metadata, results)
    return folder


def opened(folder):
    return open_distributed(folder, read_index(folder), SafeReader(folder))


def test_the_folder_holds_pieces_of_several_ranks(written):
    entries = read_index(written).state_dict_metadata
    assert {name: len(entry.chunks) for name, entry in entries.items()} == {
        **{"experts": 4, "uneven": 2, "bf16": 2, "transposed": 1, "float8": 2, "same everywhere": 1, "step": 1}
    }
    assert len(list(written.glob("*.distcp"))) == WORLD


@pytest.mark.parametrize("name", STATE)
def test_whole_and_in_any_parts(written, name):
    tensor, (expected, _) = opened(written)[name], STATE[name]
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(tensor.read().float(), expected.float())  # torch compares no float8
    rng = random.Random(name)
    for _ in range(30):
        starts = [rng.randint(0, size) for size in expected.shape]
        index = tuple(slice(start, rng.randint(start, size)) for start, size in zip(starts, expected.shape))
        part = tensor.read(index)
        assert part.dtype == expected.dtype and torch.equal(part.float(), expected[index].float()), index


def test_rows_that_are_not_wanted_are_not_read(written, monkeypatch):
    reads, read = [], Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, file, rows: reads.append(rows) or read(self, file, rows))
    tensor = opened(written)["experts"]
    tensor.read([slice(5, 6), slice(0, 6), slice(0, 5)])
    assert reads == [slice(1, 2)] * 2  # the second row of the two pieces that hold expert 5
    reads.clear()
    tensor.read([slice(3, 5), slice(0, 2), slice(0, 5)])
    assert reads == [slice(3, 4), slice(0, 1)]
    reads.clear()
    assert torch.equal(opened(written)["transposed"].read(), STATE["transposed"][0]) and not reads


def test_names_begin_with_their_kind(written):
    index, reader = read_index(written), SafeReader(written)
    assert list(open_distributed(written, index, reader, "exp")) == ["erts"]


@pytest.mark.parametrize("name", ["experts", "transposed", "step"])
def test_a_file_that_ends_too_early_is_named(written, tmp_path, name):
    for file in written.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content if file.name == ".metadata" else content[: len(content) // 20])
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: {name} cannot be read: ") as caught:
        opened(tmp_path)[name].read()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_opened_by_kind_after_comparing_its_checksums(tmp_path):
    state = {"model.w": numbers(3, 4), "optimizer.w.exp_avg": numbers(3, 4, seed=1)}
    Checkpointer(tmp_path, process=Process()).save(1, state, {})
    step = tmp_path / "step-1"
    for kind, name in (("model.", "w"), ("optimizer.", "w.exp_avg")):
        (found,) = open_checkpoint(step, kind).items()
        assert found[0] == name and torch.equal(found[1].read(), state[kind + name])
    file = next(step.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: its checksum is"):
        open_checkpoint(step, "model.")
    assert open_checkpoint(step, "model.", checked=False).keys() == {"w"}
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} has {len(content) - 1} bytes, expected {len(content)}"):
        open_checkpoint(step, "model.", checked=False)
