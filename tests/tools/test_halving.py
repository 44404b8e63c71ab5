"""Successive halving: who goes on, that a survivor is the run that never paused, and what is not done twice."""

import json
import os
import signal
import time

import pytest
import yaml
from safetensors.torch import load_file

from scatterfold.kernels.errors import ConfigError
from scatterfold.tools.sweep.halving import best, rung_steps
from scatterfold.tools.sweep.trial import DROPPED, FAILED, FINISHED, RESULT, Trial

pytestmark = pytest.mark.usefixtures("warm")
HALVING = ("hydra/sweeper=halving", "hydra.sweep.dir=sweep")


@pytest.mark.parametrize(
    ("jobs", "steps", "eta", "min_steps", "expected"),
    [
        (9, 900, 3, None, [100, 300, 900]),
        (27, 900, 3, 100, [100, 300, 900]),
        (8, 800, 2, None, [100, 200, 400, 800]),
        (7, 800, 2, None, [200, 400, 800]),
        (2, 10, 3, None, [3, 10]),
        (16, 3, 2, None, [1, 3]),
        (4, 100, 4, 7, [7, 28, 100]),
        (4, 8, 2, 4, [4, 8]),
    ],
)
def test_rungs_grow_by_eta_up_to_the_full_budget(jobs, steps, eta, min_steps, expected):
    assert rung_steps(jobs, steps, eta, min_steps) == expected


def test_the_best_go_on_and_what_has_no_loss_never_does():
    losses = {0: 3.0, 1: None, 2: 1.0, 3: 1.0, 4: 2.0, 5: 5.0}
    assert best(losses, 3) == [2, 3]
    assert best(losses, 2) == [2, 3, 4]
    assert best(losses, 7) == [2]
    assert best({0: None, 1: None}, 2) == []
    assert best({0: None, 1: 4.0, 2: None, 3: None}, 2) == [1]


def test_rungs_that_cannot_be_name_the_field():
    for arguments, field in (((4, 10, 1, None), "eta=1"), ((4, 10, 2, 0), "min_steps=0"), ((4, 10, 2, 10), "steps=10")):
        with pytest.raises(ConfigError, match=rf"{field}.*allowed"):
            rung_steps(*arguments)


def test_a_survivor_is_the_run_that_never_paused(scatterfold, trials_here, tmp_path, tiny):
    words = [*tiny, "trainer.eval_every=2", "trainer.steps=6", "schedule=cosine", "logger.display=none"]
    outcome = scatterfold("train", "-m", *words, *HALVING, "optimizer.lr=1e-5,1e-2,1e-4", "hydra.sweeper.min_steps=3")
    assert outcome.code == 0, outcome.err
    assert [folder for folder, _ in trials_here] == ["0", "1", "2", "1"]
    statuses = [Trial.load(tmp_path / "sweep" / str(number)).status for number in range(3)]
    assert statuses == [DROPPED, FINISHED, DROPPED]
    survivor = tmp_path / "sweep" / "1"
    assert [path.name for path in sorted((survivor / "checkpoints").iterdir())][-1] == "step-6"
    assert "9 steps spent" not in outcome.out and "12 steps spent, the full grid takes 18 (67%)" in outcome.out

    # The best configuration runs as it is, and in one go it gives the same bits.
    again = scatterfold("train", "--config-path", "sweep", "--config-name", "best", "run_dir=again")
    assert again.code == 0, again.err
    paused, whole = lines(survivor), lines(tmp_path / "again")
    exact = ("step", "loss", "grad_norm", "lr")
    assert [[line[key] for key in exact] for line in paused if "loss" in line] == [
        [line[key] for key in exact] for line in whole if "loss" in line
    ]
    assert [line["step"] for line in paused if "valid_loss" in line] == [2, 3, 4, 6, 6]
    evaluations = [(line["step"], line["valid_loss"]) for line in whole if "valid_loss" in line]
    assert evaluations == [(e["step"], e["valid_loss"]) for e in paused if "valid_loss" in e and e["step"] != 3]
    for file in sorted((survivor / "checkpoints" / "step-6").glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "again" / "checkpoints" / "step-6" / file.name)
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert Trial.load(survivor).objective == json.loads((tmp_path / "again" / "summary.json").read_text())["valid_loss"]
    assert yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())["trainer"]["stop_after"] is None
    assert (survivor / "summary.json").read_text().count("best_valid_loss") == 1


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOSSES = {"0.1": 4.0, "0.2": 3.0, "0.3": 5.0, "0.4": float("nan"), "0.5": 1.0, "0.6": 2.0}


class Pretend:
    """Runs whose loss is a formula: at every step a little lower, in the order of LOSSES; 0.5 fails at step 2."""

    def __init__(self, monkeypatch, stop_at_call=None):
        from scatterfold.tools.sweep.trials import Sweep

        self.started = []

        def wait(sweep, words, folder, environment):
            values = dict(word.split("=", 1) for word in words)
            lr, stop = values["optimizer.lr"], int(values.get("++trainer.stop_after", values["trainer.steps"]))
            self.started.append((folder.name, stop))
            (folder / "trial.log").write_text("scatterfold: it broke\n")
            if len(self.started) == stop_at_call:
                os.kill(os.getpid(), signal.SIGTERM)
                while sweep._stopped_by is None:
                    time.sleep(0.01)
                return 0  # without a result: it saved before its rung
            if lr == "0.5" and stop >= 2:
                return 1
            loss = LOSSES[lr] + float(values.get("seed", 0)) - 0.01 * stop
            record = {"completed": stop == int(values["trainer.steps"]), "step": stop}
            record["objective"] = None if loss != loss else loss
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": stop, "loss": record["objective"]}) + "\n")
                file.write(json.dumps({"step": stop, "valid_loss": record["objective"], "bits_per_byte": 1.0}) + "\n")
            with open(environment[RESULT], "w") as file:
                json.dump(record, file)
            return 0

        monkeypatch.setattr(Sweep, "_wait", wait)
        monkeypatch.setattr("scatterfold.tools.sweep.figure.save_figure", lambda *arguments: None)  # takes its time


GRID = [f"optimizer.lr={','.join(LOSSES)}", "trainer.steps=4", "hydra.sweeper.eta=2", "hydra.sweeper.min_steps=1"]


def test_trials_that_fail_or_are_not_finite_drop_out_and_are_named(scatterfold, monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch)
    outcome = scatterfold("train", "-m", *HALVING, *GRID)
    assert outcome.code == 1  # one of them failed
    # Six at step 1, of which 0.5, 0.6 and 0.2 go on; 0.5 fails at step 2, so that the other two compete for one place.
    assert pretend.started == [(str(n), 1) for n in range(6)] + [("4", 2), ("5", 2), ("1", 2), ("5", 4)]
    assert "rung 1: 4 (0.9900), 5 (1.9900), 1 (2.9900) go on" in outcome.out
    assert "0 (3.9900), 2 (4.9900) dropped; 3 failed or not finite" in outcome.out
    assert "rung 2: 5 (1.9800) go on; 1 (2.9800) dropped; 4 failed or not finite" in outcome.out
    trials = [Trial.load(tmp_path / "sweep" / str(number)) for number in range(6)]
    assert [t.status for t in trials] == [DROPPED, DROPPED, DROPPED, DROPPED, FAILED, FINISHED]
    assert trials[3].message == "validation loss is not finite after step 1" and trials[4].message.endswith("it broke")
    assert "1 finished, 4 dropped, 1 failed" in outcome.out.splitlines()[-1]
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["trial"] for row in table["trials"]][:2] == ["5", "1"] and table["best"] == "5"
    assert table["halving"]["steps_spent"] == 1 + 2 + 1 + 1 + 1 + 4 and table["halving"]["steps_of_full_grid"] == 24


@pytest.mark.parametrize("call", [2, 8])
def test_an_interrupted_sweep_decides_no_rung_twice(scatterfold, monkeypatch, tmp_path, call):
    first = Pretend(monkeypatch, stop_at_call=call)
    assert scatterfold("train", "-m", *HALVING, *GRID).code in (0, 1)
    assert len(first.started) == call
    second = Pretend(monkeypatch)
    assert scatterfold("train", "-m", *HALVING, *GRID).code == 1
    undisturbed = [(str(n), 1) for n in range(6)] + [("4", 2), ("5", 2), ("1", 2), ("5", 4)]
    # The stopped one goes on; of the running rung, what failed before is tried once more.
    tried_again = [("4", 2)] if call == 8 else []
    assert second.started == tried_again + undisturbed[call - 1 :]
    assert json.loads((tmp_path / "sweep" / "halving.json").read_text())["decided"][1]["promoted"] == [5]


def test_seeds_are_judged_by_their_mean(scatterfold, monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch)
    seeds = ["hydra.launcher.seeds=[0,2]", "trainer.steps=2", "optimizer.lr=0.1,0.2", "hydra.launcher.parallel=1"]
    outcome = scatterfold("train", "-m", *HALVING, *seeds)
    assert outcome.code == 0, outcome.err
    assert pretend.started == [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("2", 2), ("3", 2)]
    assert "rung 1: 1 (3.9900) go on; 0 (4.9900) dropped" in outcome.out
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert table["seeds"][0] == {
        "varied": {"optimizer.lr": "0.2"},
        "trials": ["2", "3"],
        "seeds": ["0", "2"],
        "finished": 2,
        "valid_loss_mean": pytest.approx(3.98),
        "valid_loss_spread": pytest.approx(2**0.5),
    }
    assert table["best"] == "2"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["hydra.sweeper.eta=1", "seed=1,2"], "hydra.sweeper.eta=1 is too small, allowed: 2 or more"),
        (["hydra.sweeper.eta=x", "seed=1,2"], "hydra.sweeper.eta=x cannot be set"),
        (
            ["hydra.sweeper.min_steps=1000", "seed=1,2"],
            "hydra.sweeper.min_steps=1000 is out of range, allowed: 1 to 999",
        ),
        (["trainer.steps=10,20"], "trainer.steps=10, 20 differ between trials"),
        (["trainer.stop_after=3", "seed=1,2"], "trainer.stop_after=3 is what halving sets"),
        (["optimizer.lr=interval(0.1,0.2)"], "optimizer.lr=interval(0.1,0.2) names no values to halve"),
        (["hydra/launcher=basic", "seed=1,2"], "hydra/launcher cannot be changed"),
        (["hydra.launcher.seeds=[0,1]", "seed=1,2"], "seed=1 and hydra.launcher.seeds=[0, 1] both set the seed"),
        (["hydra.launcher.seeds=[1,1]", "optimizer.lr=1,2"], "holds a seed twice"),
        (["hydra.launcher.parallel=0", "seed=1,2"], "hydra.launcher.parallel=0 is too small"),
        (["router=top_k,tresh"], "router=tresh does not exist (did you mean threshold?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_halved_is_one_line_before_any_trial(scatterfold, monkeypatch, tmp_path, words, expected):
    pretend = Pretend(monkeypatch)
    outcome = scatterfold("train", "-m", "hydra/sweeper=halving", *words)
    assert outcome.code == 2 and expected in outcome.line and "allowed" in outcome.line
    assert not pretend.started and not list(tmp_path.iterdir())


def test_a_folder_of_another_sweep_is_not_halved(scatterfold, monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch)
    grid = ["trainer.steps=4", "optimizer.lr=0.1,0.2"]
    assert scatterfold("train", "-m", *HALVING, *grid).code == 0
    for words, expected in (
        ([*grid, "seed=3"], "halves other trials"),
        ([*grid, "hydra.sweeper.min_steps=2"], "rungs [2, 4] differ from sweep, allowed: eta=3 and rungs [1, 4]"),
    ):
        outcome = scatterfold("train", "-m", *HALVING, *words)
        assert outcome.code == 2 and expected in outcome.line
    (tmp_path / "sweep" / "halving.json").unlink()
    outcome = scatterfold("train", "-m", *HALVING, *grid)
    assert outcome.code == 2 and "holds a sweep without halving" in outcome.line
    assert len(pretend.started) == 3
