"""Training runs from a configuration to a report, as a library user starts them; the commands are tested in tools."""

import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from scatterfold.kernels import CheckpointError, ConfigError, DataError
from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train
from scatterfold.moe.training.step_guard import NonFiniteError

TIMES = {"tokens_per_second", "tflops", "step_seconds"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text with structure that a small model learns in a few steps, and a cache beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i * number}\n" for i in range(20)]
        (folder / f"{number:02d}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def make(corpus):
    """Make a configuration: `make(trainer__steps=4, seed=1)` changes fields by dotted name."""

    def make(**changes):
        config = {
            "seed": 0,
            "resume": "auto",
            "init_from": None,
            "model": {"layers": 2, "width": 16, "heads": 2, "ffn_width": 32, "expert_width": 16, "num_experts": 4},
            "router": {
                "_target_": "scatterfold.moe.routers.TopKRouter",
                "top_k": 2,
                "jitter": 0.1,
                "bias_rate": 0.01,
                "balance_micro_batch": 0.01,
                "z_loss": 0.001,
            },
            "experts": {"_target_": "scatterfold.moe.Experts"},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
            "data": {
                "path": str(corpus),
                "sequence_length": 32,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "split": "97,3",
                "cache_dir": str(corpus.parent / "cache"),
                "workers": 1,
            },
            "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
            "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 2},
            "trainer": {"steps": 8, "checkpoint_every": 4, "eval_every": 4, "eval_batches": 2, "report": False},
            "logger": {"display": "none", "expert_every": 2},
            "layout": {},
            "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
        }
        config["trainer"]["device"] = "cpu"
        for name, value in changes.items():
            node, _, field = name.rpartition("__")
            (config[node] if node else config)[field] = value
        return config

    return make


def metrics(run_dir):
    """Lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights(run_dir):
    return load_model(run_dir).model.state_dict()


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert (one / "experts.jsonl").read_text() == (other / "experts.jsonl").read_text()
    expected = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(value, expected[name]), name


RUN = """
import json, os, signal, sys
from pathlib import Path
from scatterfold.moe.training import loop, run

config, run_dir, action = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
log = loop.Loop._log

def log_then_act(self, record):
    log(self, record)
    if action != "none" and record["step"] == 6 and "loss" in record:
        os.kill(os.getpid(), getattr(signal, action))

loop.Loop._log = log_then_act
result = run.train(config, run_dir)
print("result", result.completed, result.step)
"""


@pytest.fixture(scope="session")
def run_in_a_process(warm_python):
    def run(config, run_dir, action="none"):
        arguments = [warm_python, "-c", RUN, json.dumps(config), str(run_dir), action]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run folders of uninterrupted runs by what was changed, so that tests share them."""
    folder = tmp_path_factory.mktemp("finished")
    runs = {}

    def get(make, **changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            runs[key] = folder / str(len(runs))
            train(make(**changes), runs[key])
        return runs[key]

    return get


def test_checkpoints_are_judged_by_one_text_and_the_end_by_all_of_it(make, finished):
    run_dir = finished(make)
    evaluations = [line for line in metrics(run_dir) if "valid_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 8]
    part, again, whole = [line["valid_tokens"] for line in evaluations]
    assert part == again == 2 * 4 * 32 < whole
    for line in evaluations[:2]:
        meta = json.loads((run_dir / "checkpoints" / f"step-{line['step']}" / "meta.json").read_text())
        assert meta["metric"] == line["valid_loss"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["valid_loss"] == evaluations[-1]["valid_loss"]
    assert summary["best_valid_loss"] == min(line["valid_loss"] for line in evaluations[:2])


def test_a_run_writes_everything_and_says_how_it_went(make, tmp_path, capsys):
    config = make(trainer__report=True, trainer__baselines=True, logger__display="plain", trainer__log_every=2)
    result = train(config, tmp_path / "run")
    assert result.completed
    assert result.step == 8
    assert result.bits_per_byte == pytest.approx(result.valid_loss / math.log(2), rel=0.05)
    train_lines = [line for line in metrics(result.run_dir) if "loss" in line]
    assert [line["step"] for line in train_lines] == [2, 4, 6, 8]
    for name in ("loss", "grad_norm", "lr", "train_bits_per_byte", "tokens", "skipped_steps", "aux/z_loss"):
        assert all(math.isfinite(line[name]) for line in train_lines), name
    raw = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert raw["tokens_per_second"] > 0
    assert raw["tflops"] > 0
    evaluations = [line for line in metrics(result.run_dir) if "valid_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 8]
    assert evaluations[-1]["perplexity"] == pytest.approx(math.exp(result.valid_loss))
    assert evaluations[-1]["bits_per_byte"] == result.bits_per_byte

    experts = [json.loads(line) for line in (result.run_dir / "experts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in experts] == [2, 4, 6, 8]
    for layer in experts[-1]["layers"]:
        assert sum(layer["load"]) == pytest.approx(1.0)
        assert {"max_violation", "router_entropy", "dropped_fraction", "per_token"} <= set(layer)

    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["bits_per_byte"] == result.bits_per_byte
    assert set(summary["baselines"]) == {"unigram", "trigram", "gzip"}
    assert (result.run_dir / "report" / "report.html").exists()
    assert {path.name for path in (result.run_dir / "checkpoints").iterdir()} == {"step-4", "step-8"}
    assert json.loads((result.run_dir / "environment.json").read_text())["packages"]["torch"] == torch.__version__

    out = capsys.readouterr().out
    for text in ("2 layers of width 16", "4 experts a layer", "training and", "step 8/8 | loss", "validation loss"):
        assert text in out
    for name in ("byte unigram", "byte trigram", "gzip -9", "this model", "report.html"):
        assert name in out


def test_a_killed_run_goes_on_to_the_very_same_bits(run_in_a_process, make, tmp_path, finished):
    config, run_dir = make(), tmp_path / "run"
    killed = run_in_a_process(config, run_dir, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert metrics(run_dir)[-1]["step"] == 6
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-4"]
    resumed = run_in_a_process(config, run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert "result True 8" in resumed.stdout
    assert_same_run(run_dir, finished(make))
    assert max(Counter((line["step"], line.get("valid_tokens")) for line in metrics(run_dir)).values()) == 1


def test_a_run_that_was_told_to_stop_saves_leaves_with_0_and_goes_on(run_in_a_process, make, tmp_path, finished):
    config, run_dir = make(), tmp_path / "run"
    stopped = run_in_a_process(config, run_dir, "SIGTERM")
    assert stopped.returncode == 0, stopped.stderr
    assert "result False 7" in stopped.stdout  # the step that was being taken is finished first
    assert (run_dir / "checkpoints" / "step-7").exists()
    assert not (run_dir / "summary.json").exists()
    assert train(config, run_dir).completed
    assert_same_run(run_dir, finished(make))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__precision": "bf16", "trainer__activation_checkpointing": "full", "trainer__deterministic": True},
        {"trainer__asynchronous_checkpoints": True, "trainer__activation_checkpointing": "selective"},
        {"model__num_experts": 0},
        {
            "router": {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.5},
            "schedule": {"_target_": "scatterfold.moe.training.WSD", "warmup_steps": 1},
            "trainer__gradient_clip": None,
        },
    ],
    ids=["bf16_full_deterministic", "asynchronous_selective", "dense", "threshold_wsd"],
)
def test_every_way_to_train_resumes_exactly(make, tmp_path, changes, monkeypatch):
    from scatterfold.moe.training.loop import Loop

    whole = train(make(**changes), tmp_path / "whole")
    log = Loop._log

    def stop_after_6(self, record):
        log(self, record)
        if record["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_log", stop_after_6)
        train(make(**changes), tmp_path / "parts")
    resumed = train(make(**changes), tmp_path / "parts")
    assert resumed.valid_loss == whole.valid_loss
    if changes.get("model__num_experts") == 0:
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
        assert not (tmp_path / "whole" / "experts.jsonl").exists()
    else:
        assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_figure(make, tmp_path, finished, mode):
    train(make(trainer__activation_checkpointing=mode), tmp_path)
    assert metrics(tmp_path) == metrics(finished(make))


def test_micro_batches_change_nothing_but_rounding(make, tmp_path):
    losses = []
    for size in (1, 4):
        run_dir = tmp_path / str(size)
        changes = {"router__jitter": 0.0, "router__balance_micro_batch": 0.0, "trainer__checkpoint_every": 0}
        train(make(data__micro_batch_size=size, **changes), run_dir)
        losses.append([line.get("loss", line.get("valid_loss")) for line in metrics(run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_stays_close_to_fp32(make, tmp_path, finished):
    train(make(trainer__precision="bf16"), tmp_path)
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (tmp_path, finished(make))]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_finished_run_says_so_and_goes_on_when_steps_are_raised(make, tmp_path, capsys):
    config = make(logger__display="plain", trainer__steps=4)
    first = train(config, tmp_path)
    lines = metrics(tmp_path)
    capsys.readouterr()
    again = train(config, tmp_path)
    assert again == first
    assert "has done all its 4 steps; raise trainer.steps to go on" in capsys.readouterr().out
    assert metrics(tmp_path) == lines
    further = train(make(trainer__steps=6), tmp_path)
    assert further.step == 6
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6


def test_a_run_that_was_killed_before_its_summary_gets_it(make, tmp_path):
    config = make(trainer__steps=2, trainer__report=True)
    train(config, tmp_path)
    expected = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").unlink()
    train(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


def test_weights_of_another_run_begin_a_new_one(make, tmp_path, finished):
    source = finished(make)
    result = train(
        make(init_from=str(source), trainer__steps=1, optimizer__lr=1e-9, router__bias_rate=0.0, seed=5), tmp_path
    )
    before = [line for line in metrics(source) if "valid_loss" in line][-1]["valid_loss"]
    assert result.step == 1
    assert result.valid_loss == pytest.approx(before, rel=1e-5)


def test_a_checkpoint_can_be_named(make, tmp_path, finished):
    source = finished(make)
    train(make(resume=str(source / "checkpoints" / "step-4")), tmp_path)
    assert metrics(tmp_path) == [line for line in metrics(source) if line["step"] > 4]
    assert all(torch.equal(value, weights(source)[name]) for name, value in weights(tmp_path).items())


def test_an_older_checkpoint_of_the_same_run_can_be_named(make, tmp_path, finished):
    train(make(), tmp_path)
    train(make(resume=str(tmp_path / "checkpoints" / "step-4")), tmp_path)
    assert_same_run(tmp_path, finished(make))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"resume": "never"},
            ConfigError,
            "resume=never, but run_dir=.* holds a run, allowed: auto, or another run_dir",
        ),
        ({"seed": 1}, ConfigError, r"seed=1 differs from .*step-8, allowed: 0 to resume"),
        ({"data__sequence_length": 16}, ConfigError, "data.sequence_length=16 differs from .*allowed: 32 to resume"),
        ({"data__global_batch_size": 8}, ConfigError, "data.global_batch_size=8 differs from .*allowed: 4 to resume"),
        ({"data__path": "stdlib"}, ConfigError, "data.path='stdlib' differs from"),
        ({"model__width": 32}, CheckpointError, "model.width=32 differs from .*allowed: 16 to resume, or init_from"),
        ({"router__top_k": 1}, CheckpointError, "router.top_k=1 differs from"),
        ({"resume": "/nowhere"}, CheckpointError, "resume=/nowhere: /nowhere holds no whole checkpoint"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(make, finished, changes, error, message):
    run_dir = finished(make)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(error, match=message) as raised:
        train(make(**changes), run_dir)
    assert "\n" not in str(raised.value)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_changed_corpus_is_refused(make, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"some words and the number {number}\n" * 20)
    config = make(data__path=str(text), trainer__steps=2)
    train(config, tmp_path / "run")
    (text / "3.txt").write_text("other words\n" * 50)
    with pytest.raises(DataError, match="data.path: the corpus is not the one of"):
        train({**config, "trainer": {**config["trainer"], "steps": 4}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": "x"}, ConfigError, "seed='x' is no whole number"),
        ({"trainer__stepz": 1}, ConfigError, "trainer.stepz=1 .*did you mean steps"),
        ({"trainer__precision": "fp8"}, ConfigError, "trainer.precision='fp8' is unknown, allowed: fp32, bf16"),
        ({"router__top_k": 9}, ConfigError, "router.top_k=9"),
        ({"model__max_positions": 16}, ConfigError, "data.sequence_length=32 is longer than model.max_positions=16"),
        ({"layout": {"dp_shard": 2}}, ConfigError, "layout.dp_shard=2"),
        ({"data__micro_batch_size": 3}, ConfigError, "data.micro_batch_size=3"),
        ({"data__path": "/nowhere"}, DataError, "/nowhere"),
        ({"init_from": "/nowhere"}, CheckpointError, "init_from=/nowhere: /nowhere does not exist, allowed: a run"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(make, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        train(make(**changes), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.* cannot be written"):
        train(make(), tmp_path / "file" / "run")


def test_a_bad_step_is_skipped_and_counted(make, tmp_path, monkeypatch):
    from scatterfold.parallel.engines.torch import TorchTraining

    run, calls, seen = TorchTraining.run, [], []

    def poison(self, micro_batches, scale):
        loss = run(self, micro_batches, scale)
        calls.append(1)
        (model,) = self.parts
        if len(calls) == 3:
            next(model.parameters()).grad[0, 0] = math.nan
        if len(calls) in (3, 4):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return loss

    monkeypatch.setattr(TorchTraining, "run", poison)
    train(make(), tmp_path)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert lines[2]["grad_norm"] is None  # not a number
    assert all(torch.equal(seen[0][name], value) for name, value in seen[1].items())  # router biases too
    assert lines[-1]["loss"] < lines[0]["loss"]
    meta = json.loads((tmp_path / "checkpoints" / "step-8" / "meta.json").read_text())
    assert meta["progress"]["skipped"] == 1
    assert meta["progress"]["samples"] == 32


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda module: module.blocks["1"].mlp.experts.w_in.data.fill_(math.inf), "output of blocks.1.mlp.experts"),
        (
            lambda module: module.blocks["1"].attention.register_full_backward_pre_hook(spread_nan),
            "gradient of blocks.1.attention",
        ),
    ],
    ids=["forward", "backward"],
)
def test_too_many_bad_steps_stop_the_run_and_say_where(make, tmp_path, monkeypatch, spoil, where):
    from scatterfold.parallel.engines.torch import TorchTraining

    step, calls = TorchTraining.step, []

    def step_then_spoil(self):
        step(self)
        calls.append(1)
        if len(calls) == 3:
            spoil(self.parts[0])

    monkeypatch.setattr(TorchTraining, "step", step_then_spoil)
    with pytest.raises(NonFiniteError) as raised:
        train(make(trainer__max_skipped_steps=2, trainer__checkpoint_every=1), tmp_path)
    text = str(raised.value)
    assert text.startswith("step 4, samples 16 to 19: loss")
    assert f"first in the {where}" in text
    assert "2 steps in a row were skipped (trainer.max_skipped_steps=2)" in text
    assert "\n" not in text


def spread_nan(module, gradients):
    return tuple(gradient * math.nan for gradient in gradients)


def test_a_report_that_fails_does_not_lose_the_run(make, tmp_path, monkeypatch, capsys):
    from scatterfold.moe.report import report

    def fail(folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "read_history", fail)
    result = train(make(trainer__report=True, trainer__steps=2, logger__display="plain"), tmp_path)
    assert result.completed
    assert (
        "the report could not be made (RuntimeError: no fonts); the run itself is complete" in capsys.readouterr().out
    )
    assert (tmp_path / "summary.json").exists()


def test_the_reported_loss_is_pure_cross_entropy(make, tmp_path):
    """A huge coefficient moves the gradient of the router, and leaves the loss of the first step as it was."""
    first = []
    for coefficient in (0.0, 100.0):
        run_dir = tmp_path / str(coefficient)
        train(make(router__z_loss=coefficient, trainer__steps=2, trainer__gradient_clip=None), run_dir)
        first.append(metrics(run_dir)[0])
    assert first[0]["loss"] == first[1]["loss"]
    assert first[1]["grad_norm"] > 2 * first[0]["grad_norm"]


def test_compiled_blocks_give_the_same_losses(make, tmp_path):
    changes = {"model__layers": 1, "trainer__steps": 2, "trainer__eval_every": 0, "router__jitter": 0.0}
    compiled = train(make(trainer__compile=True, **changes), tmp_path / "compiled")
    eager = train(make(**changes), tmp_path / "eager")
    assert compiled.valid_loss == pytest.approx(eager.valid_loss, rel=1e-4)


def test_a_small_model_beats_the_unigram_on_the_standard_library(make, tmp_path):
    config = make(
        model={"layers": 2, "width": 64, "heads": 2, "expert_width": 64, "num_experts": 4},
        data__path="stdlib",
        data__sequence_length=128,
        data__global_batch_size=8,
        data__micro_batch_size=8,
        data__split="99.8,0.2",
        data__cache_dir=None,
        optimizer__lr=1e-2,
        trainer__steps=60,
        trainer__eval_every=0,
        trainer__checkpoint_every=0,
        trainer__baselines=True,
    )
    started = time.monotonic()
    train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bits_per_byte"] < summary["baselines"]["unigram"]
    assert time.monotonic() - started < 300


def test_a_trained_model_is_loaded_with_its_tokenizer(make, finished):
    run_dir = finished(make)
    loaded = load_model(run_dir)
    assert (loaded.step, loaded.checkpoint.name) == (8, "step-8")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("def f")) == "def f"
    assert not loaded.model.training
    assert load_model(run_dir / "checkpoints" / "step-4").step == 4
    with pytest.raises(CheckpointError, match="source="):
        load_model(run_dir / "report")
    assert os.path.isdir(Path(run_dir) / "checkpoints")
