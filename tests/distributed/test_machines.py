"""Several machines, all of them this one: launchers that meet, start again together, lose one, are told to go."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from scatterfold.tools.cli import main

pytestmark = pytest.mark.distributed

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in RANKS} | {"OMP_NUM_THREADS": "1"}
STEPS = 8

# On the second machine: a rank fails in its first life, and the whole machine goes in its second. The first machine
# takes its time while it is alone, so that the second finds a run to join, however late it starts.
FAULTS = """
import os, signal, time
from pathlib import Path
from scatterfold.moe.training import Constant

class Fault(Constant):
    calls = 0

    def __call__(self, step, total_steps):
        failed, gone = Path(os.environ["MARKS"], "failed"), Path(os.environ["MARKS"], "gone")
        Fault.calls += 1
        if os.environ["MACHINE"] == "1" and Fault.calls == 2 and not failed.exists():
            failed.touch()
            os._exit(7)
        if os.environ["MACHINE"] == "1" and Fault.calls == 2:
            gone.touch()
            os.kill(int(os.environ["STARTED_BY"]), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["WORLD_SIZE"] == "1" and not gone.exists() and "MACHINE" in os.environ:
            time.sleep(15)
        return super().__call__(step, total_steps)
"""


@pytest.fixture(scope="module")
def tiny(tiny):
    return [*tiny, f"trainer.steps={STEPS}", "schedule=constant"]


@pytest.fixture
def launcher(warm_python):
    return [warm_python, "-m", "scatterfold.tools.launch"]


@pytest.fixture
def start(tmp_path):
    """`start(command, **variables)`: a launcher of its own; all are killed at the end, with what they started."""
    processes = []

    def start(command, **variables):
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=tmp_path,
            env={**ENVIRONMENT, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_outlives_a_rank_and_then_a_machine(start, launcher, tmp_path, tiny, choose_port):
    """Ends on one machine with the curve of a run that was never disturbed."""
    (tmp_path / "faults.py").write_text(FAULTS)
    variables = {"PYTHONPATH": str(tmp_path), "MARKS": str(tmp_path)}
    flags = ["--nnodes", "1:2", "--rdzv-endpoint", f"localhost:{choose_port()}", "--nproc-per-node", 1]
    flags += ["--max-restarts", 3, "--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"]
    words = ["train", *tiny, "schedule._target_=faults.Fault", "run_dir=run", "trainer.checkpoint_every=1"]
    first, second = (start([*launcher, *flags, "--node-rank", n, *words], MACHINE=str(n), **variables) for n in (0, 1))
    _, err = first.communicate(timeout=900)
    assert first.returncode == 0, err
    second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL
    assert (tmp_path / "failed").exists() and (tmp_path / "gone").exists()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 1
    assert main(["train", *tiny, f"run_dir={tmp_path / 'alone'}", "logger.display=none"]) == 0
    # In step 7 the second and third expert of one of 128 tokens are 1.5e-6 apart, and rounding, which differs between
    # one rank and two, decides: 1e-3. Until then losses differ by 4e-8. A step makes 5e-3.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=2e-3)
    assert len(losses(tmp_path / "run")) == STEPS


def test_pods_of_a_pytorchjob_meet_and_go_together(start, warm_python, tmp_path, tiny, choose_port, monkeypatch):
    """The command of the manifest, with the variables that the operator sets; one pod is then told to go."""
    monkeypatch.chdir(tmp_path)
    job = ["--kubernetes", "job.yaml", "--image", "sf", "--pvc", f"runs:{tmp_path}", "--python", warm_python]
    size = ["--nnodes", "2", "--nproc-per-node", "1"]
    assert main(["launch", *job, *size, "train", *tiny, "trainer.steps=100000", "trainer.checkpoint_every=0"]) == 0
    replicas = yaml.safe_load((tmp_path / "job.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    port = choose_port()

    def pod(number, kind):
        command = replicas[kind]["template"]["spec"]["containers"][0]["command"]
        variables = {
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(number)},
            **{"PET_NODE_RANK": str(number), "PET_NPROC_PER_NODE": "1", "PET_NNODES": "2"},
        }
        return start(command, **variables, PET_LOCAL_ADDR="127.0.0.1")

    pods = [pod(0, "Master"), pod(1, "Worker")]
    metrics = tmp_path / "runs" / "scatterfold" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    pods[1].send_signal(signal.SIGTERM)
    said = [pod.communicate(timeout=400)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], said  # not 0: the job is not done
    folder = metrics.parent
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == len(losses(folder))
    assert (folder / "logs" / "unfinished").exists()


def test_machines_that_do_not_meet(start, launcher, tmp_path, tiny, choose_port):
    flags = ["--nnodes", 2, "--rdzv-endpoint", f"localhost:{choose_port()}", "--nproc-per-node", 1]
    alone = start([*launcher, *flags, "--rdzv-conf", "join_timeout=2", "train", *tiny, "run_dir=run"])
    _, err = alone.communicate(timeout=400)
    assert alone.returncode == 1
    assert err.count("\n") == 1, err
    assert err.startswith("scatterfold: the machines of this run did not meet at localhost:")
