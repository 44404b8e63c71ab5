"""Writing a model: the folder is whole or not there, the source stays as it is, and what is wrong is one line."""

import errno
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch

from scatterfold.kernels import CheckpointError, ConfigError
from scatterfold.moe.interop import folder as folder_module
from scatterfold.moe.interop import open_model, write_model
from scatterfold.parallel.checkpoint.lazy import LazyTensor, in_memory

FORMATS = ("scatterfold", "huggingface", "megatron")


@pytest.mark.parametrize("to", FORMATS)
def test_the_source_is_not_touched_and_nothing_else_appears(run, mixture, tmp_path, untouched, to):
    write_model(open_model(run), tmp_path / "a" / "b" / "own")
    write_model(mixture, tmp_path / "a" / "other", to)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b", "other"}


def test_an_output_that_holds_something_is_refused(run, tmp_path, untouched):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    stored = open_model(run)
    for output, message in (
        (tmp_path / "full", "is not empty"),
        (tmp_path / "full" / "file", "is a file"),
        (tmp_path / "full" / "file" / "in", "is a file, or lies in one"),
        (run, "is not empty"),
        (run / "checkpoints" / "step-4", "is not empty"),
        (run / "checkpoints" / "step-4" / "out", "lies in its source"),
    ):
        with pytest.raises(ConfigError, match=f"^output={output} {message}"):
            write_model(stored, output)
    (tmp_path / "empty").mkdir()
    write_model(stored, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    assert (tmp_path / "full" / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_an_option_that_does_not_fit_is_refused_before_anything_is_made(mixture, tmp_path):
    for options, message in (
        ({"to": "safetensors"}, "to=safetensors is unknown, allowed: scatterfold, huggingface, megatron"),
        ({"dtype": "fp8"}, "dtype=fp8 is unknown, allowed: fp32, bf16, fp16"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 is too small, allowed: 1 or more"),
        ({"architecture": "llama"}, "architecture=llama does not go with to=scatterfold, allowed: no option"),
        (
            {"to": "huggingface", "fast": True},
            "fast=True does not go with to=huggingface, allowed: architecture, fused",
        ),
        ({"to": "huggingface", "architecture": "llama"}, "model.num_experts=4 does not fit llama"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            write_model(mixture, tmp_path / "new" / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_whole_is_refused_before_anything_is_made(mixture, tmp_path):
    name = "blocks.1.mlp.experts.w_out"
    for tensors, message in (
        ({key: tensor for key, tensor in mixture.tensors.items() if key != name}, f"memory lacks {name}"),
        ({**mixture.tensors, name: in_memory(torch.zeros(4))}, rf"memory: {name} is \(4,\), but its config makes it"),
        ({**mixture.tensors, "more": in_memory(torch.zeros(4))}, "memory holds more, which its model does not have"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_model(replace(mixture, tensors=tensors), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_is_full_leaves_nothing(mixture, tmp_path, monkeypatch, to):
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 17))
    with pytest.raises(ConfigError, match="needs .* bytes and its disk has 17, allowed"):
        write_model(mixture, tmp_path / "new" / "out", to)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"out cannot be written \(File too large\), allowed") as caught:
            write_model(mixture, tmp_path / "new" / "out", to, max_shard_bytes=8_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_names_are_written_leaves_nothing(mixture, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module, "flush", full)
    with pytest.raises(ConfigError, match=r"out cannot be written \(No space left on device\), allowed"):
        write_model(mixture, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_breaks_while_it_is_read_leaves_nothing(mixture, tmp_path, to):
    def broken(index):
        raise CheckpointError("memory: blocks.1.mlp.experts.w_out cannot be read: Input/output error")

    name = "blocks.1.mlp.experts.w_out"
    tensor = mixture.tensors[name]
    tensors = {**mixture.tensors, name: LazyTensor(tensor.shape, tensor.dtype, broken)}
    with pytest.raises(CheckpointError, match="w_out cannot be read: Input/output error"):
        write_model(replace(mixture, tensors=tensors), tmp_path / "new" / "out", to, max_shard_bytes=2_000)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(mixture, tmp_path):
    def interrupted(index):
        raise KeyboardInterrupt

    tensors = {**mixture.tensors, "head.weight": LazyTensor(torch.Size((61, 16)), torch.float32, interrupted)}
    with pytest.raises(KeyboardInterrupt):
        write_model(replace(mixture, tensors=tensors), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_a_receipt_says_what_was_written(mixture, tmp_path):
    receipt = write_model(mixture, tmp_path / "out", dtype="bf16")
    parameters = sum(tensor.shape.numel() for tensor in mixture.tensors.values())
    assert receipt.record() == {
        "source": "memory",
        "format": "checkpoint",
        "output": str(tmp_path / "out"),
        "to": "scatterfold",
        "step": 7,
        "dtype": "bf16",
        "tensors": len(mixture.tensors),
        "parameters": parameters,
        "bytes": 2 * parameters,
        "optimizer": False,
        "files": ("model.safetensors",),
    }
