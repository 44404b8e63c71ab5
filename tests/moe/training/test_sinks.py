import json
import subprocess
import sys
from importlib import util

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.training import settings as settings_module
from scatterfold.moe.training.run_folder import RunFolder, read_lines
from scatterfold.moe.training.settings import LoggerSettings
from scatterfold.moe.training.sinks import MetricSinks, open_sinks

TRAIN = {"step": 2, "loss": 1.5, "lr": 0.1, "experts/dead": 1.0}
VALID = {"step": 2, "valid_loss": 1.25, "perplexity": 3.5, "bits_per_byte": 1.8}
LAYERS = [{"layer": 1, "load": [0.25, 0.75], "max_violation": 0.5, "router_entropy": 0.6}]


def log_all(sinks: MetricSinks) -> None:
    sinks.log(TRAIN)
    sinks.log(VALID)
    sinks.log_experts(2, LAYERS)


def test_json_lines_are_on_the_disk_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    sinks = open_sinks(LoggerSettings(), folder, {}, step=0)
    log_all(sinks)
    assert read_lines(folder.metrics) == [TRAIN, VALID]
    assert read_lines(folder.experts) == [{"step": 2, "layers": LAYERS}]
    sinks.close()


def test_lines_are_appended_and_no_value_breaks_json(tmp_path):
    folder = RunFolder(tmp_path)
    for loss in (1.0, float("nan")):
        sinks = open_sinks(LoggerSettings(), folder, {}, step=0)
        sinks.log({"step": 1, "loss": loss})
        sinks.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 1, "loss": None}]
    assert not folder.experts.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    with pytest.raises(ConfigError, match=r"run_dir=.* cannot be written \(metrics.jsonl: Is a directory\)"):
        open_sinks(LoggerSettings(), folder, {}, step=0)


def test_tensorboard_gets_the_scalars_and_hides_what_a_killed_run_wrote(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path)
    for resumed_at in (0, 2):
        sinks = open_sinks(LoggerSettings(tensorboard=True), folder, {}, step=resumed_at)
        log_all(sinks)
        sinks.log({"step": 3, "loss": 1.0 + resumed_at})
        sinks.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")][-1] == (3, 3.0)
    assert events.Scalars("valid/valid_loss")[0].value == 1.25
    assert events.Scalars("experts/dead")[0].value == 1.0
    assert events.Scalars("layer_1/max_violation")[0].value == 0.5


WANDB = """
import sys
from pathlib import Path
from scatterfold.moe.training.run_folder import RunFolder
from scatterfold.moe.training.settings import LoggerSettings
from scatterfold.moe.training.sinks import open_sinks
sinks = open_sinks(LoggerSettings(wandb="offline", name="trial"), RunFolder(Path(sys.argv[1])), {"seed": 1}, step=0)
sinks.log({"step": 5, "loss": 1.5})
sinks.log_experts(5, [{"layer": 1, "load": [1.0], "max_violation": 0.5}])
sinks.close()
"""


def test_wandb_offline_writes_a_run_and_keeps_its_id(tmp_path):
    result = subprocess.run([sys.executable, "-c", WANDB, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    run_id = (tmp_path / "wandb_id").read_text().strip()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))


@pytest.mark.parametrize(("option", "value"), [("wandb", "offline"), ("tensorboard", True)])
def test_a_missing_package_is_said_before_training(option, value, monkeypatch):
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None if name == option else util.find_spec(name))
    with pytest.raises(ConfigError, match=f"logger.{option}={str(value).lower()} needs the package {option}"):
        LoggerSettings(**{option: value})


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nCall wandb login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"logger.wandb=online could not start \(api_key not configured") as raised:
        open_sinks(LoggerSettings(wandb="online"), RunFolder(tmp_path), {}, step=0)
    assert "\n" not in str(raised.value)
