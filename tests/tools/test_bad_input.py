"""Bad input at the command line: exit code 2, one line that says what is wrong, and nothing damaged."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

CHECKPOINTS = "checkpoints"


def files(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, corpus):
    """Prefix of an indexed dataset."""
    from scatterfold.tools.cli import main

    prefix = tmp_path_factory.mktemp("dataset") / "text"
    assert main(["data", "prepare", f"source={corpus}", f"output={prefix}", "workers=1"]) == 0
    return prefix


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.layers=abc"], ["model.layers='abc'", "a whole number"]),
        (["optimizer.lr=[1]"], ["optimizer.lr=", "a number"]),
        (["trainer.compile=maybe"], ["trainer.compile='maybe'", "true or false"]),
        (["trainer.precision=fp8"], ["trainer.precision='fp8'", "fp32, bf16"]),
        (["trainer.steps=0"], ["trainer.steps=0", "1 or more"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "above 0"]),
        (["schedule.warmup_steps=-1"], ["schedule.warmup_steps=-1", "0 or more"]),
        (["seed=x"], ["seed='x'"]),
        (["router.top_k=9"], ["router.top_k=9", "model.num_experts=4"]),
        (["model.heads=3"], ["model.heads=3", "model.width=16"]),
        (["model.heads=4", "model.kv_heads=3"], ["model.kv_heads=3", "model.heads=4"]),
        (["experts.activation=swish"], ["activation", "swish", "swiglu"]),
        (["experts.backend=cuda9"], ["backend", "cuda9"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "257 or more"]),
        (["data.sequence_length=4000"], ["sequence_length=4000"]),
        (["data.global_batch_size=5", "data.micro_batch_size=2"], ["global_batch_size=5"]),
        (["data.path=/does/not/exist"], ["/does/not/exist"]),
        (["data.tokenizer=nowhere.json"], ["nowhere.json"]),
        (["data.split=1"], ["data.split"]),
        (["layout.dp_shard=2"], ["layout.dp_shard=2"]),
        (["logger.wandb=maybe"], ["logger.wandb='maybe'", "disabled, offline, online"]),
        (["resume=elsewhere"], ["resume=elsewhere"]),
        (["init_from=elsewhere"], ["init_from=elsewhere"]),
        (["router._target_=scatterfold.moe.routers.Nope"], ["router._target_", "Nope"]),
        (["launcher=torchrun", "launcher.nproc_per_node=0"], ["launcher.nproc_per_node=0"]),
        (["launcher=torchrun", "launcher.nnodes=2"], ["launcher.nnodes=2", "HOST:PORT"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_configuration_that_cannot_be(scatterfold, tmp_path, tiny, words, expected):
    outcome = scatterfold("train", *tiny, *words)
    assert outcome.code == 2
    for part in expected:
        assert part in outcome.line
    assert not list(tmp_path.iterdir())


def test_a_sequence_longer_than_the_data(scatterfold, tmp_path, tiny):
    (tmp_path / "short").mkdir()
    for name in "abc":
        (tmp_path / "short" / f"{name}.txt").write_text(f"one short document, the {name}")
    outcome = scatterfold(
        "train", *tiny, "data.path=short", 'data.split="60,40"', "data.sequence_length=64", "run_dir=run"
    )
    assert outcome.code == 2
    assert "data.sequence_length=64" in outcome.line
    assert not (tmp_path / "run").exists()


def damage(prefix, what):
    """Spoil a copy of a dataset in one way."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if what == "no idx":
        index.unlink()
    elif what == "no bin":
        data.unlink()
    elif what == "short idx":
        index.write_bytes(index.read_bytes()[:-5])
    elif what == "short bin":
        data.write_bytes(data.read_bytes()[:-5])
    elif what == "other file":
        index.write_bytes(b"not an index at all, but some text of another kind")
    elif what == "wild tokens":
        tokens = np.frombuffer(data.read_bytes(), dtype=np.uint16).copy()
        tokens[:] = 40000
        data.write_bytes(tokens.tobytes())


@pytest.mark.parametrize("what", ["no idx", "no bin", "short idx", "short bin", "other file", "wild tokens"])
def test_a_damaged_dataset(scatterfold, tmp_path, tiny, dataset, what):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{dataset}{suffix}", tmp_path / f"copy{suffix}")
    damage(tmp_path / "copy", what)
    before = files(tmp_path)
    outcome = scatterfold("train", *tiny, "data.path=copy", "run_dir=run")
    assert outcome.code == 2
    assert "copy" in outcome.line or "data.path" in outcome.line
    assert files(tmp_path) == before


def test_a_checkpoint_of_another_shape(scatterfold, tmp_path, tiny, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    before = files(tmp_path / "run")
    for words in (["run_dir=run", "model.width=32"], ["run_dir=run", "model.layers=2"]):
        outcome = scatterfold("train", *tiny, *words)
        assert outcome.code == 2
        assert words[1].split("=")[0] in outcome.line
        assert files(tmp_path / "run") == before
    outcome = scatterfold("train", *tiny, "run_dir=new", "init_from=run", "model.width=32")
    assert outcome.code == 2
    assert "(257, 16)" in outcome.line and "(257, 32)" in outcome.line
    assert files(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()


def test_a_half_written_checkpoint_is_not_loaded(scatterfold, tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    for step in (tmp_path / "run" / CHECKPOINTS).iterdir():
        (step / "meta.json").unlink()
    outcome = scatterfold("sample", "source=run", "max_tokens=1")
    assert outcome.code == 2
    assert "run" in outcome.line


@pytest.mark.parametrize("where", ["a_file/run", "a_file", "/proc/run"])
def test_a_run_folder_that_cannot_be_made(scatterfold, tmp_path, tiny, where):
    (tmp_path / "a_file").write_text("here first")
    outcome = scatterfold("train", *tiny, f"run_dir={where}")
    assert outcome.code == 2
    assert where in outcome.line
    assert files(tmp_path) == {"a_file": b"here first"}


def test_a_default_folder_that_cannot_be_made(scatterfold, tmp_path, tiny):
    (tmp_path / "runs").write_text("here first")
    outcome = scatterfold("train", *tiny)
    assert outcome.code == 2
    assert "run_dir=runs/" in outcome.line and "cannot be made" in outcome.line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(scatterfold, tmp_path, tiny):
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = scatterfold("train", *tiny, "run_dir=locked/run")
    assert outcome.code == 2
    assert "locked/run" in outcome.line


def test_a_full_disk_spoils_no_checkpoint(scatterfold, tmp_path, tiny):
    """A limit on file sizes stands for the full disk: the operating system refuses in the middle of a file."""
    command = ["train", *tiny, "run_dir=run", "logger.display=none"]
    assert scatterfold(*command, "trainer.steps=2").code == 0
    before = files(tmp_path / "run" / CHECKPOINTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
    try:
        outcome = scatterfold(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 2
    assert "step-4" in outcome.line
    assert files(tmp_path / "run" / CHECKPOINTS) == before
    assert scatterfold(*command).code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def test_ctrl_c_leaves_with_130_and_one_line(warm_python, tmp_path, tiny):
    command = [warm_python, "-m", "scatterfold.tools.cli", "train", *tiny, "run_dir=run", "trainer.steps=100000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step" in line and "/" in line and "loss" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "scatterfold: interrupted" and "Traceback" not in err


def test_a_bug_shows_its_traceback_and_exits_1(scatterfold, tiny, monkeypatch):
    from scatterfold.moe.training import run

    def fail(*arguments, **options):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(run, "train", fail)
    outcome = scatterfold("train", *tiny)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1] == "scatterfold: ZeroDivisionError: a bug of ours"


def test_a_run_that_diverged_says_so_without_a_traceback(scatterfold, tiny, monkeypatch):
    from scatterfold.moe.training import run
    from scatterfold.moe.training.step_guard import NonFiniteError

    def fail(*arguments, **options):
        raise NonFiniteError("step 3: loss nan")

    monkeypatch.setattr(run, "train", fail)
    outcome = scatterfold("train", *tiny)
    assert outcome.code == 1
    assert outcome.line == "scatterfold: step 3: loss nan"
