"""Several ranks as a user starts them: torchrun, `scatterfold launch`, several machines, SLURM, sweeps of such runs."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scatterfold.tools.cli import main
from scatterfold.tools.sweep.trial import DROPPED, FINISHED, Trial

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("warm")]

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
SCATTERFOLD = ["-m", "scatterfold.tools.cli"]


def run(folder, *words, timeout=150, **variables):
    return subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def only_line(text):
    """The one line of a text; all of it is in the failure otherwise."""
    assert text.count("\n") == 1, text
    return text.strip()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """`launch(…) -> (exit code, stdout, stderr)`: the launcher in this process, its ranks in theirs."""
    monkeypatch.chdir(tmp_path)

    def launch(*words):
        capfd.readouterr()
        code = main(["launch", *map(str, words)])
        return (code, *capfd.readouterr())

    return launch


def test_launch_trains_like_one_process_and_keeps_logs_of_ranks(launch, tmp_path, tiny):
    code, out, err = launch("--nproc-per-node", 2, "train", *tiny, "run_dir=two")
    assert code == 0 and not err
    assert main(["train", *tiny, f"run_dir={tmp_path / 'one'}", "logger.display=none"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in (tmp_path / "two" / "logs").iterdir()} == {
        f"rank-{rank}.{stream}" for rank in (0, 1) for stream in ("out", "err")
    }
    assert out == (tmp_path / "two" / "logs" / "rank-0.out").read_text()
    assert "step" in out and not (tmp_path / "two" / "logs" / "rank-1.out").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_bad_input_in_ranks_is_one_line_and_leaves_nothing(launch, tmp_path, tiny):
    code, out, err = launch("--nproc-per-node", 2, "train", *tiny, "run_dir=run", "layout.dp_shard=3")
    assert code == 2 and not out
    line = only_line(err)
    assert line.startswith("scatterfold: layout.dp_shard=3")
    assert not list(tmp_path.iterdir())


def test_a_crash_names_the_rank_and_its_log(launch, tmp_path, tiny, monkeypatch):
    (tmp_path / "broken.py").write_text("def Broken(warmup_steps):\n    raise ZeroDivisionError('by design')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["schedule=constant", "schedule._target_=broken.Broken", "run_dir=run"]
    code, _, err = launch("--nproc-per-node", 1, "train", *tiny, *words)
    assert code == 1
    line = only_line(err)
    assert "ZeroDivisionError: by design (rank 0" in line
    log = tmp_path / line.split("its traceback is in ")[1].rstrip(")")
    assert "Traceback" in log.read_text() and "by design" in log.read_text()


def stop_after_first_step(process, run_dir, number):
    """Send a signal once the run has written its first line; returns what it printed."""
    metrics = Path(run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    return process.communicate(timeout=60)


@pytest.mark.parametrize(("number", "code", "ranks"), [(signal.SIGTERM, 0, 2), (signal.SIGINT, 130, 1)])
def test_a_signal_reaches_the_ranks_which_save(warm_python, tmp_path, tiny, number, code, ranks):
    words = ["launch", "--nproc-per-node", str(ranks), "train", *tiny, "run_dir=run", "trainer.steps=100000"]
    process = subprocess.Popen(
        [warm_python, *SCATTERFOLD, *words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = stop_after_first_step(process, tmp_path / "run", number)
    assert process.returncode == code, err
    assert not err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert len(losses(tmp_path / "run")) == step


def test_torchrun_runs_the_module_in_one_folder(warm_python, tmp_path, tiny):
    torchrun = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run(tmp_path, *torchrun, "-m", "scatterfold.tools.train", *tiny)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(losses(folder)) == 3
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


ONCE = """
import os
from pathlib import Path
from scatterfold.moe.training import Constant

class Once(Constant):
    def __call__(self, step, total_steps):
        mark = Path(os.environ["MARK"])
        if step == 2 and not mark.exists():
            mark.touch()
            os._exit(7)
        return super().__call__(step, total_steps)
"""


def test_a_failing_rank_is_started_again_and_resumes(launch, tmp_path, tiny, monkeypatch):
    (tmp_path / "once.py").write_text(ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    words = ["schedule=constant", "schedule._target_=once.Once", "run_dir=run", "trainer.checkpoint_every=1"]
    code, out, err = launch("--nproc-per-node", 1, "--max-restarts", 1, "train", *tiny, *words)
    assert code == 0, err
    assert (tmp_path / "mark").exists()
    assert len(losses(tmp_path / "run")) == 3
    assert "step-2" in (tmp_path / "run" / "logs" / "rank-0.2.out").read_text()


FAULTS = """
import os, time
from pathlib import Path
from scatterfold.moe.training import Constant

class Fault(Constant):
    \"\"\"Rank 1 raises, dies, hangs or is late in step 2 of its first life.\"\"\"

    def __call__(self, step, total_steps):
        mark = Path(os.environ["MARK"])
        if step == 2 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            if os.environ["FAULT"] == "raise":
                raise ZeroDivisionError("by design")
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), 9)
            while os.environ["FAULT"] == "hang":
                time.sleep(0.1)
            time.sleep(12 if os.environ["FAULT"] == "late" else 0)
        return super().__call__(step, total_steps)
"""


@pytest.fixture
def launch_with_fault(launch, tmp_path, tiny, monkeypatch):
    """`launch_with_fault(kind, *flags, run=…, **overrides)`: two ranks, of which rank 1 fails once."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))

    def start(kind, *flags, overrides=()):
        monkeypatch.setenv("FAULT", kind)
        words = ["schedule=constant", "schedule._target_=faults.Fault", "layout.dp_shard=2", "layout.ep=2", *overrides]
        return launch("--nproc-per-node", 2, *flags, "train", *tiny, "trainer.checkpoint_every=1", *words)

    return start


def test_when_one_rank_raises_all_end_with_its_words(launch_with_fault, tmp_path):
    start = time.monotonic()
    code, _, err = launch_with_fault("raise", overrides=["run_dir=run"])
    assert code == 1 and time.monotonic() - start < 60
    line = only_line(err)
    assert "ZeroDivisionError: by design (rank 1; its traceback is in run/logs/rank-1.err)" in line
    assert "by design" in (tmp_path / "run" / "logs" / "rank-1.err").read_text()


def test_a_killed_rank_is_started_again_and_the_curve_goes_on_exactly(launch_with_fault, tmp_path):
    code, _, err = launch_with_fault("kill", "--max-restarts", 1, overrides=["run_dir=killed", "trainer.steps=5"])
    assert code == 0, err
    assert (tmp_path / "mark").exists()
    code, out, err = launch_with_fault("none", overrides=["run_dir=whole", "trainer.steps=5"])
    assert code == 0, err
    assert "dp_replicate 1, dp_shard 2, ep 2\n" in out
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5


def test_a_rank_that_hangs_is_named_with_its_stack(launch_with_fault, tmp_path):
    code, _, err = launch_with_fault("hang", overrides=["run_dir=run", "trainer.hang_timeout_s=6"])
    assert code == 1
    line = only_line(err)
    assert "rank 1 hangs at" in line and "faults.py" in line and "rank 0 waits in" in line
    assert "time.sleep(0.1)" in (tmp_path / "run" / "logs" / "rank-1.err").read_text()


def test_a_collective_that_a_rank_never_joins_ends_the_run(launch_with_fault, tmp_path):
    words = ["run_dir=run", "communication.timeout_s=5", "communication.flight_recorder=20"]
    code, _, err = launch_with_fault("late", overrides=words)
    assert code == 1
    line = only_line(err)
    # Rank 0 in step 2, or on a busy machine either of them before.
    found = re.search(
        r"CollectiveTimeout: rank (\d) waited 5 s \(communication\.timeout_s\) in \w+ at \S+:\d+ \(", line
    )
    assert found is not None, line
    record = json.loads((tmp_path / "run" / "flight_recorder" / f"rank-{found[1]}.json").read_text())
    assert 0 < len(record["entries"]) <= 20


FAKES = {
    "scontrol": "echo localhost; echo another-host\n",
    # Two machines, which are both this one.
    "srun": 'shift\n"$@" & a=$!\n"$@" & b=$!\nwait $a; first=$?\nwait $b; exit $((first > $? ? first : $?))\n',
    "sbatch": (
        'script="${@: -1}"\necho "$@" > sbatch.args\necho 4711\n'
        "export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=any SLURM_NNODES=2\n"
        'exec bash "$script" > job.out 2> job.err\n'
    ),
}


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which SLURM's commands run a job of two nodes on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_slurm_script_runs_one_launcher_a_node(launch, tmp_path, tiny, slurm):
    words = ["--slurm", "job.sh", "--nnodes", 2, "--nproc-per-node", 1, "--partition", "gpu", "--time", "4:00:00"]
    code, _, err = launch(*words, "--account", "me", "train", *tiny)
    assert code == 0, err
    script = (tmp_path / "job.sh").read_text()
    for option in ("--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--time=4:00:00", "--account=me"):
        assert f"#SBATCH {option}\n" in script
    assert "#SBATCH --signal=TERM@120\n" in script and "--qos" not in script
    assert run(tmp_path, "bash", "-n", "job.sh").returncode == 0
    submitted = run(tmp_path, "sbatch", "job.sh", PATH=slurm)
    assert submitted.returncode == 0, (tmp_path / "job.err").read_text()
    folder = tmp_path / "runs" / "slurm_4711"
    assert len(losses(folder)) == 3
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


def test_the_slurm_launcher_writes_and_submits(tmp_path, tiny, slurm, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", *tiny, "launcher=slurm", "launcher.nodes=2", "launcher.mem=4G", "run_dir=run"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert main(words) == 2
    assert "launcher=slurm needs sbatch" in capfd.readouterr().err
    monkeypatch.setenv("PATH", slurm)
    (tmp_path / "bin" / "sbatch").write_text(
        '#!/usr/bin/env bash\necho "$@" > sbatch.args\necho 4711\nexit ${CODE:-0}\n'
    )
    assert main([*words, "launcher.wait=true"]) == 0
    assert capfd.readouterr().out == "job 4711: run/job.sh\n"
    assert (tmp_path / "sbatch.args").read_text() == "--parsable --wait run/job.sh\n"
    script = (tmp_path / "run" / "job.sh").read_text()
    assert "#SBATCH --mem=4G\n" in script and f"export SCATTERFOLD_RUN_DIR={tmp_path / 'run'}\n" in script
    monkeypatch.setenv("CODE", "3")
    assert main(words) == 1
    assert "ended with exit code 3" in capfd.readouterr().err


def test_a_sweep_of_torchrun_jobs(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["launcher=torchrun", "launcher.nproc_per_node=2", "optimizer.lr=1e-6,1e-2", "hydra.launcher.parallel=2"]
    halving = ["hydra/sweeper=halving", "hydra.sweeper.eta=2", "hydra.sweep.dir=sweep", "trainer.steps=4"]
    assert main(["train", "-m", *tiny, *words, *halving]) == 0
    dropped, best = (Trial.load(tmp_path / "sweep" / str(number)) for number in range(2))
    assert dropped.status == DROPPED and dropped.steps == 2 and best.rungs["2"] < dropped.rungs["2"]
    assert best.status == FINISHED and best.steps == 4 and 0 < best.objective < best.rungs["2"]
    for number in range(2):
        folder = tmp_path / "sweep" / str(number)
        assert json.loads((folder / "environment.json").read_text())["processes"] == 2
        assert (folder / "logs" / "rank-1.err").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "sweep/1/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]


def test_what_cannot_be_launched_is_one_line(tmp_path, tiny, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endpoint = "localhost:12345"
    for words, expected in (
        (["--nnodes", 2, "train", *tiny, "run_dir=run"], "--rdzv-endpoint HOST:PORT"),
        (["--nnodes", 2, "--rdzv-endpoint", endpoint, "train", *tiny], "run_dir=null with --nnodes 2"),
        (["--partition", "gpu", "train", *tiny], "--partition is for a SLURM script"),
        (["train", *tiny, "trainer.stesp=3"], "did you mean trainer.steps?"),
        (["train", "-m", "seed=1,2"], "would sweep on every rank"),
        (["--nproc-per-node", "many", "train", *tiny], "nproc_per_node=many"),
    ):
        capfd.readouterr()
        assert main(["launch", *map(str, words)]) == 2
        line = only_line(capfd.readouterr().err)
        assert expected in line
    assert not list(tmp_path.iterdir())
