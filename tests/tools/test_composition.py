"""Composing configurations: every file of configs/, and every mistake in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.run_plan import RunPlan
from scatterfold.tools.composition import CONFIGS, session
from scatterfold.tools.launchers import launcher_of
from scatterfold.tools.request import Request
from scatterfold.tools.train import GROUPS, checked

CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for group in (*GROUPS, "experiment") for path in (CONFIGS / group).glob("*.yaml")
)


def compose(*words):
    request = Request.parse([str(word) for word in words])
    with session(request) as hydra:
        return checked(hydra.resolve(hydra.compose()), request)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_file_gives_a_run_that_checks(choice):
    config = compose(choice)
    if not isinstance(config["data"]["path"], str):  # the user must say which text
        config = compose(choice, "data.path=stdlib")
    RunPlan.from_config(config)
    launcher_of(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_file_begins_by_saying_what_it_is(path):
    lines = path.read_text().splitlines()
    assert lines[1 if lines[0].startswith("# @package") else 0].startswith("# ")


def test_values_and_groups_are_overridden():
    config = compose("router=threshold", "model.layers=3", "trainer.steps=7", "optimizer.betas=[0.8,0.9]")
    assert config["router"]["_target_"].endswith("ThresholdRouter")
    assert (config["model"]["layers"], config["trainer"]["steps"]) == (3, 7)
    assert config["optimizer"]["betas"] == [0.8, 0.9]


def test_an_experiment_changes_groups_and_the_command_line_wins():
    base, demo = compose(), compose("experiment=demo")
    assert demo["trainer"] != base["trainer"]
    assert compose("experiment=demo", "trainer.steps=3")["trainer"]["steps"] == 3


def test_the_dense_baseline_has_the_data_and_steps_of_the_demo():
    demo, dense = compose("experiment=demo"), compose("experiment=dense_baseline")
    assert dense["model"]["num_experts"] in (0, 1)
    for group in ("data", "trainer", "optimizer", "schedule"):
        assert dense[group] == demo[group]
    active = [
        RunPlan.from_config(config).model.counts(config["data"]["sequence_length"]).active for config in (demo, dense)
    ]
    assert active[1] == pytest.approx(active[0], rel=0.02)


def test_a_key_that_only_the_constructor_knows_is_accepted(tmp_path):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "short.yaml").write_text("# Short.\n_target_: scatterfold.moe.training.Cosine\n")
    flags = ("--config-dir", tmp_path, "schedule=short")
    assert compose(*flags, "schedule.min_ratio=0.5")["schedule"]["min_ratio"] == 0.5
    with pytest.raises(ConfigError, match=r"schedule.min_ration=0.5 .*did you mean schedule.min_ratio"):
        compose(*flags, "schedule.min_ration=0.5")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.stesp=3"], "trainer.stesp=3 is an unknown key (did you mean trainer.steps?), allowed in trainer: "),
        (["stepz=3"], "stepz=3 is an unknown key (did you mean trainer.steps?), allowed: "),
        (["routr=top_k"], "routr=top_k is an unknown key (did you mean router?), allowed: communication, data, "),
        (["router=tok_k"], "router=tok_k does not exist (did you mean top_k?), allowed: "),
        (["experiment=demx"], "experiment=demx does not exist (did you mean demo?), allowed: "),
        (["router.width=3"], "router.width=3 is an unknown key"),
        (["model.foo.bar=2"], "model.foo.bar=2 is an unknown key"),
        (["+foo=1"], "foo is an unknown key"),
        (["trainer.steps"], "'trainer.steps' is not an override, allowed: key=value"),
        (
            ["trainer.steps=1,2"],
            "trainer.steps=1,2 is several values, allowed: -m for a sweep over them, trainer.steps=[1,2] ",
        ),
        (["data.path=a(b"], "data.path=a(b cannot be read"),
        (["data.path=???"], "data.path has no value, allowed: data.path=VALUE"),
        (["trainer=null"], "trainer=null is no choice"),
        (["~trainer"], "trainer is missing, allowed: trainer=CHOICE"),
        (["+model=null"], "model"),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
        (["run_dir=3"], "run_dir=3 has the wrong type, allowed: a path in quotes"),
        (["--config-path", "nowhere"], "--config-path nowhere is no folder"),
        (["--config-path", "."], "--config-path . has no config.yaml"),
        (["--config-name", "konfig"], "--config-name konfig does not exist"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is no folder"),
        (["--muiltrun"], "--muiltrun"),
        (["--cfg", "everything"], "'everything'"),
        (["-m", "router=top_k,tresh"], "router=tresh does not exist (did you mean threshold?)"),
        (["-m", "router.topk=1,2"], "router.topk=1 is an unknown key (did you mean router.top_k?)"),
        (["-m", "run_dir=x", "seed=1,2"], "run_dir=x would be shared by all trials, allowed: hydra.sweep.dir=DIR"),
        (["-m", "hydra/sweeper=unknown"], "hydra/sweeper=unknown does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(scatterfold, tmp_path, words, expected):
    outcome = scatterfold("train", *words)
    assert outcome.code == 2
    assert expected in outcome.line
    assert "allowed" in outcome.line
    assert not list(tmp_path.iterdir())


def test_broken_yaml_names_the_line(scatterfold, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("seed: 1\nmodel: [1, 2\n")
    outcome = scatterfold("train", "--config-path", "mine")
    assert outcome.code == 2
    assert "line 3" in outcome.line


def test_cfg_shows_the_configuration_and_writes_nothing(scatterfold, tmp_path):
    outcome = scatterfold("train", "--cfg", "job", "trainer.steps=7")
    assert outcome.code == 0 and not outcome.err
    shown = yaml.safe_load(outcome.out)
    assert shown["trainer"]["steps"] == 7 and set(GROUPS) <= set(shown) and "hydra" not in shown
    assert not list(tmp_path.iterdir())
    one = scatterfold("train", "--cfg", "job", "--package", "schedule", "schedule=wsd")
    assert "WSD" in one.out and "trainer" not in one.out


def test_debug_shows_the_traceback(scatterfold, monkeypatch):
    monkeypatch.setenv("SCATTERFOLD_DEBUG", "1")
    outcome = scatterfold("train", "trainer.stesp=3")
    assert outcome.code == 2
    assert "Traceback" in outcome.err and outcome.err.splitlines()[-1].startswith("scatterfold: trainer.stesp=3")


def test_the_module_is_a_command_too(tmp_path):
    command = [sys.executable, "-m", "scatterfold.tools.train", "trainer.stesp=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "did you mean trainer.steps?" in done.stderr


def test_configs_travel_with_the_package():
    setup = Path(CONFIGS.parent / "setup.py").read_text()
    for pattern in ("configs/*.yaml", "configs/*/*.yaml", "tools/hydra_path/hydra_plugins/*/*.py"):
        assert pattern in setup
    assert not list(CONFIGS.glob("*/*/*.yaml"))
