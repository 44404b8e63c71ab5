"""Two ranks that change the experts of a model write the bytes that one process writes."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.data import ByteTokenizer, PrepareSettings, prepare
from scatterfold.moe.interop.stored import StoredModel
from scatterfold.moe.interop.write import write_model
from scatterfold.moe.surgery import Grow, Job, Merge, Noise, Prune, operate
from scatterfold.parallel.checkpoint import model_state
from scatterfold.parallel.checkpoint.lazy import in_memory
from scatterfold.parallel.process import running

pytestmark = pytest.mark.distributed

OPERATIONS = {
    "prune": Prune(keep=3),
    "merge": Merge(experts=2, by="outputs", align=True),
    "grow": Grow(6, Noise(0.1, 0.1)),
    "wrong": Grow(3),
}


def run_all(folder):
    """The operations, in as many ranks as there are."""
    folder = Path(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    with running("cpu", timeout_s=60) as process:
        for name, operation in OPERATIONS.items():
            job = Job(folder / "source", folder / f"{name} of {process.world}", str(folder / "text"), tokens=128)
            job = replace(job, options=(("max_shard_bytes", 9000),))
            try:
                receipt = operate(job, operation)
                (folder / f"{name} of {process.world}, {process.rank}").write_text(str(receipt.measured))
            except Exception as error:
                (folder / f"{name} of {process.world}, {process.rank}").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("surgery")
    (folder / "text.txt").write_text("".join(f"line {i * 7919} of a text\n" for i in range(100)))
    prepare(PrepareSettings(source=(str(folder / "text.txt"),), output=str(folder / "text"), workers=1))
    config = {
        "model": {
            **{"vocab_size": 257, "layers": 2, "width": 16, "heads": 4, "expert_width": 12, "num_experts": 4},
            **{"max_positions": 32},
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    model = ModelPlan.from_config(config).make_model()
    model.reset_parameters(0)
    tensors = {name.removeprefix("model."): in_memory(tensor) for name, tensor in model_state(model).items()}
    write_model(StoredModel(Path("nowhere"), "scatterfold", config, tensors, ByteTokenizer()), folder / "source")
    for world in (1, 2):
        run_ranks(world, __file__, "run_all", folder)
    return folder


@pytest.mark.parametrize("name", ["prune", "merge", "grow"])
def test_two_ranks_write_what_one_process_writes(folder, name):
    one, two = (folder / f"{name} of {world}" for world in (1, 2))
    files = sorted(path.name for path in one.iterdir())
    assert len(files) > 3 and files == sorted(path.name for path in two.iterdir())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    receipts = {(folder / f"{name} of {world}, {rank}").read_text() for world, rank in ((1, 0), (2, 0), (2, 1))}
    assert len(receipts) == 1 and "largest_difference" in receipts.pop()


def test_both_ranks_have_the_same_error_and_leave_nothing(folder):
    said = {(folder / f"wrong of 2, {rank}").read_text() for rank in (0, 1)}
    assert said == {"experts=3 is out of range, allowed: 5 or more, for instance 8"}
    assert not (folder / "wrong of 2").exists() and not list(folder.glob(".*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
