"""Checkpoints of one process: exact, whole or not there, and read with care."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import threading
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from scatterfold.kernels import CheckpointError
from scatterfold.parallel import Process
from scatterfold.parallel.checkpoint import (
    Checkpointer,
    check_fits,
    checkpointer,
    checkpoints,
    find_checkpoint,
    load,
    model_state,
    newest_checkpoint,
    open_checkpoint,
    read_meta,
    read_shapes,
)
from scatterfold.parallel.engines import TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Net(nn.Module):
    """Two layers that share a matrix with a third name, and both kinds of buffers."""

    def __init__(self, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.tied = nn.Linear(width, 4)
        self.tied.weight = self.second.weight
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def forward(self, x):
        return (self.second(self.first(x).relu()) + self.tied(self.first(x))).square().sum()


class Counting(torch.optim.Optimizer):
    """An optimizer that remembers plain numbers."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["decay"] = state.get("decay", 1.0) * 0.5
                parameter -= group["lr"] * state["decay"] * parameter.grad


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "numbers": lambda model: Counting(model.parameters()),
}


def engine_of(optimizer="adamw", **shape):
    return TorchEngine().prepare(Net(**shape), OPTIMIZERS[optimizer], process=Process())


def learn(engine, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        engine.run([{"x": x}], scale=1.0)
        engine.clip(1.0)
        engine.step()
        engine.zero_grad()
    return engine


def keeper(folder, **options):
    return Checkpointer(folder, process=Process(), **options)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def copy_of(engine):
    return {name: tensor.clone() for name, tensor in engine.state_dict().items()}


def step_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A folder with step-1 and step-2 of the same run."""
    engine = learn(engine_of(), 1)
    keep = keeper(tmp_path)
    keep.save(1, engine.state_dict(), {"note": "first"})
    keep.save(2, learn(engine, 1, 1).state_dict(), {"note": "second"})
    return tmp_path


def rewrite(path, name, content):
    """Replace a file of a checkpoint as someone would who can count: sizes and checksums fit."""
    (path / name).write_bytes(content)
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][name] = [len(content), zlib.crc32(content)]
    (path / "meta.json").write_text(json.dumps(meta))


class TestExact:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("first", [0, 2])
    def test_n_steps_saved_and_loaded_and_n_steps_equal_2n_steps(self, tmp_path, optimizer, first):
        """Also from step 0, where the optimizer has no state yet and saving must not give it one."""
        whole = learn(engine_of(optimizer), first)
        keeper(tmp_path).save(first, whole.state_dict(), {})
        learn(whole, 2, first)
        resumed = engine_of(optimizer, seed=1)
        resumed.load(tmp_path / f"step-{first}")
        same(learn(resumed, 2, first).state_dict(), whole.state_dict())

    def test_load_replaces_the_state_of_an_optimizer_that_has_run(self, saved):
        engine = learn(engine_of(seed=1), 3)
        engine.load(saved / "step-2")
        same(engine.state_dict(), learn(engine_of(), 2).state_dict())

    def test_hyper_parameters_come_from_the_config(self, saved):
        engine = engine_of()
        engine.optimizer.param_groups[0]["lr"] = 0.5
        engine.load(saved / "step-2")
        assert engine.optimizer.param_groups[0]["lr"] == 0.5

    def test_a_tied_matrix_is_stored_once_and_caches_are_not(self, saved):
        names = {name for name in read_shapes(saved / "step-1") if name.startswith("model.")}
        assert names == {
            f"model.{n}" for n in ("first.weight", "first.bias", "second.weight", "second.bias", "tied.bias", "bias")
        }

    def test_weights_alone(self, saved):
        model, trained = Net(seed=1), learn(engine_of(), 1)
        load(saved / "step-1", model_state(model))
        same(model_state(model), model_state(trained.parts[0]))
        fresh = engine_of(seed=1)
        fresh.load_weights(open_checkpoint(saved / "step-1", "model."), saved / "step-1")
        assert not fresh.optimizer.state
        same(model_state(fresh.parts[0]), model_state(trained.parts[0]))

    def test_meta_data_stand_beside_the_tensors(self, saved):
        meta = read_meta(saved / "step-2")
        assert (meta["note"], meta["step"], meta["metric"]) == ("second", 2, None)

    def test_saving_a_step_again_replaces_it(self, saved):
        engine = learn(engine_of(), 5)
        keeper(saved).save(2, engine.state_dict(), {"note": "again"})
        assert step_names(saved) == ["step-1", "step-2"]
        assert read_meta(saved / "step-2")["note"] == "again"
        other = engine_of()
        other.load(saved / "step-2")
        same(other.state_dict(), engine.state_dict())

    def test_what_cannot_be_replaced_stays(self, saved, monkeypatch):
        rename = os.rename

        def fail_to_publish(source, target):
            if Path(target).name == "step-2" and not Path(source).name.endswith(".removed"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail_to_publish)
        with pytest.raises(CheckpointError, match="step-2 could not be written: Input/output error"):
            keeper(saved).save(2, engine_of().state_dict(), {"note": "again"})
        assert read_meta(newest_checkpoint(saved))["note"] == "second"


class TestAsynchronous:
    def test_what_is_saved_is_the_state_at_the_call(self, tmp_path, monkeypatch):
        engine = learn(engine_of(), 2)
        before, may_write = copy_of(engine), threading.Event()
        write = Checkpointer._write
        monkeypatch.setattr(Checkpointer, "_write", lambda *args: (may_write.wait(10), write(*args)))
        keep = keeper(tmp_path, asynchronous=True)
        keep.save(2, engine.state_dict(), {})
        learn(engine, 2, 2)
        with torch.no_grad():
            for tensor in engine.state_dict().values():
                tensor.fill_(7)
        assert newest_checkpoint(tmp_path) is None
        may_write.set()
        keep.wait()
        resumed = engine_of(seed=1)
        resumed.load(tmp_path / "step-2")
        same(resumed.state_dict(), before)

    @pytest.mark.parametrize("ask", ["save", "wait"])
    def test_an_error_surfaces_at_the_next_call(self, tmp_path, monkeypatch, ask):
        engine = learn(engine_of(), 1)
        keep = keeper(tmp_path, asynchronous=True)
        with monkeypatch.context() as broken:
            broken.setattr(Checkpointer, "_publish", refuse(errno.ENOSPC))
            keep.save(1, engine.state_dict(), {})
            with pytest.raises(CheckpointError, match="No space left"):
                keep.save(2, engine.state_dict(), {}) if ask == "save" else keep.wait()
        keep.save(3, engine.state_dict(), {})
        keep.wait()
        assert step_names(tmp_path) == ["step-3"]


def refuse(code):
    def action(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return action

    def test_close_waits_and_logs(self, tmp_path, monkeypatch, caplog):
        keep = keeper(tmp_path, asynchronous=True)
        keep.save(1, {"model.w": torch.ones(1)}, {})
        keep.close()
        assert step_names(tmp_path) == ["step-1"]
        monkeypatch.setattr(Checkpointer, "_publish", refuse(errno.ENOSPC))
        keep.save(2, {"model.w": torch.ones(1)}, {})
        keep.close()
        assert "step-2 could not be written: No space left on device" in caplog.text


class TestKeeping:
    def save_all(self, folder, metrics, **options):
        keep, state = keeper(folder, **options), {"model.w": torch.ones(1)}
        for step, metric in enumerate(metrics, start=1):
            keep.save(step, state, {}, metric)
        return {int(path.name.removeprefix("step-")) for path in folder.iterdir()}

    @pytest.mark.parametrize(
        ("metrics", "options", "kept"),
        [
            ([None] * 4, {"keep_last": 2}, {3, 4}),
            ([3.0, 1.0, 2.0, 2.5, 4.0], {"keep_last": 2}, {2, 4, 5}),
            ([3.0, 1.0, 2.0, 2.5, 4.0], {"keep_last": 2, "keep_best": False}, {4, 5}),
            ([1.0, None, float("nan"), float("inf"), 2.0], {"keep_last": 1}, {1, 5}),
            ([1.0, 1.0, 1.0], {"keep_last": 1}, {1, 3}),
            ([5.0, 4.0, 3.0], {"keep_last": 1}, {3}),
        ],
    )
    def test_last_and_best(self, tmp_path, metrics, options, kept):
        assert self.save_all(tmp_path, metrics, **options) == kept

    def test_newest_is_what_was_written_last(self, tmp_path):
        """A run that went back to an earlier checkpoint goes on from what it has written since."""
        self.save_all(tmp_path, [None] * 4, keep_last=4)
        keeper(tmp_path, keep_last=1).save(2, {"model.w": torch.ones(1)}, {})
        assert newest_checkpoint(tmp_path) == tmp_path / "step-2"
        assert step_names(tmp_path) == ["step-2"]

    def test_nothing_is_removed_when_a_save_fails(self, saved, monkeypatch):
        monkeypatch.setattr(Checkpointer, "_publish", refuse(errno.EDQUOT))
        with pytest.raises(
            CheckpointError, match=r"step-3 could not be written: Disk quota exceeded, .* bytes are free"
        ):
            keeper(saved, keep_last=1).save(3, engine_of().state_dict(), {})
        assert step_names(saved) == ["step-1", "step-2"]

    def test_a_damaged_one_is_neither_counted_nor_removed(self, saved):
        (saved / "step-1" / "meta.json").unlink()
        keeper(saved, keep_last=1).save(3, engine_of().state_dict(), {})
        assert step_names(saved) == ["step-1", "step-3"]

    def test_hidden_folders_of_dead_runs_are_removed(self, saved):
        host = socket.gethostname()
        dead, alive, elsewhere = f".step-9.{host}.4194999", f".step-9.{host}.{os.getppid()}", ".step-9.other.1"
        for name in (dead, alive, elsewhere, f".step-1.{host}.4194999.removed"):
            (saved / name).mkdir()
        assert newest_checkpoint(saved) == saved / "step-2"
        keeper(saved).save(3, engine_of().state_dict(), {})
        assert step_names(saved) == [alive, "step-2", "step-3"]


class TestFailing:
    """Whatever stops a save, the old checkpoints are whole, the newest of them is found, and nothing else is left."""

    @pytest.mark.parametrize("moment", ["write_data", "finish", "checksum", "_publish", "rename", "_prune"])
    def test_sigkill(self, saved, moment):
        def killed_child():
            owner = {"write_data": checkpointer.FileSystemWriter, "finish": checkpointer.FileSystemWriter}.get(
                moment, {"checksum": checkpointer, "rename": os}.get(moment, Checkpointer)
            )
            setattr(owner, moment, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
            keeper(saved).save(3, {"model.w": torch.ones(1000)}, {})

        child = multiprocessing.get_context("fork").Process(target=killed_child)
        child.start()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        published = moment == "_prune"
        assert newest_checkpoint(saved) == saved / ("step-3" if published else "step-2")
        assert any(name.startswith(".step-3") for name in step_names(saved)) is not published
        keeper(saved).save(4, engine_of().state_dict(), {})
        assert step_names(saved) == (["step-3", "step-4"] if published else ["step-2", "step-4"])

    def test_full_disk_while_tensors_are_written(self, saved, monkeypatch):
        class FullDisk:
            def __init__(self, stream):
                self.stream, self.room = stream, 1000

            def write(self, data):
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.stream.write(data)

            def __getattr__(self, name):
                return getattr(self.stream, name)

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.stream.close()

        files = torch.distributed.checkpoint.filesystem.FileSystem
        monkeypatch.setattr(files, "create_stream", lambda self, path, mode: FullDisk(path.open(mode)))
        self.refused(saved, "No space left on device")

    def test_a_limit_that_the_kernel_enforces(self, saved):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        try:
            self.refused(saved, "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def refused(self, folder, reason):
        with pytest.raises(CheckpointError) as caught:
            keeper(folder, keep_last=1).save(3, {"model.w": torch.ones(4096)}, {})
        message = str(caught.value)
        assert message.startswith(f"{folder / 'step-3'} could not be written: {reason}") and "\n" not in message
        assert step_names(folder) == ["step-1", "step-2"]

    def test_no_place_to_write(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="could not be written: Not a directory"):
            keeper(tmp_path / "file" / "checkpoints").save(1, {"model.w": torch.ones(1)}, {})

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            keeper(tmp_path / "checkpoints").save(1, {"model.w": torch.ones(1)}, {})


class TestDamaged:
    def refused(self, path, pattern):
        engine = learn(engine_of(seed=1), 1)
        before = copy_of(engine)
        with pytest.raises(CheckpointError, match=pattern) as caught:
            engine.load(path)
        assert "\n" not in str(caught.value)
        same(engine.state_dict(), before)

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
    def test_truncated(self, saved, name, caplog):
        file = saved / "step-2" / name
        size = file.stat().st_size
        os.truncate(file, size - 1)
        self.refused(saved / "step-2", rf"step-2/{name} has {size - 1} bytes, expected {size}")
        with caplog.at_level(logging.WARNING):
            assert newest_checkpoint(saved) == saved / "step-1"
        assert f"step-2/{name} has {size - 1} bytes" in caplog.text

    def test_missing_file(self, saved):
        (saved / "step-2" / "__0_0.distcp").unlink()
        self.refused(saved / "step-2", "step-2/__0_0.distcp is missing, expected [0-9]+ bytes")
        assert newest_checkpoint(saved) == saved / "step-1"

    def test_a_changed_bit(self, saved):
        file = saved / "step-2" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self.refused(
            saved / "step-2", "step-2/__0_0.distcp is damaged: its checksum is [0-9a-f]{8}, expected [0-9a-f]{8}"
        )

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}'])
    def test_meta_json(self, saved, content):
        (saved / "step-2" / "meta.json").write_bytes(content)
        self.refused(saved / "step-2", "step-2/meta.json is damaged")
        assert newest_checkpoint(saved) == saved / "step-1"

    def test_without_meta_json_it_is_not_whole(self, saved):
        (saved / "step-2" / "meta.json").unlink()
        self.refused(saved / "step-2", "meta.json is missing: .*step-2 is not a whole checkpoint")
        assert [path.name for path, _ in checkpoints(saved)] == ["step-1"]

    def test_of_a_later_version(self, saved):
        meta = read_meta(saved / "step-2")
        (saved / "step-2" / "meta.json").write_text(json.dumps({**meta, "format": 99}))
        self.refused(saved / "step-2", "has format 99, this version reads format 1")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/scatterfold_was_here",)


class TestUntrusted:
    """Files whose checksums fit, from someone who means harm."""

    def test_code_in_the_index_is_not_run(self, saved, monkeypatch):
        ran = []
        rewrite(saved / "step-2", ".metadata", pickle.dumps(Evil()))
        monkeypatch.setattr(os, "system", lambda command: ran.append(command))
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged: it wants to load .*system"):
            load(saved / "step-2", model_state(Net()))
        assert ran == []

    def test_code_in_the_place_of_a_tensor_is_not_run(self, saved):
        path, marker = saved / "step-2", Path("/tmp/scatterfold_was_here")
        index = pickle.loads((path / ".metadata").read_bytes())
        content = pickle.dumps(Evil())
        place = next(iter(index.storage_data.values()))
        place.offset, place.length = 0, len(content)
        rewrite(path, ".metadata", pickle.dumps(index))
        rewrite(path, "__0_0.distcp", content)
        with pytest.raises(CheckpointError, match="step-2 cannot be read"):
            load(path, model_state(Net()))
        assert not marker.exists()

    def test_pickled_objects_are_refused(self, saved):
        index = pickle.loads((saved / "step-2" / ".metadata").read_bytes())
        bytes_entry = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
        index.state_dict_metadata["model.first.weight"] = bytes_entry
        rewrite(saved / "step-2", ".metadata", pickle.dumps(index))
        with pytest.raises(CheckpointError, match="it wants to load .*BytesStorageMetadata"):
            load(saved / "step-2", model_state(Net()))

    def test_files_outside_of_the_folder_are_refused(self, saved):
        index = pickle.loads((saved / "step-2" / ".metadata").read_bytes())
        next(iter(index.storage_data.values())).relative_path = "../step-1/__0_0.distcp"
        rewrite(saved / "step-2", ".metadata", pickle.dumps(index))
        with pytest.raises(CheckpointError, match="it points outside of the folder, to ../step-1"):
            load(saved / "step-2", model_state(Net()))


class TestFitting:
    def test_another_width(self, saved):
        engine = engine_of(width=5)
        before = copy_of(engine)
        with pytest.raises(CheckpointError) as caught:
            engine.load(saved / "step-2")
        message = "is of another model: model.first.weight is (6, 4) there and (5, 4) here (2 more differ)"
        assert str(caught.value) == f"{saved / 'step-2'} {message}"
        assert not engine.optimizer.state
        same(engine.state_dict(), before)

    def test_names(self, saved):
        state = {"model.first.weight": torch.empty(6, 4), "model.new": torch.empty(1), "model.newer": torch.empty(1)}
        with pytest.raises(CheckpointError) as caught:
            check_fits(saved / "step-2", state)
        assert "2 missing there, first model.new; 5 unknown here, first model.first.bias" in str(caught.value)

    def test_another_optimizer(self, saved):
        engine = engine_of("momentum")
        before = copy_of(engine)
        with pytest.raises(CheckpointError, match="missing there, first optimizer.first.weight.momentum_buffer"):
            engine.load(saved / "step-2")
        assert not engine.optimizer.state
        same(engine.state_dict(), before)

    def test_a_frozen_layer_has_no_optimizer_state(self, tmp_path):
        def frozen():
            model = Net()
            model.first.requires_grad_(False)
            return TorchEngine().prepare(
                model,
                lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]),
                process=Process(),
            )

        engine = learn(frozen(), 2)
        keeper(tmp_path).save(2, engine.state_dict(), {})
        resumed = frozen()
        resumed.load(tmp_path / "step-2")
        same(resumed.state_dict(), engine.state_dict())


class TestFinding:
    def test_run_folder_checkpoints_folder_or_checkpoint(self, tmp_path):
        keep = keeper(tmp_path / "checkpoints")
        for step in (1, 2):
            keep.save(step, {"model.w": torch.ones(1)}, {})
        newest = tmp_path / "checkpoints" / "step-2"
        assert (
            find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(newest) == newest
        )
        assert find_checkpoint(newest.with_name("step-1")).name == "step-1"

    def test_nothing_there(self, tmp_path):
        assert newest_checkpoint(tmp_path / "nowhere") is None
        with pytest.raises(CheckpointError, match="holds no whole checkpoint, allowed: a run folder"):
            find_checkpoint(tmp_path)
