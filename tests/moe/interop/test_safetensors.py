"""The consolidated export, against torch's own reader of checkpoints and the safetensors library."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from scatterfold.kernels import CheckpointError, ConfigError, DataError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop import export_safetensors, safetensors
from scatterfold.moe.interop.safetensors import split_files
from scatterfold.moe.training.load import load_model
from scatterfold.moe.training.run import train
from scatterfold.parallel import Process
from scatterfold.parallel.checkpoint import Checkpointer, model_state, read_shapes
from scatterfold.parallel.checkpoint.read import read_meta


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four steps of a model with a dense and a MoE layer, an expert bias and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120)))
    return {
        "seed": 0,
        "model": {
            "layers": 2,
            "width": 16,
            "heads": 2,
            "ffn_width": 32,
            "expert_width": 16,
            "num_experts": 4,
            "first_k_dense": 1,
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "bias_rate": 0.013},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        "data": {
            "path": str(folder),
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "cache_dir": str(folder.parent / "cache"),
            "workers": 1,
            "tokenizer": str(write_tokenizer(folder.parent / "tokenizer")),
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 1},
        "trainer": {"steps": 4, "checkpoint_every": 2, "eval_every": 0, "report": False, "device": "cpu"},
        "logger": {"display": "none"},
        "layout": {},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    }


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["word1 word2 word12"] * 5,
        trainers.BpeTrainer(
            vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run folder; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, folder)
    return folder


def read_with_torch(checkpoint):
    """The model's tensors of a checkpoint, read by torch.distributed.checkpoint alone."""
    shapes = {name: shape for name, shape in read_shapes(checkpoint).items() if name.startswith("model.")}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    dcp_load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def read_export_files(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_the_files_hold_what_torch_reads_from_the_checkpoint(run, tmp_path):
    receipt = export_safetensors(run, tmp_path / "out")
    expected = read_with_torch(run / "checkpoints" / "step-4")
    assert any(name.endswith("expert_bias") and tensor.any() for name, tensor in expected.items())
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert receipt.step == 4 and receipt.tensors == len(expected) and receipt.files == ("model.safetensors",)
    assert receipt.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert receipt.parameters == sum(p.numel() for p in load_model(run).model.parameters())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "scatterfold.json", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_that_is_not_the_newest_is_a_source(run, tmp_path):
    assert export_safetensors(run / "checkpoints" / "step-2", tmp_path / "out").step == 2
    expected = read_with_torch(run / "checkpoints" / "step-2")
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_several_files_and_their_index(run, tmp_path):
    most = 6000
    receipt = export_safetensors(run, tmp_path / "out", max_shard_bytes=most)
    expected = read_with_torch(run / "checkpoints" / "step-4")
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
    assert_same_bits(read_export_files(tmp_path / "out"), expected)


def test_a_file_is_full_when_the_next_tensor_does_not_fit():
    sizes = {"a": 4, "b": 6, "c": 1, "d": 50, "e": 3}
    names = ["ab", "c", "d", "e"]
    assert split_files(sizes, 10) == {f"model-0000{i + 1}-of-00004.safetensors": list(names[i]) for i in range(4)}
    assert split_files(sizes, 64) == {"model.safetensors": list("abcde")}


def test_bf16_rounds_parameters_and_leaves_buffers(run, tmp_path):
    export_safetensors(run, tmp_path / "out", dtype="bf16")
    expected = read_with_torch(run / "checkpoints" / "step-4")
    buffers = {name for name in expected if name.endswith("expert_bias")}
    rounded = {name: t if name in buffers else t.bfloat16() for name, t in expected.items()}
    assert buffers and not any(name in buffers for name, _ in load_model(run).model.named_parameters())
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), rounded)
    loaded = load_model(tmp_path / "out").model.state_dict()
    for name, tensor in rounded.items():
        assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize("most", [6000, 10**9], ids=["several files", "one file"])
def test_an_export_loads_elsewhere_to_the_very_same_model(run, config, tmp_path, most):
    export_safetensors(run, tmp_path / "first", max_shard_bytes=most)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert str(run.parents[1]) not in (tmp_path / "moved" / "scatterfold.json").read_text()
    original, loaded = load_model(run), load_model(tmp_path / "moved")
    assert_same_bits(loaded.model.state_dict(), original.model.state_dict())
    assert loaded.step == 4 and loaded.tokenizer.encode("word12") == original.tokenizer.encode("word12")
    assert loaded.tokenizer.path == tmp_path / "moved" / "tokenizer.json"


def test_a_new_run_begins_with_an_export(run, config, tmp_path):
    export_safetensors(run, tmp_path / "out", max_shard_bytes=6000)
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


def test_an_export_is_no_run_to_resume(run, config, tmp_path):
    export_safetensors(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out holds no whole checkpoint"):
        train({**config, "resume": str(tmp_path / "out")}, tmp_path / "new")


def test_a_damaged_export_is_refused(run, tmp_path):
    def damaged(change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "out", folder)
        change(folder)
        with pytest.raises(CheckpointError) as caught:
            load_model(folder)
        return str(caught.value)

    export_safetensors(run, tmp_path / "out", max_shard_bytes=6000)
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
    assert f"model.{name} is (3,) there" in damaged(lambda folder: save_file(wrong, folder / first))
    assert "no weight_map" in damaged(lambda folder: (folder / index).write_text("[]"))
    assert "outside" in damaged(lambda folder: (folder / index).write_text('{"weight_map": {"a": "../b"}}'))
    assert "not JSON" in damaged(lambda folder: (folder / "scatterfold.json").write_text("{"))
    assert "format 7" in damaged(lambda folder: (folder / "scatterfold.json").write_text('{"format": 7}'))


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
    Checkpointer(tmp_path / "checkpoints", process=Process()).save(
        1, state, {"config": config, "tokenizer": {"kind": "bytes"}}
    )
    most = 1_000_000
    assert total > 8 * most > 8 * largest
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        export_safetensors(tmp_path, tmp_path / "out", max_shard_bytes=most)
    peak = peak_bytes(profile)
    # The tensors of one file, and one tensor twice while it is read: as it lies on the disk, and where it is put.
    assert most / 2 < peak <= most + largest
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        export_safetensors(tmp_path, tmp_path / "all")
    assert peak_bytes(profile) >= total


def peak_bytes(profile):
    """The most bytes that torch's allocator had given out at once."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def copy_with(checkpoint, folder, **changes):
    """A copy of a checkpoint whose meta.json says something else."""
    shutil.copytree(checkpoint, folder)
    meta = {key: value for key, value in {**read_meta(folder), **changes}.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_bad_source_is_refused_and_leaves_nothing(run, config, tmp_path):
    step = run / "checkpoints" / "step-4"
    wider = {**config, "model": {**config["model"], "width": 32}}
    deeper = {**config, "model": {**config["model"], "layers": 3}}
    flipped = copy_with(step, tmp_path / "flipped")
    data = next(flipped.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    spec = read_meta(step)["tokenizer"]
    sources = {
        tmp_path / "nowhere": (CheckpointError, "holds no whole checkpoint"),
        flipped: (CheckpointError, "its checksum is"),
        copy_with(step, tmp_path / "wider", config=wider): (CheckpointError, r"\(32\) here|, 32\) here|\(32,\) here"),
        copy_with(step, tmp_path / "deeper", config=deeper): (CheckpointError, "missing there, first model.blocks.2"),
        copy_with(step, tmp_path / "unnamed", config=None): (CheckpointError, "does not say which model"),
        copy_with(step, tmp_path / "lost", tokenizer={**spec, "path": "/no/tokenizer.json"}): (DataError, "tokenizer"),
    }
    before = sorted(tmp_path.rglob("*"))
    for source, (kind, message) in sources.items():
        with pytest.raises(kind, match=message) as caught:
            export_safetensors(source, tmp_path / "new" / "out")
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, source


def test_an_output_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    for output, message in ((tmp_path / "full", "is not empty"), (tmp_path / "full" / "file", "is a file")):
        with pytest.raises(ConfigError, match=f"{output} {message}"):
            export_safetensors(run, output)
    (tmp_path / "empty").mkdir()
    export_safetensors(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    assert (tmp_path / "full" / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 17))
    with pytest.raises(ConfigError, match="needs .* bytes and its disk has 17, allowed"):
        export_safetensors(run, tmp_path / "new" / "out")
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"out cannot be written \(File too large\), allowed"):
            export_safetensors(run, tmp_path / "new" / "out", max_shard_bytes=16_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
