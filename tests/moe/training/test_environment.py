import json
import subprocess

import torch

from scatterfold.moe.training.environment import describe_environment


def test_versions_device_and_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"), world=2)))
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["processes"] == 2
    assert environment["device"]
    assert environment["command"]
    assert environment["git"] is None


def test_the_git_revision_of_the_working_directory(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "x")
    monkeypatch.chdir(tmp_path)
    revision = describe_environment(torch.device("cpu"), world=1)["git"]
    assert len(revision["commit"]) == 40
    assert revision["changed"] is False
    (tmp_path / "file").write_text("2")
    assert describe_environment(torch.device("cpu"), world=1)["git"]["changed"] is True
