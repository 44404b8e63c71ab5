import json
import os

import pytest
import yaml

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.run_folder import RunFolder, read_lines
from scatterfold.parallel.disk import write_whole


def write(path, records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    train = [{"step": step, "loss": 1.0} for step in range(1, 8)]
    valid = [{"step": step, "valid_loss": 1.0} for step in (2, 4, 6)]
    lines = [*train[:2], valid[0], *train[2:4], valid[1], *train[4:6], valid[2], train[6]]
    write(folder.metrics, lines, end='{"step": 8, "lo')
    write(folder.experts, [{"step": step, "layers": []} for step in (4, 8)])
    folder.cut_back(step=4, evaluated_step=2)
    assert read_lines(folder.metrics) == [*train[:2], valid[0], *train[2:4]]
    assert read_lines(folder.experts) == [{"step": 4, "layers": []}]
    assert folder.metrics.read_text().endswith("}\n")
    folder.cut_back(step=0, evaluated_step=None)
    assert folder.metrics.read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts.jsonl", "metrics.jsonl"]


def test_the_config_is_written_as_it_reads(tmp_path):
    folder = RunFolder(tmp_path)
    config = {"seed": 0, "model": {"width": 8, "moe_layers": None}, "data": {"path": "å"}, "optimizer": {"lr": 1e-3}}
    folder.write_config(config)
    assert yaml.safe_load(folder.config.read_text()) == config
    assert folder.config.read_text().startswith("seed: 0\nmodel:\n")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written \(run: Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").create()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    message = "No space left on device"
    with pytest.raises(ConfigError, match=message), folder.writing(folder.metrics), open("/dev/full", "w") as file:
        file.write("x")
