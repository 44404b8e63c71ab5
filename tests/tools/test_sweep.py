"""Sweeps: a process and a folder for each trial, failures, what is not run again, and the report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from scatterfold.tools.sweep.figure import save_figure
from scatterfold.tools.sweep.placing import shares
from scatterfold.tools.sweep.results import read_sweep, shown, varied_keys
from scatterfold.tools.sweep.trial import FAILED, FINISHED, Trial

pytestmark = pytest.mark.usefixtures("warm")
QUICK = ("trainer.steps=2", "trainer.checkpoint_every=0", "logger.display=none")


@pytest.fixture(scope="module")
def sweep(warm, tmp_path_factory, tiny):
    """The folder of a sweep of which one trial cannot run, and what it printed."""
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    command = [sys.executable, "-m", "scatterfold.tools.cli", "train", "-m", *tiny, *QUICK]
    command += ["router.top_k=1,9,2", f"hydra.sweep.dir={folder}", "hydra.launcher.parallel=2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder, done


def trials(folder):
    return [Trial.load(folder / str(number)) for number in range(3)]


def test_a_failing_trial_does_not_stop_the_others(sweep):
    folder, done = sweep
    assert done.returncode == 1 and not done.stderr
    first, second, third = trials(folder)
    assert [trial.status for trial in (first, second, third)] == [FINISHED, FAILED, FINISHED]
    assert first.objective != third.objective and first.objective > 0
    assert second.exit_code == 2 and "router.top_k=9" in second.message
    table = [line.split()[:2] for line in done.stdout.splitlines()[-7:]]
    assert table[1][0] in "02" and table[3] == ["1", "9"]  # the report, best first, the failed one last
    ends = [line for line in done.stdout.splitlines() if "finished in" in line or "failed with" in line]
    assert len(ends) == 3
    assert any(line.startswith("trial 1 (router.top_k=9): failed with exit code 2") for line in ends)
    assert "2 finished, 1 failed" in done.stdout.splitlines()[-1]


def test_each_trial_has_its_own_folder_with_its_own_config(sweep):
    folder, _ = sweep
    for number, top_k in ((0, 1), (2, 2)):
        text = (folder / str(number) / "config.yaml").read_text()
        assert f"top_k: {top_k}\n" in text
        assert json.loads((folder / str(number) / "summary.json").read_text())["steps"] == 2
    assert {path.name for path in (folder / "1").iterdir()} == {"trial.json", "trial.log"}
    written = {"multirun.yaml", "best.yaml", "sweep.csv", "sweep.json", "sweep.png"}
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2", *written}


def test_finished_trials_are_not_run_again_and_new_ones_get_new_folders(sweep, scatterfold, tiny, monkeypatch):
    folder, _ = sweep
    from scatterfold.tools.sweep import trials as module

    started = []

    def fake(self, words, place, environment):
        started.append((words[-1], place.name))
        (place / "trial.log").write_text("scatterfold: not this time\n")
        return 1

    monkeypatch.setattr(module.Sweep, "_wait", fake)
    before = {number: (folder / number / "metrics.jsonl").stat().st_mtime_ns for number in ("0", "2")}
    outcome = scatterfold("train", "-m", *tiny, *QUICK, "router.top_k=4,2,9,1", f"hydra.sweep.dir={folder}")
    assert outcome.code == 1
    assert [place for _, place in started] == ["3", "1"]  # the new one in a new folder, the failed one again in its own
    assert outcome.out.count("finished before") == 2
    assert before == {number: (folder / number / "metrics.jsonl").stat().st_mtime_ns for number in ("0", "2")}


def test_the_report_shows_every_trial_best_first(sweep, scatterfold, tmp_path):
    folder, _ = sweep
    outcome = scatterfold("sweep", "report", f"source={folder}", "json=report.json")
    assert outcome.code == 0 and not outcome.err
    header, *rows = outcome.out.splitlines()
    assert header.split()[:2] == ["trial", "router.top_k"]
    table = json.loads((tmp_path / "report.json").read_text())
    assert table["varied"] == ["router.top_k"]
    good = [trial for trial in table["trials"] if trial["status"] == FINISHED]
    assert [trial["valid_loss"] for trial in good] == sorted(trial["valid_loss"] for trial in good)
    assert table["trials"][: len(good)] == good
    for trial in good:
        number = trial["trial"]
        assert trial["valid_loss"] == Trial.load(folder / number).objective
        assert trial["steps"] == 2 and trial["tokens_per_second"] > 0 and trial["bits_per_byte"] > 0
        assert any(row.split()[0] == number and f"{trial['valid_loss']:.4f}" in row for row in rows)
    assert any("failed" in row and row.split()[0] == "1" for row in rows)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "sweep.json").read_text()) == table
    with open(folder / "sweep.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["trial"], row["router.top_k"], row["status"]) for row in written] == [
        (trial["trial"], trial["varied"]["router.top_k"], trial["status"]) for trial in table["trials"]
    ]
    assert float(written[0]["valid_loss"]) == good[0]["valid_loss"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["router"]["top_k"] == int(good[0]["varied"]["router.top_k"]) and best["run_dir"] is None


def made_up(folder, number, status, losses):
    """A trial folder as a sweep leaves it."""
    place = folder / str(number)
    place.mkdir(parents=True)
    Trial(
        number, (f"optimizer.lr={number}", "seed=1"), status=status, message="why" if status == FAILED else None
    ).save(place)
    with open(place / "metrics.jsonl", "w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "loss": loss, "tokens_per_second": 10.0 * step}) + "\n")
        if losses:
            file.write(json.dumps({"step": len(losses), "valid_loss": losses[-1] + 1, "bits_per_byte": 2.0}) + "\n")


def test_results_are_what_the_folders_say(tmp_path):
    made_up(tmp_path, 0, "finished", [float(40 - step) for step in range(40)])
    made_up(tmp_path, 1, "running", [5.0])
    made_up(tmp_path, 2, "failed", [])
    made_up(tmp_path, 10, "unfinished", [3.0, 2.5])
    results = read_sweep(tmp_path)
    assert [result.name for result in results] == ["0", "10", "1", "2"]
    best = results[0]
    assert (best.train_loss, best.valid_loss, best.steps) == (1.5, 2.0, 40)
    assert best.tokens_per_second == 305.0
    assert varied_keys(results) == ["optimizer.lr"]
    assert save_figure(results, varied_keys(results), tmp_path) == tmp_path / "sweep.png"
    assert save_figure(results[3:], [], tmp_path) is None


def test_a_sampled_number_is_shown_short_and_a_word_whole():
    values = ("0.0064664227174145595", "123456789", "1e-3", "global_balance", None)
    assert [shown(value) for value in values] == ["0.006466", "1.235e+08", "1e-3", "global_balance", ""]


def test_seeds_of_a_configuration_are_taken_together(tmp_path, scatterfold):
    losses = {("0.1", "0"): 3.0, ("0.1", "1"): 5.0, ("0.2", "0"): 3.5, ("0.2", "1"): 3.7, ("0.3", "0"): 1.0}
    for number, ((lr, seed), loss) in enumerate(losses.items()):
        made_up(tmp_path, number, "finished" if lr != "0.3" else "unfinished", [loss - 1])
        Trial(number, (f"optimizer.lr={lr}", f"seed={seed}"), status=Trial.load(tmp_path / str(number)).status).save(
            tmp_path / str(number)
        )
        (tmp_path / str(number) / "config.yaml").write_text(f"seed: {seed}\nrun_dir: x\ntrainer: {{stop_after: 3}}\n")
    outcome = scatterfold("sweep", "report", f"source={tmp_path}")
    assert outcome.code == 0, outcome.err
    seeds = json.loads((tmp_path / "sweep.json").read_text())["seeds"]
    assert [(group["varied"]["optimizer.lr"], group["trials"]) for group in seeds] == [
        ("0.2", ["2", "3"]),
        ("0.1", ["0", "1"]),
        ("0.3", ["4"]),
    ]
    assert [group["valid_loss_mean"] for group in seeds] == [pytest.approx(3.6), pytest.approx(4.0), None]
    assert seeds[1]["valid_loss_spread"] == pytest.approx(2**0.5)  # of 3 and 5: sqrt(((3-4)^2 + (5-4)^2) / (2-1))
    row = next(line for line in outcome.out.splitlines() if line.startswith("0.1"))
    assert row.split() == ["0.1", "2", "4.0000", "±", "1.4142", "0,", "1"]
    # The best is the best seed of the best configuration, not the lucky seed of another, nor one that has not finished.
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == {
        "seed": 0,
        "run_dir": None,
        "trainer": {"stop_after": None},
    }
    assert "best: trial 2" in outcome.out and (tmp_path / "sweep.png").exists()


def test_wandb_has_a_group_for_the_sweep_and_a_name_for_what_varies(
    scatterfold, trials_here, tiny, monkeypatch, tmp_path
):
    begun = []

    def init(**settings):
        begun.append(settings)
        ignore = lambda *arguments, **named: None  # noqa: E731
        return SimpleNamespace(log=ignore, define_metric=ignore, finish=ignore)

    monkeypatch.setattr("wandb.init", init)
    for name in ("WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    words = [*tiny, *QUICK, "trainer.steps=1", "logger.wandb=offline", "router.top_k=1,2"]
    outcome = scatterfold("train", "-m", *words, "hydra.sweep.dir=sweeps/ks", "hydra.launcher.seeds=[5]")
    assert outcome.code == 0, outcome.err
    assert [(run["group"], run["name"]) for run in begun] == [("ks", f"router.top_k={k} seed=5") for k in (1, 2)]
    words[-1] = "router.top_k=1"
    assert scatterfold("train", "-m", *words, "logger.group=mine", "hydra.sweep.dir=other").code == 0
    assert [(run["group"], run["name"]) for run in begun[2:]] == [("mine", "trial 0")]
    assert "WANDB_RUN_GROUP" not in os.environ


def test_a_report_of_nothing_is_one_line(scatterfold, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, expected in ((["source=nowhere"], "nowhere"), (["source=empty"], "empty"), (["sorce=x"], "source?")):
        outcome = scatterfold("sweep", "report", *words)
        assert outcome.code == 2 and expected in outcome.line


def test_runs_of_another_launcher_are_told_apart_by_their_configs(tmp_path):
    for number, width in ((0, 16), (1, 32)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.yaml").write_text(
            f"run_dir: {number}\nmodel:\n  width: {width}\n  layers: 2\n"
        )
    results = read_sweep(tmp_path)
    assert varied_keys(results) == ["model.width"]
    assert {result.status for result in results} == {"unfinished"}


def test_a_stopped_sweep_saves_its_trial_and_goes_on_later(tmp_path, tiny):
    command = [sys.executable, "-m", "scatterfold.tools.cli", "train", "-m", *tiny, "seed=1,2", "hydra.sweep.dir=sweep"]
    command += ["trainer.steps=100000", "trainer.checkpoint_every=0", "trainer.log_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert Trial.load(tmp_path / "sweep" / "0").status == "unfinished"
    assert list((tmp_path / "sweep" / "0" / "checkpoints").iterdir())
    assert not (tmp_path / "sweep" / "1").exists()
    assert "2 unfinished" in out.splitlines()[-1]


def test_hydras_own_launcher_trains_in_this_process(scatterfold, tmp_path, tiny):
    words = ["router.top_k=9,1", "hydra/launcher=basic", "hydra.sweep.dir=sweep"]
    outcome = scatterfold("train", "-m", *tiny, *QUICK, *words)
    assert outcome.code == 1 and "router.top_k=9" in outcome.line
    failed, finished = (Trial.load(tmp_path / "sweep" / str(number)) for number in range(2))
    assert failed.status == FAILED and "router.top_k=9" in failed.message
    assert finished.status == FINISHED and finished.steps == 2
    folder = tmp_path / "sweep" / "1"
    assert json.loads((folder / "summary.json").read_text())["valid_loss"] == finished.objective
    assert not (folder / ".hydra").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}
    assert "1 finished, 1 failed" in outcome.out.splitlines()[-1]


def test_a_folder_may_be_named_after_the_overrides(scatterfold, tmp_path, tiny, monkeypatch):
    from scatterfold.tools.sweep import trials as module

    monkeypatch.setattr(module.Sweep, "_wait", lambda self, words, folder, environment: 0)
    words = ["router.top_k=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir='${hydra.job.override_dirname}'"]
    assert scatterfold("train", "-m", *words).code == 0
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "router.top_k=1",
        "router.top_k=2",
        "multirun.yaml",
        "sweep.csv",
        "sweep.json",
    }


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, {"OMP_NUM_THREADS": "4"}), (4, {"CUDA_VISIBLE_DEVICES": "0,2"}), (1, {})]
)
def test_trials_side_by_side_share_the_machine(monkeypatch, gpus, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("scatterfold.parallel.process.usable_cores", lambda: 8)
    assert shares(1) == [{}]
    assert len(shares(2)) == 2
    assert shares(2)[0] == expected
