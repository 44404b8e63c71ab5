"""A checkpoint of any layout as lazy tensors: what was written in parts by many ranks reads as wholes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...kernels.errors import CheckpointError
from .chunks import find_rows
from .index import SafeReader, read_index
from .lazy import Index, LazyTensor
from .read import check_sums, check_whole, first_failure


def open_checkpoint(path: Path, kind: str, checked: bool = True) -> dict[str, LazyTensor]:
    """Tensors of a checkpoint of ours, by their names without `kind`.

    Args:
        kind: which of them, `model.` or `optimizer.`.
        checked: compare the checksums of all files first, which reads them once.

    Raises: CheckpointError if a file is missing or damaged.
    """
    path = Path(path)
    files = check_whole(path)["files"]
    if checked:
        check_sums(path, files, 0, 1)
    return open_distributed(path, read_index(path), SafeReader(path), kind)


def open_distributed(path: Path, index: Metadata, reader: FileSystemReader, kind: str = "") -> dict[str, LazyTensor]:
    """Tensors of any folder that torch.distributed.checkpoint wrote.

    Args:
        index: what its .metadata says; whoever read it vouches for it.
        kind: start of the names to take, which is cut off.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, entry in index.state_dict_metadata.items():
        if name.startswith(kind) and isinstance(entry, TensorStorageMetadata):
            tensors[name.removeprefix(kind)] = _lazy(path, index, reader, name, entry)
    return tensors


def _lazy(path: Path, index: Metadata, reader: FileSystemReader, name: str, entry: TensorStorageMetadata) -> LazyTensor:
    def fetch(cuts: Index) -> Tensor:
        offsets = torch.Size(cut.start for cut in cuts)
        part = torch.empty([cut.stop - cut.start for cut in cuts], dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=part.shape)
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        try:
            rest = [item for item in items if not _read_rows(path, index, item, part)]
            if rest:
                reader.set_up_storage_reader(index, is_coordinator=True)
                reader.read_data(LoadPlan(rest), _Into(part)).wait()
        except Exception as error:  # damaged data raise almost anything
            raise CheckpointError(f"{path}: {name} cannot be read: {_in_short(error)}") from None
        return part

    return LazyTensor(entry.size, entry.properties.dtype, fetch)


def _read_rows(path: Path, index: Metadata, item: ReadItem, part: Tensor) -> bool:
    """Read one piece of `part` without the rows that it does not need; False if it does not lie there like that."""
    place = index.storage_data[item.storage_index]
    file = path / place.relative_path
    found = find_rows(file, place.offset, place.length)
    if found is None or found.dtype != part.dtype:
        return False
    cuts = [slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths)]
    _place(part, item).copy_(found.read(file, cuts[0])[:, *cuts[1:]])
    return True


def _in_short(error: Exception) -> str:
    if isinstance(error, CheckpointException):
        return first_failure(error)
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _Into(DefaultLoadPlanner):
    """Lets the reader put each piece where it belongs in one tensor."""

    def __init__(self, part: Tensor) -> None:
        super().__init__()
        self._part = part

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _place(self._part, read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # the reader has copied into the view


def _place(part: Tensor, item: ReadItem) -> Tensor:
    for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths)):
        part = part.narrow(dim, start, length)
    return part
