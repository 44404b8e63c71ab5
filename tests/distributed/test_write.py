"""Models that several ranks write together, from checkpoints that they wrote in pieces."""

import filecmp
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scatterfold.kernels import InputError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop import StoredModel, open_model, write_model
from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train
from scatterfold.parallel.checkpoint.lazy import LazyTensor, in_memory
from scatterfold.parallel.process import barrier, place, running

pytestmark = pytest.mark.distributed

CUT = {"dp_shard": 2, "ep": 2}
FORMATS = ("scatterfold", "huggingface", "megatron")
MOST = 8000  # bytes in a file, so that there are several for each rank


def mixture():
    """A model in memory that every format can hold, the same on every rank."""
    config = {
        "model": {"vocab_size": 61, "layers": 2, "width": 16, "heads": 4, "head_width": 4, "expert_width": 12},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "renormalise": True},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    config["model"]["num_experts"] = 4
    model = ModelPlan.from_config(config).make_model()
    model.reset_parameters(3)
    tensors = {name: in_memory(tensor.detach()) for name, tensor in model.state_dict().items()}
    return StoredModel(Path("memory"), "checkpoint", config, tensors)


def train_and_write(file):
    """One rank: a run, then its model and another written by both ranks, then what goes wrong on one of them."""
    config, folder = json.loads(Path(file).read_text()), Path(file).parent
    ports = iter(json.loads((folder / "ports.json").read_text()))
    os.environ["MASTER_PORT"] = str(next(ports))  # each process group meets at a place of its own
    train(config, folder / "run")
    os.environ["MASTER_PORT"] = str(next(ports))
    with running("cpu"):
        write_model(open_model(folder / "run"), folder / "two" / "run", max_shard_bytes=MOST)
        for to in FORMATS:
            write_model(mixture(), folder / "two" / to, to, max_shard_bytes=MOST)
        fail(folder)
    os.environ["MASTER_PORT"] = str(next(ports))
    config["seed"], config["init_from"] = 7, str(folder / "two" / "run")
    config["optimizer"]["lr"], config["router"]["bias_rate"], config["trainer"]["steps"] = 1e-9, 0.0, 1
    train(config, folder / "begun")


def fail(folder):
    """What breaks on one rank alone is the error of both, and nothing stays."""
    rank, _ = place()
    found = {}
    for name, error in (("input", InputError("memory: head.weight is gone")), ("disk", OSError(28, "No space left"))):

        def broken(index, error=error):
            if rank == 1:
                raise error
            return torch.zeros([cut.stop - cut.start for cut in index])

        stored = mixture()
        tensors = {key: LazyTensor(tensor.shape, tensor.dtype, broken) for key, tensor in stored.tensors.items()}
        try:
            write_model(replace(stored, tensors=tensors), folder / "new" / name, max_shard_bytes=MOST)
        except InputError as raised:
            found[name] = str(raised)
        barrier()
        found[f"{name} left"] = (folder / "new").exists()
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "file").write_text("")
    try:
        write_model(mixture(), folder / "full")
    except InputError as raised:
        found["full"] = str(raised)
    (folder / f"failures {rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(run_ranks, choose_port, tmp_path_factory):
    folder = tmp_path_factory.mktemp("write")
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120))
        (folder / "corpus" / f"{number:02d}.txt").write_text(text)
    config = {
        "seed": 0,
        "model": {"layers": 2, "width": 16, "heads": 2, "expert_width": 16, "num_experts": 4},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "bias_rate": 0.013},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {
            "path": str(folder / "corpus"),
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 1},
        "trainer": {"steps": 3, "checkpoint_every": 0, "eval_every": 0, "report": False, "device": "cpu"},
        "logger": {"display": "none"},
        "layout": CUT,
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ports.json").write_text(json.dumps([choose_port() for _ in range(3)]))
    run_ranks(2, __file__, "train_and_write", folder / "config.json")
    return folder


def test_the_model_of_a_cut_run_is_what_torch_reads(folder):
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    checkpoint = folder / "run" / "checkpoints" / "step-3"
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert any(len(entry.chunks) == 2 for name, entry in saved.items() if ".experts." in name)
    for kind in ("model", "optimizer"):
        names = [name for name in saved if name.startswith(f"{kind}.")]
        expected = {name: torch.empty(saved[name].size) for name in names}
        dcp_load(expected, checkpoint_id=checkpoint, no_dist=True)
        files = sorted((folder / "two" / "run").glob(f"{kind}*.safetensors"))
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert len(files) > 1 and {f"{kind}.{name}" for name in found} == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[f"{kind}.{name}"]), name


@pytest.mark.parametrize("to", FORMATS)
def test_two_ranks_write_the_bytes_that_one_writes(folder, tmp_path, to):
    write_model(mixture(), tmp_path / "one", to, max_shard_bytes=MOST)
    assert_same_files(tmp_path / "one", folder / "two" / to)


def test_two_ranks_read_and_write_a_run_as_one_does(folder, tmp_path):
    write_model(open_model(folder / "run"), tmp_path / "one", max_shard_bytes=MOST)
    assert_same_files(tmp_path / "one", folder / "two" / "run")


def assert_same_files(one, other):
    names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    assert len(names) > 2
    _, different, unread = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not different and not unread


def test_what_goes_wrong_on_one_rank_is_the_error_of_all(folder):
    of_rank = [json.loads((folder / f"failures {rank}.json").read_text()) for rank in range(2)]
    assert of_rank[0] == of_rank[1]
    assert of_rank[0]["input"] == "memory: head.weight is gone"
    assert f"output={folder}/new/disk cannot be written (No space left), allowed" in of_rank[0]["disk"]
    assert f"output={folder}/full is not empty" in of_rank[0]["full"]
    assert not of_rank[0]["input left"] and not of_rank[0]["disk left"]
    assert {path.name for path in (folder / "two").iterdir()} == {"run", *FORMATS}


def test_ranks_begin_with_what_was_written_each_with_its_part(folder):
    begun = load_model(folder / "begun").model.state_dict()
    for name, tensor in load_model(folder / "run").model.state_dict().items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-7)


def convert(*words):
    """One rank of `scatterfold convert` under torchrun; leaves with its exit code."""
    from scatterfold.tools.convert import main

    sys.exit(main(words))


def test_the_command_says_once_what_it_did_and_what_is_wrong(folder, start_ranks, tmp_path):
    words = [f"source={folder / 'two' / 'scatterfold'}", f"output={tmp_path / 'out'}", "to=huggingface"]
    words += [f"max_shard_bytes={MOST}", f"json={tmp_path / 'receipt.json'}"]
    done = start_ranks(2, __file__, "convert", *words)
    assert [rank.code for rank in done] == [0, 0]
    assert f"{tmp_path / 'out'}, huggingface" in done[0].out and not done[1].out
    held = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(held) > 2 and set(json.loads((tmp_path / "receipt.json").read_text())["files"]) == held
    refused = start_ranks(2, __file__, "convert", *words)
    assert [rank.code for rank in refused] == [2, 2]
    assert refused[0].err.startswith(f"scatterfold: output={tmp_path / 'out'} is not empty, allowed: ")
    assert len(refused[0].err.splitlines()) == 1 and not refused[1].err


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
