"""`scatterfold convert`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from scatterfold.moe.training.load import load_model


def test_a_folder_of_our_own_has_a_receipt_and_samples_like_the_run(scatterfold, tmp_path, finished_run):
    words = [f"source={finished_run}", "to=scatterfold", "json=receipt.json"]
    outcome = scatterfold("convert", *words, "output=exports/one")
    assert outcome.code == 0 and not outcome.err
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    parameters = sum(parameter.numel() for parameter in load_model(finished_run).model.parameters())
    assert receipt["step"] == 4 and receipt["parameters"] == parameters and receipt["dtype"] == "fp32"
    assert receipt["source"].endswith("checkpoints/step-4") and receipt["files"] == ["model.safetensors"]
    assert f"{parameters:,} (fp32)" in outcome.out and "exports/one, scatterfold, model.safetensors" in outcome.out
    assert {path.name for path in (tmp_path / "exports" / "one").iterdir()} == {"model.safetensors", "scatterfold.json"}
    prompt = ["prompt=word", "max_tokens=6"]
    sampled = scatterfold("sample", "source=exports/one", *prompt)
    assert sampled.code == 0 and sampled.out == scatterfold("sample", f"source={finished_run}", *prompt).out


@pytest.mark.parametrize("to", ["huggingface", "megatron"])
def test_there_and_back_gives_the_same_bits(scatterfold, tmp_path, finished_run, to):
    """Through another format to our own: every tensor and the text that is written with it."""
    assert scatterfold("convert", f"source={finished_run}", "output=own", "to=scatterfold").code == 0
    assert scatterfold("convert", f"source={finished_run}", "output=other", f"to={to}").code == 0
    assert scatterfold("convert", "source=other", "output=back", "to=scatterfold").code == 0
    own, back = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "back"))
    assert own.keys() == back.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, back[name]), name
    if to == "huggingface":
        prompt = ["prompt=word", "max_tokens=6"]
        assert scatterfold("sample", "source=other", *prompt).out == scatterfold("sample", "source=own", *prompt).out


def test_size_of_files_and_dtype(scatterfold, tmp_path, finished_run):
    words = [f"source={finished_run}/checkpoints/step-2", "to=scatterfold", "max_shard_bytes=9000", "dtype=bf16"]
    outcome = scatterfold("convert", *words, "output=out")
    assert outcome.code == 0 and "step 2" in outcome.out and "(bf16)" in outcome.out
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and f"out, scatterfold, {len(files)} files" in outcome.out
    assert all(file.stat().st_size < 9000 + 2000 for file in files if len(load_file(file)) > 1)
    kept = scatterfold("convert", "source=out", "output=again", "to=scatterfold")
    assert kept.code == 0 and "(bf16)" in kept.out


def test_what_an_optimizer_remembers_goes_along_when_asked_for(scatterfold, tmp_path, tiny, finished_run):
    words = [f"source={finished_run}", "output=out", "to=scatterfold"]
    outcome = scatterfold("convert", *words, "optimizer=true")
    assert outcome.code == 0 and "optimizer" in outcome.out
    assert (tmp_path / "out" / "optimizer.safetensors").exists()
    run = ["init_from=out", "init_optimizer=true", "trainer.steps=1", "run_dir=run", "logger.display=none"]
    assert scatterfold("train", *tiny, *run).code == 0


def test_training_begins_with_a_folder(scatterfold, tiny, finished_run):
    assert scatterfold("convert", f"source={finished_run}", "output=out", "to=scatterfold").code == 0
    run = ["init_from=out", "trainer.steps=1", "run_dir=run", "logger.display=none"]
    assert scatterfold("train", *tiny, *run).code == 0


def test_what_is_wrong_is_one_line_and_leaves_nothing(scatterfold, tmp_path, finished_run):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    source = f"source={finished_run}"
    for words, expected in (
        (["source=nowhere", "output=x", "to=scatterfold"], "source=nowhere: nowhere does not exist"),
        (["source=full", "output=x", "to=scatterfold"], "source=full: full holds no model"),
        ([source, "output=full", "to=scatterfold"], "output=full is not empty"),
        ([source, "output=full/file", "to=scatterfold"], "output=full/file is a file"),
        ([source, "output=full/file/x", "to=scatterfold"], "output=full/file/x"),
        ([source, f"output={finished_run}", "to=scatterfold"], "is not empty"),
        ([source, "output=x", "to=scaterfold"], "did you mean scatterfold?"),
        ([source, "output=x", "to=safetensors"], "allowed: huggingface, megatron, scatterfold"),
        ([source, "output=x"], "to is missing"),
        ([source, "output=x", "to=scatterfold", "dtype=fp8"], "dtype=fp8"),
        ([source, "output=x", "to=scatterfold", "max_shard_bytes=0"], "max_shard_bytes=0"),
        ([source, "output=x", "to=scatterfold", "architecture=llama"], "architecture=llama does not go with"),
        ([source, "output=x", "to=scatterfold", "fused=true"], "fused=True does not go with to=scatterfold"),
        ([source, "output=x", "to=huggingface", "architecture=gpt9"], "gpt9"),
        ([source, "output=x", "to=huggingface", "optimizer=true"], "optimizer=true does not go with to=huggingface"),
        ([source, "output=x", "to=scatterfold", "describe=x.yaml"], "describe=x.yaml does not go with"),
        ([source, "output=x", "to=scatterfold", "json=no/x.json"], "no/x.json"),
        ([source, "output=/proc/x", "to=scatterfold"], "output=/proc/x cannot be written"),
    ):
        outcome = scatterfold("convert", *words)
        assert outcome.code == 2, words
        assert expected in outcome.line
        assert sorted(tmp_path.rglob("*")) == before, words
