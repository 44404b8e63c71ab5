"""A run that is killed twenty times while it saves goes on each time, and ends with the bits of a run that was not."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from scatterfold.moe.training.load import load_model

pytestmark = pytest.mark.distributed

KILLS, RANKS = 20, 2
STEPS = 4 * KILLS

# Forks the ranks of each run.
WORKER = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch
torch.set_num_threads(1)
from scatterfold.moe.training.run import train
from scatterfold.parallel.checkpoint import newest_checkpoint
import scatterfold.moe.data.indexed, megatron.core.datasets.gpt_dataset

def start(config, run_dir, port):
    ranks = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a rank says of the death of another
            try:
                train(config, Path(run_dir))
            except BaseException:
                os._exit(1)
            os._exit(0)
        ranks.append(child)
    return ranks

def wait(ranks):
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]

def saving(folder):
    return [path.name for path in folder.glob(".step-*") if not path.name.endswith(".removed")]

def kill_while_saving(ranks, folder, dice):
    "SIGKILL one rank or all, at a random moment after a save has begun; returns what was on the disk then."
    skip, seen = dice.randrange(3), set()
    while len(seen) <= skip:
        seen.update(saving(folder))
        if os.waitpid(ranks[0], os.WNOHANG) != (0, 0):
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.08))
    during = bool(saving(folder))
    first = dice.choice(ranks)
    os.kill(first, signal.SIGKILL)
    time.sleep(dice.choice([0, 0.05]))
    for rank in ranks:
        if rank != first:
            os.kill(rank, signal.SIGKILL)
    wait(ranks)
    newest = newest_checkpoint(folder)
    return {"during": during, "newest": newest.name if newest else None}

jobs = json.loads(Path(sys.argv[1]).read_text())
RANKS, dice = jobs["ranks"], random.Random(jobs["seed"])
config, ports = jobs["config"], iter(jobs["ports"])
whole = {**config, "trainer": {**config["trainer"], "checkpoint_every": 0}}  # saving must not change a bit either
assert wait(start(whole, jobs["whole"], next(ports))) == [0] * RANKS
kills = []
checkpoints = Path(jobs["killed"], "checkpoints")
for _ in range(jobs["kills"]):
    kills.append(kill_while_saving(start(config, jobs["killed"], next(ports)), checkpoints, dice))
last = wait(start(config, jobs["killed"], next(ports)))
print(json.dumps({"kills": kills, "last": last}))
"""


@pytest.fixture(scope="module")
def runs(warm_python, tmp_path_factory, choose_port):
    """A run that nobody disturbed, one that was killed again and again, and the record of its kills."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "text.txt").write_text(" ".join(f"word{i * i % 97}" for i in range(6000)))
    config = {
        "seed": 0,
        "model": {"layers": 2, "width": 16, "heads": 2, "expert_width": 16, "num_experts": 4},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "bias_rate": 0.001},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {
            "path": str(folder / "text.txt"),
            "sequence_length": 32,
            "global_batch_size": 4,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Constant", "warmup_steps": 2},
        "trainer": {
            "steps": STEPS,
            "checkpoint_every": 1,
            "eval_every": 0,
            "report": False,
            "device": "cpu",
            "asynchronous_checkpoints": True,
        },
        "logger": {"display": "none"},
        "layout": {"dp_shard": RANKS, "ep": RANKS},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    }
    (folder / "worker.py").write_text(WORKER)
    jobs = {
        "config": config,
        "ranks": RANKS,
        "seed": torch.seed() % 2**32,
        "kills": KILLS,
        "ports": [choose_port() for _ in range(KILLS + 2)],
        "whole": str(folder / "whole"),
        "killed": str(folder / "killed"),
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [warm_python, str(folder / "worker.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"seed {jobs['seed']}: {done.stdout}{done.stderr[-3000:]}"
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_kills_hit_saves_and_never_a_checkpoint_that_was_there(runs):
    _, record = runs
    assert len(record["kills"]) == KILLS
    assert sum(kill["during"] for kill in record["kills"]) >= KILLS // 4  # the others hit right after one
    steps = [int(kill["newest"].removeprefix("step-")) if kill["newest"] else 0 for kill in record["kills"]]
    assert steps == sorted(steps) and steps[-1] > 0


def test_the_killed_run_ends_with_the_very_same_bits(runs):
    folder, record = runs
    assert record["last"] == [0] * RANKS
    curves = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        for lines in (metrics(folder / "whole"), metrics(folder / "killed"))
    ]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
    expected = load_model(folder / "whole").model.state_dict()
    for name, value in load_model(folder / "killed").model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def metrics(run_dir: Path):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
