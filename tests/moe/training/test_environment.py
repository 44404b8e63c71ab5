import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from scatterfold.moe.training import environment
from scatterfold.moe.training.environment import describe_environment, git_revision, without_secrets


def test_versions_device_and_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"), world=2)))
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["processes"] == 2
    assert environment["device"]
    assert environment["command"]
    assert environment["git"] is None
    assert {"driver", "nccl", "cuda", "variables", "code"} <= set(environment)


def test_the_git_revision_of_the_working_directory(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)
        return done.stdout

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "x")
    monkeypatch.chdir(tmp_path)
    revision = describe_environment(torch.device("cpu"), world=1)["git"]
    assert revision == {"commit": git("rev-parse", "HEAD").decode().strip(), "changed": False}
    (tmp_path / "file").write_text("2")
    (tmp_path / "untracked").write_text("no part of the code yet")
    changed = git_revision(tmp_path)
    assert changed["changed"] is True and changed["changed_files"] == ["file"]
    assert changed["diff_sha256"] == hashlib.sha256(git("diff", "HEAD", "--binary")).hexdigest()
    (tmp_path / "file").write_text("3")
    assert git_revision(tmp_path)["diff_sha256"] != changed["diff_sha256"]
    git("commit", "-a", "-m", "y")
    assert git_revision(tmp_path)["changed"] is False


SECRETS = {
    "WANDB_API_KEY": "hush-1",
    "HF_TOKEN": "hush-2",
    "NCCL_SECRET_THING": "hush-3",
    "TORCH_PASSWORD": "hush-4",
    "AWS_SECRET_ACCESS_KEY": "hush-5",
    "SCATTERFOLD_AUTH": "hush-6",
    "TORCH_HOME": "https://me:hush-7@cache.example/torch",
}


def test_variables_that_matter_are_kept_and_secrets_are_not(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-4]")
    monkeypatch.setenv("HOME_ALONE", "of no matter")
    command = ["train", "logger.wandb_api_key=hush-8", "--token", "hush-9", "data.tokenizer=t.json", "optimizer.lr=1"]
    monkeypatch.setattr("sys.argv", command)
    described = describe_environment(torch.device("cpu"), world=1)
    assert described["variables"]["NCCL_DEBUG"] == "INFO" and described["variables"]["OMP_NUM_THREADS"] == "1"
    assert described["variables"]["TORCH_HOME"] == "https://***@cache.example/torch"
    unwanted = {"HOME_ALONE", "SLURM_JOB_NODELIST", *SECRETS} - {"TORCH_HOME"}
    assert not unwanted & set(described["variables"])
    assert "hush" not in json.dumps(described) and "node[" not in json.dumps(described["variables"])
    assert described["command"] == [
        *("train", "logger.wandb_api_key=***", "--token", "***", "data.tokenizer=t.json", "optimizer.lr=1"),
    ]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["s3://id:pw@bucket/x"], ["s3://***@bucket/x"]),
        (["--auth=abc", "next"], ["--auth=***", "next"]),
        (["schedule=cosine"], ["schedule=cosine"]),
    ],
    ids=str,
)
def test_words_of_a_command(words, shown):
    assert without_secrets(words) == shown


def test_the_driver(monkeypatch):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 01:58:14 UTC 2025\nGCC version: 12\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert environment.driver_version() == "570.124.06"
