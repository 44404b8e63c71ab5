"""`scatterfold plan`."""

import json
from dataclasses import replace

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.estimate import DEVICES, Job, Workload
from scatterfold.moe.estimate.step_time import step_time
from scatterfold.moe.training.run_plan import RunPlan
from scatterfold.parallel import Process
from scatterfold.parallel.layout import ResolvedLayout
from scatterfold.tools.plan import layer_fit
from scatterfold.tools.plan.calibration import choose_device, document_of, read_device
from scatterfold.tools.plan.configuration import compose
from scatterfold.tools.plan.validate import report

pytestmark = pytest.mark.usefixtures("warm")
SMALL = ["model.layers=2", "model.width=32", "model.expert_width=16", "model.ffn_width=24", "data.sequence_length=32"]


def test_layouts_are_ranked_and_written(scatterfold, tmp_path):
    words = ["gpus=4", "device=cpu", "top=3", "tokens=1e6", "price_per_hour=2", "json=plan.json", *SMALL]
    outcome = scatterfold("plan", *words, "data.micro_batch_size=1", "layout.ep=2")
    assert outcome.code == 0 and not outcome.err
    document = json.loads((tmp_path / "plan.json").read_text())
    layouts = document["layouts"]
    assert layouts and all(entry["layout"]["ep"] == 2 for entry in layouts)
    speeds = [entry["time"]["tokens_per_second"] for entry in layouts]
    assert speeds == sorted(speeds, reverse=True)
    best = layouts[0]
    assert best["hours"] == pytest.approx(1e6 / speeds[0] / 3600)
    assert best["cost"] == pytest.approx(best["hours"] * 4 * 2)
    parts = [best["memory"][name] for name in best["memory"] if name not in ("moment", "rank", "total")]
    assert best["memory"]["total"] == pytest.approx(sum(parts))
    lines = outcome.out.splitlines()
    assert f"layouts  {len(layouts)} are legal, {len(layouts)} fit" in lines
    assert f"… {len(layouts) - 3} more layouts (top={len(layouts)} lists all, json=FILE has them)" in lines
    assert any(line.startswith("1 ") and "ep=2" in line and "yes" in line for line in lines)


def test_what_does_not_fit_says_why(scatterfold, tmp_path):
    words = ["gpus=8", "device=a100", "experiment=mixtral_8x7b", "top=1", "json=plan.json"]
    outcome = scatterfold("plan", *words, "layout.dp_shard=8", "layout.tp=1", "layout.pp=1")
    assert outcome.code == 0
    layouts = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert not any(entry["fits"] for entry in layouts)
    # ep and etp are cut out of the 8 ranks of dp_shard=8: every pair whose product divides 8.
    legal = sum(8 % (ep * etp) == 0 for ep in range(1, 9) for etp in range(1, 9))
    assert len(layouts) == legal == 10
    assert f"layouts  {legal} are legal, 0 fit" in outcome.out.splitlines()
    assert f"{legal} do not fit, the nearest 3 need:" in outcome.out
    assert outcome.out.count("of 74 GiB at the") == 3 and "  dp_shard=8 ep=8: " in outcome.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpus=0"], "gpus=0 is too small, allowed: 1 or more"),
        (["device=h100"], "gpus is missing"),
        (["gpus=2", "device=h10o"], "device=h10o is unknown (did you mean h100?), allowed: h100, h200, a100, b200"),
        (["gpus=2", "model=smal"], "did you mean"),
        (["gpus=2", "modle.layers=2"], "did you mean"),
        (["gpus=2", "model.layers=0"], "model.layers=0 is too small"),
        (["gpus=2", "layout.tp=3"], "layout.tp=3 does not divide the 2 ranks"),
        (["gpus=7"], "no layout of gpus=7 is legal"),
        (["gpus=2", "model.attention_sinks=true"], "model.attention_sinks=true is not what the formulas describe"),
        (["gpus=2", "engine=deepspeed"], "engine=deepspeed is not what the formulas describe"),
        (["gpus=2", "imbalance=0.5"], "imbalance=0.5 is too small"),
        (["gpus=2", "json=missing/plan.json"], "missing is no folder"),
        (["gpus=2", "-m"], "plan takes one configuration"),
        (["calibrate"], "output is missing"),
        (["calibrate", "output=missing/this.json"], "missing is no folder"),
        (["calibrate", "output=this.json", "data.sequence_length=20"], "data.sequence_length=20 is too short"),
        (["validate", "output=out", "device=missing.json"], "device=missing.json is no calibration file"),
        (["calibrate", "output=this.json", "ranks=0"], "ranks=0 is too small"),
        (["validate", "output=out", "device=missing.json", "cases=mooe"], "cases=mooe is unknown (did you mean moe?)"),
    ],
)
def test_bad_input_is_one_line(scatterfold, words, expected):
    outcome = scatterfold("plan", *words)
    assert outcome.code == 2
    assert expected in outcome.line


def test_every_command_explains_itself(scatterfold):
    for words in (["--help"], ["calibrate", "--help"], ["validate", "--help"], []):
        outcome = scatterfold("plan", *words)
        assert outcome.code == 0 and "Example:" in outcome.out and not outcome.err


def test_a_calibration_file_gives_the_profile_of_the_ranks(tmp_path):
    one, two = DEVICES["cpu"], DEVICES["h100"]
    file = tmp_path / "this.json"
    file.write_text(json.dumps(document_of({1: one, 2: two}, {"torch": "2"}, {})))
    assert read_device(file, 1).name == "cpu"
    for ranks in (2, 8):
        found = read_device(file, ranks)
        assert found.name == "h100" and found.measured
        assert (found.rates, found.inside, found.network) == (two.rates, two.inside, two.network)
    assert choose_device(str(file), 2).name == "h100"
    file.write_text(json.dumps({"format": "another"}))
    with pytest.raises(ConfigError, match="is no calibration file"):
        read_device(file, 1)


def test_the_report_states_every_error():
    def record(case, predicted, measured):
        figures = {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}
        return {
            "case": case,
            "ranks": 1,
            "changes": [f"model.layers={case}"],
            "memory": figures,
            "seconds": figures,
            "resident_growth": 5e6,
            "threads": 1,
        }

    records = [record("1", 1e6, 2e6), record("2", 3e6, 2e6)]
    conditions = {"device": "CPU", "cores": 2, "torch": "2", "python": "3", "load": [0.1, 0.2], "base": ["model=small"]}
    calibration = {"command": ["scatterfold", "plan", "calibrate", "output=this.json"]}
    document = {"records": records, "conditions": conditions, "calibration": calibration}
    page = report({**document, "command": ["scatterfold", "plan", "validate"]})
    assert "    scatterfold plan calibrate output=this.json\n    scatterfold plan validate\n" in page
    assert "| `model.layers=1` | 1 | 1.0 | 2.0 | -50.0% | 5 |" in page
    assert "Memory: mean error 50.0%, largest 50.0%; Step time: mean error 50.0%, largest 50.0%." in page


def test_a_calibration_finds_what_layers_and_steps_of_a_device_take(monkeypatch):
    """From the times of steps on a device of which everything is known."""
    seconds = {"layer_seconds": {"dense": 0.003, "moe": 0.007}, "step_seconds": 0.002}
    known = replace(DEVICES["cpu"], passes=1.0, scale={"dense": 1.5, "moe": 0.8, "head": 0.6}, **seconds)

    def time(config, length, changes, sequences, process):
        plans = [
            RunPlan.from_config(layer_fit._changed(config, layers, length, changes, sequences))
            for layers in (layer_fit.FEW, layer_fit.MANY)
        ]
        jobs = [Job(Workload.of(plan, "cpu"), ResolvedLayout()) for plan in plans]
        few, many = (step_time(job, known).total for job in jobs)
        return layer_fit._Timed(jobs[0], few, (many - few) / (layer_fit.MANY - layer_fit.FEW))

    monkeypatch.setattr(layer_fit, "_time", time)
    config = compose([*SMALL, "data.sequence_length=256", "data.global_batch_size=4"])
    job = Job(Workload.of(RunPlan.from_config(config), "cpu"), ResolvedLayout())
    found = layer_fit.with_steps(config, job, Process(), DEVICES["cpu"])
    for name in ("layer_seconds", "scale", "step_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=1e-6), name


@pytest.mark.distributed
def test_calibrate_and_validate(scatterfold, tmp_path):
    """Both commands from end to end on a tiny model; the figures themselves are measured apart."""
    assert scatterfold("plan", "calibrate", "output=this.json", "seconds=0", "device=cpu", "ranks=2", *SMALL).code == 0
    profile = json.loads((tmp_path / "this.json").read_text())["profiles"]["2"]
    assert min(profile["rates"]["fp32"].values()) > 0 and profile["inside"]["all_to_all"]["bandwidth"] > 0
    words = ["output=out", "device=this.json", "cases=ep", "steps=1", *SMALL, "model.vocab_size=257"]
    outcome = scatterfold("plan", "validate", *words)
    assert outcome.code == 0, outcome.err
    (found,) = json.loads((tmp_path / "out" / "plan.json").read_text())["records"]
    assert found["memory"]["predicted"] == pytest.approx(found["memory"]["measured"], rel=0.3)
    assert found["seconds"]["measured"] > 0
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Estimates against measurement")
