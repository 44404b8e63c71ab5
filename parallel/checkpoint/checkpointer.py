"""Writing checkpoints so that a run can be killed at any moment and never loads half of one."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ...kernels.errors import CheckpointError
from ..disk import flush
from ..process import Process, broadcast, together
from .read import FORMAT, META, checkpoints, checksum, first_failure

logger = logging.getLogger(__name__)


class Checkpointer:
    """Keeps the checkpoints of one run in `folder`, as `step-N`.

    A checkpoint is written to a hidden folder by all ranks, each its own shards. Every file is flushed to the disk;
    meta.json, which lists their sizes and checksums, comes last; then the folder gets its name. So a folder that is
    called step-N is whole, and whatever a dead run left behind is hidden and removed by the next save.

        checkpointer = Checkpointer(run_dir / "checkpoints", process=process, keep_last=2)
        newest = broadcast(newest_checkpoint(run_dir / "checkpoints"))
        if newest is not None:
            engine.load(newest)
        ...
        checkpointer.save(step, engine.state_dict(), {"config": config, "progress": ...}, metric=valid_loss)
        checkpointer.wait()

    Args:
        folder: created with the first save.
        process: this process; every rank must make the checkpointer and call its methods.
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: keep the one with the lowest metric besides.
        asynchronous: copy the state to memory and write it in the background.
        timeout_s: how long a rank waits for the others' writing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: Process,
        keep_last: int = 2,
        keep_best: bool = True,
        asynchronous: bool = False,
        timeout_s: float = 3600.0,
    ) -> None:
        self.folder = Path(folder)
        self._main = process.is_main
        self._keep_last = max(1, keep_last)
        self._keep_best = keep_best
        # Its own group, so that writing in the background and training do not mix their messages.
        self._group: dist.ProcessGroup | None = None
        if process.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))  # type: ignore[assignment]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any], metric: float | None = None) -> None:
        """Write a checkpoint, then remove those that need not be kept.

        Asynchronously, the state is copied before this returns, and may change afterwards.

        Args:
            state: live tensors by name, as `Engine.state_dict` gives them.
            meta: JSON values that stand beside them.
            metric: validation loss; the lowest is the best.

        Raises: CheckpointError, on every rank, if this save or the one before it failed: no space, no permission,
            a lost disk. Older checkpoints are untouched then, and nothing half-written stays.
        """
        self.wait()
        hidden = self.folder / broadcast(f".step-{step}.{socket.gethostname()}.{os.getpid()}")
        self._agreed(lambda: self._make_room(hidden) if self._main else None, step)
        stands_beside = {**meta, "format": FORMAT, "step": step, "metric": _finite(metric)}
        if self._thread is None:
            self._write(step, hidden, state, stands_beside)
        else:
            staged = BlockingAsyncStager().stage(state)
            self._pending = self._thread.submit(self._write, step, hidden, staged, stands_beside)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises: CheckpointError if the last background save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a save in the background finish; its error is logged. For the way out, also after other errors."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)

    def _write(self, step: int, hidden: Path, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
        try:
            self._write_tensors(step, hidden, state)
            files = self._list_files(step, hidden)
            self._agreed(lambda: self._publish(step, hidden, {**meta, "files": files}) if self._main else None, step)
        except BaseException:
            if self._main:
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        if self._main:
            self._prune(self.folder / f"step-{step}")

    def _write_tensors(self, step: int, hidden: Path, state: dict[str, Tensor]) -> None:
        # Copying ahead is for CUDA tensors; a background thread has copies on the CPU, and no device of its own.
        ahead = 10_000_000 if self._thread is None else 0
        writer = _Writer(hidden, sync_files=True, per_thread_copy_ahead=ahead)
        try:
            dcp_save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:  # DCP raises it on every rank, whichever failed
            raise self._failed(step, first_failure(error)) from None

    def _list_files(self, step: int, hidden: Path) -> dict[str, list[int]]:
        """Size and checksum of every file; each rank reads what it has just written."""
        rank = dist.get_rank(self._group) if self._group is not None else 0

        def own() -> dict[str, list[int]]:
            mine = [*hidden.glob(f"__{rank}_*"), *(hidden.glob(".metadata") if self._main else ())]
            return {file.name: [file.stat().st_size, checksum(file)] for file in sorted(mine)}

        listed = self._agreed(own, step)
        if self._group is None:
            return listed
        everyone: list[dict[str, list[int]] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, listed, group=self._group)
        return {name: entry for part in everyone if part for name, entry in sorted(part.items())}

    def _publish(self, step: int, hidden: Path, meta: dict[str, Any]) -> None:
        """Give a folder whose tensors are on the disk its meta.json and its name."""
        with open(hidden / META, "w") as stream:
            json.dump({**meta, "written_at": time.time()}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        flush(hidden)
        final = self.folder / f"step-{step}"
        earlier = _hide(final) if final.exists() else None  # the step was run again, from an older checkpoint
        try:
            os.rename(hidden, final)
        except OSError:
            if earlier is not None:
                os.rename(earlier, final)
            raise
        flush(self.folder)
        if earlier is not None:
            shutil.rmtree(earlier, ignore_errors=True)

    def _make_room(self, hidden: Path) -> None:
        """Make the hidden folder, and remove those of runs that are dead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):
            if left == hidden or not _in_use(left.name):
                shutil.rmtree(left, ignore_errors=True)
        hidden.mkdir()

    def _prune(self, written: Path) -> None:
        """Remove what need not be kept; never what was just written, nor the best."""
        whole = checkpoints(self.folder)
        keep = {written, *(path for path, _ in whole[-self._keep_last :])}
        measured = [(meta["metric"], path) for path, meta in whole if meta["metric"] is not None]
        if self._keep_best and measured:
            keep.add(min(measured, key=lambda entry: entry[0])[1])
        for path, _ in whole:
            if path not in keep:
                try:
                    shutil.rmtree(_hide(path), ignore_errors=True)
                except OSError as error:  # the save itself went well
                    logger.warning("%s could not be removed: %s", path, error.strerror)

    def _agreed(self, action: Callable[[], Any], step: int) -> Any:
        def attempt() -> Any:
            try:
                return action()
            except OSError as error:
                raise self._failed(step, error.strerror or str(error)) from None

        return together(attempt, self._group) if self._group is not None else attempt()

    def _failed(self, step: int, why: str) -> CheckpointError:
        try:
            free = f", {shutil.disk_usage(self.folder).free:,} bytes are free"
        except OSError:
            free = ""
        return CheckpointError(f"{self.folder / f'step-{step}'} could not be written: {why}{free}")


class _Writer(FileSystemWriter):
    """DCP's writer, which says why a file could not be written: torch reports a full disk as a broken archive."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise error if cause is None else OSError(cause.errno, cause.strerror or str(cause)) from error


def _hide(path: Path) -> Path:
    """Rename before deleting: a kill in between leaves nothing that looks like a checkpoint."""
    hidden = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.removed")
    os.rename(path, hidden)
    return hidden


def _in_use(name: str) -> bool:
    """Whether the process that made a hidden folder lives; on another machine it counts as dead, as a run moves on."""
    made_by, _, number = name.removesuffix(".removed").rpartition(".")
    if not made_by.endswith(f".{socket.gethostname()}") or not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finite(metric: float | None) -> float | None:
    return metric if metric is not None and math.isfinite(metric) else None
