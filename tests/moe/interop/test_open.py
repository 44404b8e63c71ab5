"""Opening a folder of any format, told by its content; what is wrong is one line."""

import json
import shutil

import pytest
import torch

from scatterfold.kernels import CheckpointError, ConfigError, DataError
from scatterfold.moe.interop import open_model, write_model
from scatterfold.parallel.checkpoint.read import read_meta


def copy_with(checkpoint, folder, **changes):
    """A copy of a checkpoint whose meta.json says something else."""
    shutil.copytree(checkpoint, folder)
    meta = {key: value for key, value in {**read_meta(folder), **changes}.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_run_opens_as_its_newest_checkpoint_and_a_checkpoint_as_itself(run, config, in_checkpoint, same_bits):
    newest = run / "checkpoints" / "step-4"
    for source, step in ((run, 4), (run / "checkpoints", 4), (newest, 4), (run / "checkpoints" / "step-2", 2)):
        stored = open_model(source)
        assert (stored.format, stored.step) == ("checkpoint", step)
        assert stored.source == run / "checkpoints" / f"step-{step}"
    stored = open_model(run)
    same_bits({name: tensor.read() for name, tensor in stored.tensors.items()}, in_checkpoint(newest))
    same_bits({name: tensor.read() for name, tensor in stored.optimizer.items()}, in_checkpoint(newest, "optimizer."))
    assert stored.config["model"] == {**config["model"], "vocab_size": stored.tokenizer.vocab_size}
    assert all(stored.config[group] == config[group] for group in ("router", "experts", "dispatcher"))


def test_the_tokenizer_is_that_of_the_run_folder_wherever_it_is(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    assert open_model(tmp_path / "moved").tokenizer.path == tmp_path / "moved" / "tokenizer.json"
    assert open_model(tmp_path / "moved" / "checkpoints" / "step-2").tokenizer.encode("word1")


@pytest.mark.parametrize("to", ["scatterfold", "huggingface", "megatron"])
def test_what_was_written_is_told_by_its_content(mixture, tmp_path, to):
    """Under a name that says nothing. The model that comes out computes what the one that went in does."""
    write_model(mixture, tmp_path / "folder", to)
    opened = open_model(tmp_path / "folder")
    assert opened.format == to
    tokens = torch.arange(12)[None] * 7 % 61
    with torch.no_grad():
        torch.testing.assert_close(opened.build()(tokens), mixture.build()(tokens), rtol=0, atol=1e-6)
    for inner in (tmp_path / "folder").glob("release"):  # where Megatron's tensors lie
        assert open_model(inner).format == to


def test_a_folder_that_holds_no_model_says_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for source, message in (
        ("nowhere", "nowhere does not exist, allowed: a run folder, "),
        ("file", "file is no folder, allowed: a run folder, "),
        ("empty", "empty holds no model (none of checkpoints/, meta.json, scatterfold.json, config.json "),
        ("run", "run holds no whole checkpoint, allowed: "),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_model(tmp_path / source)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_that_is_not_what_it_says_is_refused(run, config, tmp_path):
    step = run / "checkpoints" / "step-4"
    wider = {**config, "model": {**config["model"], "width": 32}}
    deeper = {**config, "model": {**config["model"], "layers": 3}}
    shallower = {**config, "model": {**config["model"], "layers": 1, "num_experts": 0}}
    flipped = copy_with(step, tmp_path / "flipped")
    data = next(flipped.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    lost = copy_with(step, tmp_path / "lost")
    next(lost.glob("*.distcp")).unlink()
    short = copy_with(step, tmp_path / "short")
    data = next(short.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-7])
    spec = read_meta(step)["tokenizer"]
    sources = {
        flipped: (CheckpointError, "its checksum is"),
        lost: (CheckpointError, "distcp is missing, expected"),
        short: (CheckpointError, "distcp has .* bytes, expected"),
        copy_with(step, tmp_path / "wider", config=wider): (CheckpointError, r"16\), but its config makes it .*32"),
        copy_with(step, tmp_path / "deeper", config=deeper): (CheckpointError, "lacks blocks.2.attention_norm.weight"),
        copy_with(step, tmp_path / "shallower", config=shallower): (CheckpointError, "which its model does not have"),
        copy_with(step, tmp_path / "unnamed", config=None): (CheckpointError, "does not say which model"),
        copy_with(step, tmp_path / "gone", tokenizer={**spec, "path": "/no/tokenizer.json"}): (DataError, "tokenizer"),
    }
    for source, (kind, message) in sources.items():
        with pytest.raises(kind, match=message) as caught:
            open_model(source)
        assert "\n" not in str(caught.value), source
    assert open_model(flipped, checked=False).step == 4  # whoever reads the tensors later checks them then


def test_an_option_of_another_format_is_refused(run):
    with pytest.raises(ConfigError, match="describe=shape.yaml does not go with .*run, allowed: for a Megatron"):
        open_model(run, describe="shape.yaml")
    assert open_model(run, describe=None).step == 4
