"""Runs over two processes under torchrun: the same curve as one process, and exact resume."""

import copy
import json
import subprocess

import pytest
import torch

from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train

pytestmark = pytest.mark.distributed

TIMES = {"tokens_per_second", "tflops", "step_seconds"}

WORKER = """
import json, os, signal, sys
from pathlib import Path
from scatterfold.moe.training import loop, run

def main():
    step = loop.Loop._step
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    for config, run_dir, action, port in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)  # each training meets at a place of its own
        def act_then_step(self, requested, action=action):
            if self.process.rank == 1 and self.progress.step == 5 and action != "none":
                os.kill(os.getpid(), getattr(signal, action))
            return step(self, requested)

        loop.Loop._step = act_then_step
        result = run.train(config, Path(run_dir))
        Path(f"{run_dir}.rank{os.environ['RANK']}").write_text(json.dumps([result.completed, result.step]))

main()
"""


@pytest.fixture(scope="module")
def torchrun(warm_python, choose_port):
    """`torchrun(folder, (config, run_dir, action), …)`: train one after the other in one launch over two processes.

    Rank 1 gets the signal `action` in step 5.
    """

    def run(folder, *jobs):
        (folder / "worker.py").write_text(WORKER)
        listed = [[config, str(run_dir), action, choose_port()] for config, run_dir, action in jobs]
        (folder / "jobs.json").write_text(json.dumps(listed))
        command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(folder / "worker.py"), str(folder / "jobs.json")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


def results(run_dir):
    return [json.loads(run_dir.with_name(f"{run_dir.name}.rank{rank}").read_text()) for rank in (0, 1)]


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert (one / "experts.jsonl").read_text() == (other / "experts.jsonl").read_text()
    expected = load_model(other).model.state_dict()
    for name, value in load_model(one).model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def assert_close_run(one, other):
    """The same lines within float32 rounding."""
    assert len(one) == len(other)
    tolerances = {"grad_norm": {"rel": 1e-3}, "experts/max_violation": {"abs": 0.05}}  # moved by single tokens
    close = ("loss", "lr", "valid_loss", "bits_per_byte", "train_bits_per_byte", "aux/z_loss")
    for mine, theirs in zip(one, other):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() & {"step", "tokens", "skipped_steps"}:
            assert mine[name] == theirs[name]
        for name in mine.keys() & {*close, *tolerances}:
            assert mine[name] == pytest.approx(theirs[name], **tolerances.get(name, {"rel": 1e-5})), (
                mine["step"],
                name,
            )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i * number}\n" for i in range(20)]
        (folder / f"{number:02d}.py").write_text("\n".join(lines))
    return {
        "seed": 0,
        "model": {"layers": 2, "width": 16, "heads": 2, "expert_width": 16, "num_experts": 4},
        "router": {
            "_target_": "scatterfold.moe.routers.TopKRouter",
            "top_k": 2,
            "bias_rate": 0.001,
            "balance_global_batch": 0.01,
            "balance_sequence": 0.01,
            "z_loss": 0.001,
        },
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {
            "path": str(folder),
            "sequence_length": 32,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "split": "97,3",
            "cache_dir": str(folder.parent / "cache"),
            "workers": 1,
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 2},
        "trainer": {
            "steps": 10,
            "checkpoint_every": 4,
            "eval_every": 5,
            "eval_batches": 2,
            "report": False,
            "device": "cpu",
        },
        "logger": {"display": "none", "expert_every": 2},
        "layout": {},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    }


@pytest.fixture(scope="module")
def sharded(config):
    return {**copy.deepcopy(config), "layout": {"dp_shard": 2}}


LAYOUTS = {
    "copies": {},
    "shards": {"dp_shard": 2},
    "tensor": {"tp": 2, "ep": 2},
    "context": {"cp": 2, "etp": 2},
    "pipeline": {"pp": 2},
}


@pytest.fixture(scope="module")
def runs(torchrun, config, tmp_path_factory):
    """One process; two in each layout; and two copies of which one is told to stop."""
    folder = tmp_path_factory.mktemp("runs")
    train(config, folder / "alone")
    done = torchrun(
        folder,
        *(({**config, "layout": layout}, folder / name, "none") for name, layout in LAYOUTS.items()),
        (config, folder / "stopped", "SIGTERM"),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_have_the_curve_of_one(runs, layout):
    assert results(runs / layout) == [[True, 10], [True, 10]]
    assert_close_run(metrics(runs / layout), metrics(runs / "alone"))
    expected = load_model(runs / "alone").model.state_dict()
    for name, value in load_model(runs / layout).model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_when_one_rank_is_told_to_stop_all_save_and_stop(runs, config):
    assert results(runs / "stopped") == [[False, 7], [False, 7]]
    assert (runs / "stopped" / "checkpoints" / "step-7").exists()


def test_killed_runs_of_two_processes_go_on_to_the_very_same_bits(torchrun, runs, config, sharded, tmp_path):
    killed = torchrun(tmp_path, (sharded, tmp_path / "killed", "SIGKILL"))
    assert killed.returncode != 0
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-4"]
    resumed = torchrun(tmp_path, (sharded, tmp_path / "killed", "none"), (config, runs / "stopped", "none"))
    assert resumed.returncode == 0, resumed.stderr
    assert results(tmp_path / "killed") == [[True, 10], [True, 10]]
    assert_same_run(tmp_path / "killed", runs / "shards")
    assert_same_run(runs / "stopped", runs / "copies")


def test_a_run_of_two_processes_goes_on_in_one(runs, config, tmp_path):
    """The checkpoint of another layout, and the data where it was."""
    resumed = {**config, "resume": str(runs / "shards" / "checkpoints" / "step-8")}
    train(resumed, tmp_path)
    assert_close_run(metrics(tmp_path), [line for line in metrics(runs / "alone") if line["step"] > 8])
