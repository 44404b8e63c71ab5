"""Scatterfold's own folder, against torch's reader of checkpoints and the safetensors library."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from scatterfold.kernels import CheckpointError, DataError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop import open_model, write_model
from scatterfold.moe.interop.shards import split_files
from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train
from scatterfold.parallel import Process
from scatterfold.parallel.checkpoint import Checkpointer, model_state


@pytest.fixture
def export(run, tmp_path):
    """`export(**options) -> receipt`: the run's model in tmp_path / "out"."""
    return lambda source=run, **options: write_model(
        replace(open_model(source), optimizer={}), tmp_path / "out", **options
    )


def test_the_files_hold_what_torch_reads_from_the_checkpoint(run, export, tmp_path, in_checkpoint, same_bits):
    receipt = export()
    expected = in_checkpoint(run / "checkpoints" / "step-4")
    assert any(name.endswith("expert_bias") and tensor.any() for name, tensor in expected.items())
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert receipt.step == 4 and receipt.tensors == len(expected) and receipt.files == ("model.safetensors",)
    assert receipt.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert receipt.parameters == sum(p.numel() for p in load_model(run).model.parameters())
    assert (receipt.format, receipt.to, receipt.dtype) == ("checkpoint", "scatterfold", "fp32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "scatterfold.json", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_that_is_not_the_newest_is_a_source(run, export, tmp_path, in_checkpoint, same_bits):
    step = run / "checkpoints" / "step-2"
    assert export(step).step == 2
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), in_checkpoint(step))


def test_several_files_and_their_index(run, export, tmp_path, in_checkpoint, in_files, same_bits):
    most = 6000
    receipt = export(max_shard_bytes=most)
    expected = in_checkpoint(run / "checkpoints" / "step-4")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert list(receipt.files) == files
    assert index["weight_map"].keys() == expected.keys()
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= most or len(held) == 1
    same_bits(in_files(tmp_path / "out"), expected)


def test_a_file_is_full_when_the_next_tensor_does_not_fit():
    sizes = {"a": 4, "b": 6, "c": 1, "d": 50, "e": 3}
    names = ["ab", "c", "d", "e"]
    assert split_files(sizes, 10) == {f"model-0000{i + 1}-of-00004.safetensors": list(names[i]) for i in range(4)}
    assert split_files(sizes, 64) == {"model.safetensors": list("abcde")}


def test_bf16_rounds_parameters_and_leaves_buffers(run, export, tmp_path, in_checkpoint, same_bits):
    assert export(dtype="bf16").dtype == "bf16"
    expected = in_checkpoint(run / "checkpoints" / "step-4")
    buffers = {name for name in expected if name.endswith("expert_bias")}
    rounded = {name: t if name in buffers else t.bfloat16() for name, t in expected.items()}
    assert buffers and not any(name in buffers for name, _ in load_model(run).model.named_parameters())
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), rounded)
    loaded = load_model(tmp_path / "out").model.state_dict()
    for name, tensor in rounded.items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_a_folder_keeps_its_dtype_unless_another_is_asked_for(export, tmp_path, in_files, same_bits):
    export(dtype="bf16")
    stored = open_model(tmp_path / "out")
    assert write_model(stored, tmp_path / "again").dtype == "bf16"
    same_bits(in_files(tmp_path / "again"), in_files(tmp_path / "out"))
    assert write_model(stored, tmp_path / "wide", dtype="fp32").dtype == "fp32"
    for name, tensor in in_files(tmp_path / "wide").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, in_files(tmp_path / "out")[name].float())


@pytest.mark.parametrize("most", [6000, 10**9], ids=["several files", "one file"])
def test_a_folder_loads_elsewhere_to_the_very_same_model(run, export, tmp_path, same_bits, most):
    export(max_shard_bytes=most)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert str(run.parents[1]) not in (tmp_path / "moved" / "scatterfold.json").read_text()
    original, loaded = load_model(run), load_model(tmp_path / "moved")
    same_bits(loaded.model.state_dict(), original.model.state_dict())
    assert loaded.step == 4 and loaded.tokenizer.encode("word12") == original.tokenizer.encode("word12")
    assert loaded.tokenizer.path == tmp_path / "moved" / "tokenizer.json"


def test_a_new_run_begins_with_a_folder(run, config, export, tmp_path):
    export(max_shard_bytes=6000)
    changed = {
        **config,
        "seed": 5,
        "init_from": str(tmp_path / "out"),
        "trainer": {**config["trainer"], "steps": 1},
        "router": {**config["router"], "bias_rate": 0.0},
        "optimizer": {**config["optimizer"], "lr": 1e-9},
    }
    train(changed, tmp_path / "new")
    started = load_model(tmp_path / "new").model.state_dict()
    for name, tensor in load_model(run).model.state_dict().items():
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-7)


def test_a_folder_is_no_run_to_resume(config, export, tmp_path):
    export()
    with pytest.raises(CheckpointError, match="out holds no whole checkpoint"):
        train({**config, "resume": str(tmp_path / "out")}, tmp_path / "new")


def test_what_the_optimizer_remembers_goes_along(run, tmp_path, in_checkpoint, in_files, same_bits):
    receipt = write_model(open_model(run), tmp_path / "out", max_shard_bytes=6000)
    expected = in_checkpoint(run / "checkpoints" / "step-4", "optimizer.")
    assert receipt.optimizer and any(name.endswith(".exp_avg_sq") for name in expected)
    same_bits(in_files(tmp_path / "out", "optimizer*.safetensors"), expected)
    opened = open_model(tmp_path / "out").optimizer
    same_bits({name: tensor.read() for name, tensor in opened.items()}, expected)
    assert set(receipt.files) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}


def test_what_came_with_a_model_of_another_format_gets_back_there(run, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    carried = {"generation_config.json": tmp_path / "generation_config.json"}
    stored = replace(open_model(run), carried=carried, origin={"model_type": "mixtral", "bos_token_id": 1})
    write_model(stored, tmp_path / "out")
    opened = open_model(tmp_path / "out")
    assert opened.origin == stored.origin and opened.carried.keys() == carried.keys()
    assert opened.carried["generation_config.json"].read_text() == '{"temperature": 0.6}'
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"out/generation_config.json is missing, but .*scatterfold.json names"):
        open_model(tmp_path / "out")


def test_a_model_without_a_tokenizer_is_a_model(run, tmp_path, same_bits):
    write_model(replace(open_model(run), tokenizer=None), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    stored = open_model(tmp_path / "out")
    assert stored.tokenizer is None
    same_bits(stored.build().state_dict(), load_model(run).model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"^source=.*out has no tokenizer, allowed: a folder with its tokenizer.json"
    ):
        load_model(tmp_path / "out")


def test_a_damaged_folder_is_refused(export, tmp_path):
    def damaged(change, kind=CheckpointError):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "out", folder)
        change(folder)
        with pytest.raises(kind) as caught:
            open_model(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    def describe(**changes):
        described = {**json.loads((tmp_path / "out" / "scatterfold.json").read_text()), **changes}
        return damaged(lambda folder: (folder / "scatterfold.json").write_text(json.dumps(described)))

    export(max_shard_bytes=6000)
    first = sorted((tmp_path / "out").glob("*.safetensors"))[0].name
    held = load_file(tmp_path / "out" / first)
    index = "model.safetensors.index.json"
    assert f"{first} is missing" in damaged(lambda folder: (folder / first).unlink())
    assert f"{first} is damaged" in damaged(
        lambda folder: (folder / first).write_bytes((folder / first).read_bytes()[:-9])
    )
    name = next(iter(held))
    others = {key: tensor for key, tensor in held.items() if key != name}
    assert f"does not hold {name}" in damaged(lambda folder: save_file(others, folder / first))
    wrong = {**held, name: torch.zeros(3)}
    assert f"{name} is (3,), but its config" in damaged(lambda folder: save_file(wrong, folder / first))
    more = {**held, "extra.weight": torch.zeros(3)}
    assert "holds extra.weight, which its model does not have" in damaged(
        lambda folder: save_file(more, folder / first)
    )

    def forget(folder):
        weight_map = json.loads((folder / index).read_text())["weight_map"]
        del weight_map[name]
        save_file(others, folder / first)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))

    assert f"lacks {name}" in damaged(forget)
    assert "no weight_map" in damaged(lambda folder: (folder / index).write_text("[]"))
    assert "no weight_map" in damaged(lambda folder: (folder / index).write_text("{"))
    assert "outside" in damaged(lambda folder: (folder / index).write_text('{"weight_map": {"a": "../b"}}'))
    assert "model.safetensors is missing" in damaged(lambda folder: (folder / index).unlink())
    assert "not JSON" in damaged(lambda folder: (folder / "scatterfold.json").write_text("{"))
    assert "format 7" in damaged(lambda folder: (folder / "scatterfold.json").write_text('{"format": 7}'))
    assert "its config has no model" in damaged(
        lambda folder: (folder / "scatterfold.json").write_text('{"format": 1}')
    )
    assert "its config has no model" in describe(config=[])
    assert "its config has no router" in describe(config={"model": {}})
    assert "step='many'" in describe(step="many")
    assert "is missing, but" in describe(carried=["../out/scatterfold.json"])
    damaged(lambda folder: (folder / "tokenizer.json").write_text("{}"), DataError)


def test_no_more_than_one_file_is_in_memory(tmp_path):
    """Counted by torch's allocator: 8 MB of weights through files of 1 MB."""
    model = {
        "vocab_size": 257,
        "layers": 8,
        "width": 128,
        "heads": 2,
        "ffn_width": 8,
        "expert_width": 128,
        "num_experts": 4,
    }
    config = {
        "model": model,
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    saved = ModelPlan.from_config(config).make_model()
    saved.reset_parameters(0)
    state = model_state(saved)
    largest = max(tensor.nbytes for tensor in state.values())
    total = sum(tensor.nbytes for tensor in state.values())
    Checkpointer(tmp_path / "run" / "checkpoints", process=Process()).save(
        1, state, {"config": config, "tokenizer": {"kind": "bytes"}}
    )
    most = 1_000_000
    assert total > 8 * most > 8 * largest
    # The tensors of one file, and one tensor twice while it is read: as it lies on the disk, and where it is put.
    assert most / 2 < peak_of_writing(tmp_path / "run", tmp_path / "out", most) <= most + largest
    # The safetensors library maps the file that it reads from, which counts as if it was in memory.
    assert most / 2 < peak_of_writing(tmp_path / "out", tmp_path / "again", most) <= 2 * most + largest
    assert peak_of_writing(tmp_path / "run", tmp_path / "all", 10**9) >= total


def peak_of_writing(source, output, most):
    """The most bytes that torch's allocator had given out at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        write_model(open_model(source), output, max_shard_bytes=most)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
