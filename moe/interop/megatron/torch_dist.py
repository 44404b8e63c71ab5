"""Writing the format torch_dist: files of tensors, an index of which part lies where, and the marker that comes last.

The index holds how many bytes each part takes on the disk. They are known before anything is read, so every rank
writes its own files without a word to the others, and the first one the index.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ....parallel.checkpoint.index import INDEX
from ....parallel.checkpoint.lazy import LazyTensor
from .locate import BACKEND, FORMAT

Tensors = Mapping[str, tuple[LazyTensor, int]]


@dataclass(frozen=True)
class _Part:
    """What is written in one piece: part of a tensor that may go by several keys.

    Attributes:
        keys: names of the tensor.
        tensor: the whole of it.
        cuts: the part.
    """

    keys: tuple[str, ...]
    tensor: LazyTensor
    cuts: tuple[slice, ...]

    @property
    def offsets(self) -> torch.Size:
        return torch.Size(cut.start for cut in self.cuts)

    @property
    def sizes(self) -> torch.Size:
        return torch.Size(cut.stop - cut.start for cut in self.cuts)

    @property
    def stored_bytes(self) -> int:
        return saved_bytes(tuple(self.sizes), self.tensor.dtype)


def write_torch_dist(
    folder: Path, tensors: Tensors, empty: Sequence[str], max_shard_bytes: int, rank: int = 0, world: int = 1
) -> tuple[str, ...]:
    """Write tensors into a folder that exists; returns names of the files.

    Args:
        tensors: by their keys, each with how many leading dimensions are cut into pieces of one. Keys that hold the
            very same tensor share its bytes.
        empty: keys of objects that hold nothing (the state of a module that has none beside its parameters).
        max_shard_bytes: of a file; a part that is larger has a file of its own.
        rank, world: every rank writes its share of the files, rank 0 the index; the bytes do not depend on it.

    Raises: OSError as any writing does; CheckpointError if a source cannot be read.
    """
    files = _split(_parts(tensors), max_shard_bytes)
    nothing = io.BytesIO()
    torch.save([None], nothing)
    for number, (file, parts) in enumerate(files.items()):
        if number % world != rank:
            continue
        with open(folder / file, "wb") as stream:
            for part in parts:
                start = stream.tell()
                torch.save(part.tensor.read(part.cuts), stream)
                if stream.tell() - start != part.stored_bytes:
                    raise RuntimeError(f"{part.keys[0]} took {stream.tell() - start} bytes, not {part.stored_bytes}")
            if number == 0:
                stream.write(nothing.getvalue())
    if rank == 0:
        index = _index(files, empty, len(nothing.getvalue()))
        (folder / INDEX).write_bytes(pickle.dumps(index))
        described = {"sharded_backend": FORMAT, "sharded_backend_version": 1}
        described |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / BACKEND).write_text(json.dumps(described))
    return tuple(files)


@cache
def saved_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many bytes `torch.save` takes for a tensor, without reading or writing one."""
    count = _Count()
    with torch.serialization.skip_data():  # leaves room for the values; nothing touches the memory of `empty`
        torch.save(torch.empty(shape, dtype=dtype), count)  # type: ignore[arg-type]
    return count.size


class _Count(io.RawIOBase):
    """A file that keeps nothing but its size."""

    def __init__(self) -> None:
        self.size = self._position = 0

    def write(self, data) -> int:  # type: ignore[override]
        self._position += len(data)
        self.size = max(self.size, self._position)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self.size = max(self.size, self._position)
        return self._position

    def tell(self) -> int:
        return self._position

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _parts(tensors: Tensors) -> list[_Part]:
    by_tensor: dict[int, list[str]] = {}
    for key, (tensor, _) in tensors.items():
        by_tensor.setdefault(id(tensor), []).append(key)
    parts = []
    for keys in by_tensor.values():
        tensor, leading = tensors[keys[0]]
        rest = [slice(0, size) for size in tensor.shape[leading:]]
        for place in itertools.product(*(range(size) for size in tensor.shape[:leading])):
            parts.append(_Part(tuple(keys), tensor, (*(slice(one, one + 1) for one in place), *rest)))
    return parts


def _split(parts: Sequence[_Part], most: int) -> dict[str, list[_Part]]:
    files: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        if files[-1] and filled + part.stored_bytes > most:
            files.append([])
            filled = 0
        files[-1].append(part)
        filled += part.stored_bytes
    return {f"__{number}_0.distcp": held for number, held in enumerate(files)}


def _index(files: Mapping[str, Sequence[_Part]], empty: Sequence[str], empty_bytes: int) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for number, (file, parts) in enumerate(files.items()):
        offset = 0
        for part in parts:
            chunk = ChunkStorageMetadata(offsets=part.offsets, sizes=part.sizes)
            for key in part.keys:
                entry = entries.get(key)
                if not isinstance(entry, TensorStorageMetadata):
                    properties = TensorProperties(dtype=part.tensor.dtype)
                    entry = entries[key] = TensorStorageMetadata(properties, part.tensor.shape, [])
                place = MetadataIndex(key, part.offsets, index=len(entry.chunks))
                places[place] = _StorageInfo(file, offset, part.stored_bytes)
                entry.chunks.append(chunk)
            offset += part.stored_bytes
        if number == 0:
            for key in empty:
                entries[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = _StorageInfo(file, offset, empty_bytes)
    return Metadata(state_dict_metadata=entries, storage_data=places)
