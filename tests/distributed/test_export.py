"""Exports of checkpoints that several ranks wrote, and exports that several ranks read."""

import json
import sys
from pathlib import Path

import pytest
import torch

from scatterfold.moe.interop import export_safetensors
from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train

pytestmark = pytest.mark.distributed

CUT = {"dp_shard": 2, "ep": 2}


def train_cut(file):
    """One rank: a run, then an export of it by the first rank, then a new run that begins with the export."""
    import os

    from scatterfold.parallel.process import running

    config, run_dir = json.loads(Path(file).read_text()), Path(file).parent
    ports = json.loads((run_dir / "ports.json").read_text())
    os.environ["MASTER_PORT"] = str(ports[0])  # each training meets at a place of its own
    train(config, run_dir / "run")
    os.environ["MASTER_PORT"] = str(ports[1])
    with running("cpu") as process:
        if process.is_main:
            export_safetensors(run_dir / "run", run_dir / "export", max_shard_bytes=8000)
        torch.distributed.barrier()
    os.environ["MASTER_PORT"] = str(ports[2])
    config["seed"], config["init_from"] = 7, str(run_dir / "export")
    config["optimizer"]["lr"], config["router"]["bias_rate"], config["trainer"]["steps"] = 1e-9, 0.0, 1
    train(config, run_dir / "begun")


@pytest.fixture(scope="module")
def folder(run_ranks, choose_port, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
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
    run_ranks(2, __file__, "train_cut", folder / "config.json")
    return folder


def test_the_export_of_a_cut_model_holds_what_torch_reads(folder):
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    checkpoint = folder / "run" / "checkpoints" / "step-3"
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert any(len(entry.chunks) == 2 for name, entry in saved.items() if ".experts." in name)
    expected = {name: torch.empty(entry.size) for name, entry in saved.items() if name.startswith("model.")}
    dcp_load(expected, checkpoint_id=checkpoint, no_dist=True)
    files = sorted((folder / "export").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1 and {f"model.{name}" for name in found} == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[f"model.{name}"]), name


def test_ranks_begin_with_an_export_each_with_its_part(folder):
    begun = load_model(folder / "begun").model.state_dict()
    for name, tensor in load_model(folder / "run").model.state_dict().items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-7)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
