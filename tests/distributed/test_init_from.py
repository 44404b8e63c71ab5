"""A run that begins with a model of any format learns in every layout what it learns in one process."""

import json
import os
import sys
from pathlib import Path

import pytest

from scatterfold.kernels import CheckpointError
from scatterfold.moe.interop import open_model, write_model
from scatterfold.moe.training.run import train

pytestmark = pytest.mark.distributed

LAYOUTS = {"dp_shard": {"dp_shard": 2}, "ep": {"ep": 2}, "pp": {"pp": 2}}
# Of the run itself what its optimizer remembers too.
SOURCES = {"huggingface": {}, "scatterfold": {"init_optimizer": True}, "run": {"init_optimizer": True}}
CUT = ("huggingface", "run")  # what ranks read
STEPS = 2


def configuration(folder, **changes):
    return {
        "seed": 5,
        "model": {"layers": 2, "width": 16, "heads": 2, "head_width": 8, "expert_width": 16, "num_experts": 4},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "balance_micro_batch": 0.0},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {
            "path": str(folder / "corpus"),
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 1},
        "trainer": {"steps": STEPS, "checkpoint_every": 0, "eval_every": 0, "report": False, "device": "cpu"},
        "logger": {"display": "none"},
        "layout": {},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
        **changes,
    }


def begin(folder, source, name, layout):
    config = configuration(folder, init_from=str(folder / source), layout=layout, **SOURCES[source])
    train(config, folder / f"{source} {name}")


def train_cut(folder):
    """One of two ranks: every source in every layout, and what none of them may begin with."""
    folder = Path(folder)
    ports = iter(json.loads((folder / "ports.json").read_text()))
    for name, layout in LAYOUTS.items():
        for source in CUT:
            os.environ["MASTER_PORT"] = str(next(ports))  # each training meets at a place of its own
            begin(folder, source, name, layout)
    os.environ["MASTER_PORT"] = str(next(ports))
    config = configuration(folder, init_from=str(folder / "scatterfold"), layout=LAYOUTS["pp"])
    config["model"]["width"] = 32
    try:
        train(config, folder / "never")
    except CheckpointError as error:
        (folder / f"error {os.environ['RANK']}").write_text(str(error))


@pytest.fixture(scope="module")
def folder(run_ranks, choose_port, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init_from")
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120))
        (folder / "corpus" / f"{number:02d}.txt").write_text(text)
    train(configuration(folder, seed=0), folder / "run")
    for to in ("huggingface", "scatterfold"):
        write_model(open_model(folder / "run"), folder / to, to, max_shard_bytes=20_000)
    for source in SOURCES:
        begin(folder, source, "alone", {})
    (folder / "ports.json").write_text(json.dumps([choose_port() for _ in range(len(LAYOUTS) * len(CUT) + 1)]))
    run_ranks(2, __file__, "train_cut", folder)
    return folder


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("valid_loss")) for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", CUT)
def test_every_layout_begins_with_the_same_model(folder, source, layout):
    found = losses(folder / f"{source} {layout}")
    assert len(found) == STEPS + 1  # with the evaluation at the end
    assert found == pytest.approx(losses(folder / f"{source} alone"), rel=2e-5)


def test_what_the_optimizer_remembers_makes_a_difference_and_is_the_same_from_both(folder):
    """The first step has the same loss with and without it; the second, after an update that remembers, has not."""
    fresh, remembered = losses(folder / "huggingface alone"), losses(folder / "run alone")
    assert fresh[0] == pytest.approx(remembered[0], rel=1e-6)
    assert abs(fresh[1] - remembered[1]) > 1e-4
    assert losses(folder / "scatterfold alone") == remembered


def test_a_model_that_does_not_fit_is_the_same_line_on_every_rank_and_leaves_nothing(folder):
    """The ranks of a pipeline hold different tensors, and all of them are told of one that does not fit."""
    lines = [(folder / f"error {rank}").read_text() for rank in range(2)]
    assert lines[0] == lines[1] or all("is of another model: " in line for line in lines)
    assert all("\n" not in line and "16" in line and "32" in line for line in lines)
    assert not (folder / "never").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
