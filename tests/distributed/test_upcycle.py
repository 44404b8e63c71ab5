"""Two ranks upcycle a model together, to the bytes that one process writes."""

import filecmp
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop import StoredModel, write_model
from scatterfold.parallel.checkpoint.lazy import in_memory
from scatterfold.tools.upcycle import main

pytestmark = pytest.mark.distributed

CASES = {
    "drop": ["method=drop", "indices=per_matrix"],
    "noise": ["method=noise", "to=huggingface"],
    "cut": ["method=fine_grained", "granularity=2", "shuffle=true", "optimizer=carry"],
}


def dense(path):
    """A dense model in memory with AdamW's state."""
    config = {
        "model": {"vocab_size": 61, "layers": 2, "width": 16, "heads": 4, "ffn_width": 24, "qk_norm": "head"},
        "router": {},
        "experts": {},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    model = ModelPlan.from_config(config).make_model()
    model.reset_parameters(3)
    tensors = {name: in_memory(tensor.detach()) for name, tensor in model.state_dict().items()}
    state = {f"{name}.exp_avg": tensor for name, tensor in tensors.items()}
    state |= {f"{name}.exp_avg_sq": tensor for name, tensor in tensors.items()}
    state |= {f"{name}.step": in_memory(tensor.read().sum() * 0 + 7) for name, tensor in tensors.items()}
    write_model(replace(StoredModel(Path("memory"), "checkpoint", config, tensors), optimizer=state), path)


def upcycle_together(folder, ports):
    for name, words in CASES.items():
        os.environ["MASTER_PORT"] = ports.split(",")[list(CASES).index(name)]
        assert main([f"source={folder}/dense", f"output={folder}/two/{name}", "max_shard_bytes=8000", *words]) == 0


@pytest.fixture(scope="module")
def folder(run_ranks, choose_port, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycle")
    dense(folder / "dense")
    run_ranks(2, __file__, "upcycle_together", folder, ",".join(str(choose_port()) for _ in CASES))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_write_the_bytes_that_one_writes(folder, tmp_path, name):
    words = [f"source={folder}/dense", f"output={tmp_path}/one", "max_shard_bytes=8000", *CASES[name]]
    assert main(words) == 0
    one, two = tmp_path / "one", folder / "two" / name
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in two.iterdir()} and len(files) > 3
    _, different, unread = filecmp.cmpfiles(one, two, files, shallow=False)
    assert not different and not unread


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
