"""Hydra's other sweeper and launcher, optuna's and submitit's, with trials that really train."""

import json
import os
import signal
import time

import pytest
import yaml

from scatterfold.tools.sweep.trial import FAILED, FINISHED, RESULT, Trial
from scatterfold.tools.sweep.trials import Sweep

QUICK = ("trainer.steps=2", "trainer.checkpoint_every=0", "logger.display=none", "hydra.sweep.dir=sweep")
LOG = "'optimizer.lr=tag(log,interval(1e-3,1e-1))'".strip("'")


def studied(folder):
    """The trials of the study that lies in a sweep folder."""
    import optuna

    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'optuna.db'}").trials


def test_optuna_minimises_the_validation_loss_and_goes_on_later(scatterfold, trials_here, tmp_path, tiny):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["train", "-m", *tiny, *QUICK, LOG, "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1"]
    words += ["hydra.sweeper.sampler.seed=3"]
    outcome = scatterfold(*words, "hydra.sweeper.n_trials=2")
    assert outcome.code == 0, outcome.err
    trials = studied(tmp_path / "sweep")
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for number, trial in enumerate(trials):
        folder = tmp_path / "sweep" / str(number)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == trial.params["optimizer.lr"] and 1e-3 <= config["optimizer"]["lr"] <= 1e-1
        assert trial.value == json.loads((folder / "summary.json").read_text())["valid_loss"]
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    best = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    assert best["optimizer"]["lr"] == found["best_params"]["optimizer.lr"]
    assert f"{found['best_value']:.4f}" in outcome.out.splitlines()[-2]

    # Three in all: one more, at another learning rate; then none.
    assert scatterfold(*words, "hydra.sweeper.n_trials=3").code == 0
    trials = studied(tmp_path / "sweep")
    assert len(trials) == 3 == len({trial.params["optimizer.lr"] for trial in trials})
    assert [folder for folder, _ in trials_here] == ["0", "1", "2"]
    outcome = scatterfold(*words, "hydra.sweeper.n_trials=3")
    assert outcome.code == 0 and "the study has its 3 trials" in outcome.out and len(trials_here) == 3


def test_optuna_asks_again_for_what_a_signal_stopped_and_tells_failures(scatterfold, monkeypatch, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    started = []

    def wait(sweep, words, folder, environment):
        started.append((folder.name, words[-1]))
        (folder / "trial.log").write_text("scatterfold: it broke\n")
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while sweep._stopped_by is None:
                time.sleep(0.01)
            return 0
        if len(started) == 4:
            return 1
        seed = float(words[-1].partition("=")[2])
        with open(environment[RESULT], "w") as file:
            json.dump({"completed": True, "step": 1, "objective": seed}, file)
        return 0

    monkeypatch.setattr(Sweep, "_wait", wait)
    words = ["train", "-m", LOG, "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep"]
    words += ["hydra.launcher.seeds=[4]", "hydra.sweeper.n_trials=3"]
    assert scatterfold(*words).code == 0
    assert [trial.state.name for trial in studied(tmp_path / "sweep")] == ["COMPLETE", "RUNNING"]
    outcome = scatterfold(*words)
    assert outcome.code == 1 and not outcome.err
    assert [folder for folder, _ in started] == ["0", "1", "1", "2"]  # the stopped one, in its own folder
    trials = studied(tmp_path / "sweep")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "FAIL"]
    assert trials[2].params == trials[1].params and trials[2].value == 4.0


def test_seeds_are_runs_of_one_optuna_trial(scatterfold, trials_here, tmp_path, tiny):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["train", "-m", *tiny, *QUICK, "trainer.steps=1", LOG, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1"]
    outcome = scatterfold(*words, "hydra.launcher.seeds=[1,2]", "hydra.sweeper.n_jobs=1")
    assert outcome.code == 0, outcome.err
    losses = [Trial.load(tmp_path / "sweep" / str(number)).objective for number in range(2)]
    assert losses[0] != losses[1]
    (trial,) = studied(tmp_path / "sweep")
    assert trial.value == pytest.approx(sum(losses) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is too small"),
        (["hydra.sweeper.direction=maximize"], "hydra.sweeper.direction="),
        (["hydra.sweeper.storage=nonsense"], "hydra.sweeper.storage=nonsense cannot be opened"),
        (["hydra.launcher.seeds=[0]", "seed=1,2"], "both set the seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_optuna_cannot_do_is_one_line(scatterfold, tmp_path, words, expected):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    outcome = scatterfold("train", "-m", "hydra/sweeper=optuna", *words)
    assert outcome.code == 2 and expected in outcome.line and "allowed" in outcome.line
    assert not list(tmp_path.iterdir())


def test_submitit_runs_each_trial_as_a_job_and_a_failure_alone(scatterfold, tmp_path, tiny, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*tiny, *QUICK, "router.top_k=9,2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    outcome = scatterfold("train", "-m", *words)
    assert outcome.code == 1
    failed, finished = (Trial.load(tmp_path / "sweep" / str(number)) for number in range(2))
    assert failed.status == FAILED and "router.top_k=9" in failed.message
    assert finished.status == FINISHED
    assert finished.objective == json.loads((tmp_path / "sweep" / "1" / "summary.json").read_text())["valid_loss"]
    assert "1 finished, 1 failed" in outcome.out.splitlines()[-1]
    assert (tmp_path / "sweep" / "best.yaml").exists()
    assert list((tmp_path / "sweep" / ".submitit").rglob("*_log.out"))


def test_a_job_that_was_killed_is_one_line(scatterfold, monkeypatch, tmp_path):
    class UncompletedJobError(RuntimeError):
        __module__ = "submitit.core.utils"

    def sweep(self, config, task):
        raise UncompletedJobError("Job 7 (task: 0) has not produced any output\nand much more")

    monkeypatch.setattr("scatterfold.tools.composition.Session.sweep", sweep)
    outcome = scatterfold("train", "-m", "seed=1,2", "hydra.sweep.dir=sweep")
    assert outcome.code == 1
    assert "a job has left no result (Job 7 (task: 0) has not produced any output); the other jobs" in outcome.line
