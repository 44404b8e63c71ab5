"""`scatterfold train`: run folders, reruns, and what Hydra must not leave behind."""

import json
import os

import pytest
import yaml

from scatterfold.tools.run_folder import reserve, run_folder

QUIET = ("logger.display=none", "trainer.steps=1", "trainer.checkpoint_every=0")


def test_a_run_goes_to_a_folder_named_after_the_time_and_nowhere_else(scatterfold, tmp_path, tiny):
    outcome = scatterfold("train", *tiny, *QUIET)
    assert outcome.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "checkpoints",
        "environment.json",
        "experts.jsonl",
        "metrics.jsonl",
        "summary.json",
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["run_dir"] == f"runs/{run.name}"


def test_a_new_interpreter_imports_all_that_it_needs(spawn, tmp_path, tiny):
    outcome = spawn(tmp_path, "train", *tiny, "run_dir=run", "logger.display=none")
    assert outcome.code == 0 and not outcome.err
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size


def test_a_finished_run_is_run_again_in_a_new_folder(scatterfold, tmp_path, finished_run):
    outcome = scatterfold("train", "--config-path", finished_run, "logger.display=none")
    assert outcome.code == 0
    (run,) = (tmp_path / "runs").iterdir()

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line.get("loss"), line.get("valid_loss")) for line in lines]

    assert losses(run) == losses(finished_run)

    changed = scatterfold(
        "train", "--config-path", finished_run, "run_dir=other", "trainer.steps=1", "logger.display=none"
    )
    assert changed.code == 0
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["steps"] == 1


def test_a_run_may_stop_after_a_step_and_go_on(scatterfold, tmp_path, finished_run, tiny):
    words = ["train", *tiny, "run_dir=run", "logger.display=plain"]
    for _ in range(2):  # the second time there is nothing to do
        outcome = scatterfold(*words, "trainer.stop_after=1")
        assert outcome.code == 0 and "stopped after step 1, evaluated and saved" in outcome.out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert scatterfold(*words).code == 0

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]

    assert losses(tmp_path / "run") == losses(finished_run)
    refused = scatterfold(*words, "trainer.stop_after=0")
    assert refused.code == 2 and "trainer.stop_after=0 is too small, allowed: null, 1 or more" in refused.line


def test_a_rerun_says_that_it_has_no_groups(scatterfold, finished_run):
    outcome = scatterfold("train", "--config-path", finished_run, "router=threshold")
    assert outcome.code == 2
    assert "router=… chooses a file" in outcome.line and "router.KEY=VALUE" in outcome.line


def test_the_launcher_chooses_the_folder_unless_the_user_does(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCATTERFOLD_RUN_DIR", "from/launcher")
    with run_folder(None) as folder:
        assert str(folder) == "from/launcher"
    with run_folder("mine") as folder:
        assert str(folder) == "mine"
    assert not list(tmp_path.iterdir())


def test_folders_of_the_same_second_differ_and_empty_ones_go_away(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len({reserve() for _ in range(3)}) == 3
    monkeypatch.chdir(tmp_path / "runs")
    with run_folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists() and not folder.parent.exists()


def test_ranks_without_a_store_name_their_folder_after_the_slurm_job_or_give_up(monkeypatch, tmp_path):
    from scatterfold.kernels import ConfigError

    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match="run_dir=null, but the ranks cannot agree"), run_folder(None):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with run_folder(None) as folder:
        assert str(folder) == os.path.join("runs", "slurm_12")


def test_a_sweep_under_torchrun_is_refused(scatterfold, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    outcome = scatterfold("train", "-m", "seed=1,2")
    assert outcome.code == 2
    assert "-m under torchrun" in outcome.line and "launcher=torchrun" in outcome.line
