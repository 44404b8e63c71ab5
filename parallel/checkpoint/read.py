"""Reading checkpoints: which are whole, what they hold, whether that fits, and the tensors themselves.

Nothing in a checkpoint is trusted: tensors are read without pickle's power to run code, and the index of tensors by an
unpickler that knows its own few classes. Sizes and checksums of all files stand in meta.json, which is written last.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ...kernels.errors import CheckpointError
from ..process import place, together
from .index import INDEX, SafeReader, read_index

META = "meta.json"
FORMAT = 1

logger = logging.getLogger(__name__)

# DCP says so whenever a process works alone, which here is meant. Once for all: filters are not safe in threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def read_meta(path: Path) -> dict[str, Any]:
    """What stands beside the tensors: step, metric, and all that the run gave to `Checkpointer.save`.

    Raises: CheckpointError if the file is missing or damaged, or was written by a newer version.
    """
    file = Path(path) / META
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {path} is not a whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise CheckpointError(f"{file} is damaged: it lists no files")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {meta.get('format')!r}, this version reads format {FORMAT}")
    return meta


def check_whole(path: Path) -> dict[str, Any]:
    """Check that every file is there in its full size, without reading it; returns the meta data.

    Raises: CheckpointError that names the file, what it should be and what was found.
    """
    meta = read_meta(path)
    for name, (size, _) in meta["files"].items():
        try:
            found = os.stat(Path(path) / name).st_size
        except OSError:
            raise CheckpointError(f"{Path(path) / name} is missing, expected {size} bytes") from None
        if found != size:
            raise CheckpointError(f"{Path(path) / name} has {found} bytes, expected {size}")
    if INDEX not in meta["files"]:
        raise CheckpointError(f"{Path(path) / META} is damaged: it does not list {INDEX}")
    return meta


def checkpoints(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The whole checkpoints of a folder with their meta data, oldest first; others are left out with a warning.

    Age is when a checkpoint was written, not its step: after a resume from an older one, the newest is what was
    written since.
    """
    found = []
    for path in Path(folder).glob("step-*"):
        try:
            found.append((path, check_whole(path)))
        except CheckpointError as error:
            logger.warning("left out a checkpoint that is not whole: %s", error)
    return sorted(found, key=lambda entry: (entry[1]["written_at"], entry[1]["step"]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None if there is none."""
    found = checkpoints(folder)
    return found[-1][0] if found else None


def find_checkpoint(source: Path) -> Path:
    """The checkpoint itself, or the newest of a run folder or of its `checkpoints` folder.

    Raises: CheckpointError if there is none.
    """
    source = Path(source)
    if (source / META).exists() or (source / INDEX).exists():
        check_whole(source)
        return source
    for folder in (source / "checkpoints", source):
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
    raise CheckpointError(f"{source} holds no whole checkpoint, allowed: a run folder or one of its checkpoints/step-N")


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a checkpoint."""
    return {name: entry.size for name, entry in read_index(path).state_dict_metadata.items()}  # type: ignore[union-attr]


def check_fits(path: Path, state: Mapping[str, Tensor], elsewhere: Collection[str] = ()) -> None:
    """Check that a checkpoint holds exactly the tensors of `state`, in its shapes.

    Kinds of names (`model.`, `optimizer.`) that the state does not have are ignored.

    Args:
        elsewhere: names of tensors that other ranks check and read: those of other pipeline stages.

    Raises: CheckpointError that names the first tensor that differs, with both shapes, and counts the others.
    """
    kinds = {name.split(".", 1)[0] for name in state}
    saved = {name: shape for name, shape in read_shapes(path).items() if name.split(".", 1)[0] in kinds}
    check_shapes(path, saved, state, elsewhere)


def check_shapes(
    source: Path, saved: Mapping[str, torch.Size], state: Mapping[str, Tensor], elsewhere: Collection[str] = ()
) -> None:
    """Check that `saved`, which lies in `source`, are exactly the tensors of `state`, in its shapes.

    Args:
        elsewhere: names of tensors that other ranks check and read: those of other pipeline stages.

    Raises: CheckpointError that names the first tensor that differs, with both shapes, and counts the others.
    """
    differing = [name for name in state if name in saved and saved[name] != state[name].shape]
    missing = [name for name in state if name not in saved]
    known = {*state, *elsewhere}
    unexpected = [name for name in saved if name not in known]
    parts = []
    if differing:
        first = differing[0]
        more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
        parts.append(f"{first} is {tuple(saved[first])} there and {tuple(state[first].shape)} here{more}")
    for names, what in ((missing, "missing there"), (unexpected, "unknown here")):
        if names:
            parts.append(f"{len(names)} {what}, first {names[0]}")
    if parts:
        raise CheckpointError(f"{source} is of another model: {'; '.join(parts)}")


def load(path: Path, state: dict[str, Tensor], elsewhere: Collection[str] = ()) -> None:
    """Read tensors in place, each rank its own shards, after checking that the files are intact and fit.

    Args:
        state: live tensors by name, as `model_state` gives them.
        elsewhere: names of tensors that other ranks read.

    Raises: CheckpointError, on every rank, with nothing changed.
    """
    path = Path(path)

    def check() -> None:
        check_sums(path, check_whole(path)["files"], *place())
        check_fits(path, state, elsewhere)

    def read() -> None:
        try:
            dcp_load(dict(state), storage_reader=SafeReader(path), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{path} cannot be read: {first_failure(error)}") from None

    together(check)
    together(read)


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def first_failure(error: CheckpointException) -> str:
    """The cause that DCP collected from the ranks, in one line."""
    cause = next(iter(error.failures.values()))[0]
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return text.strip().splitlines()[0] if text.strip() else type(cause).__name__


def check_sums(path: Path, files: Mapping[str, tuple[int, int]], rank: int, world: int) -> None:
    """Compare checksums, every rank its share of the files."""
    for name, (_, expected) in sorted(files.items())[rank::world]:
        found = checksum(path / name)
        if found != expected:
            raise CheckpointError(f"{path / name} is damaged: its checksum is {found:08x}, expected {expected:08x}")
