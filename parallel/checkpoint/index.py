"""The index of tensors that torch.distributed.checkpoint writes: a pickle, read by an unpickler that knows its own few
classes, so that nothing in it can run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ...kernels.errors import CheckpointError

INDEX = ".metadata"


class SafeReader(FileSystemReader):
    """DCP's reader, with an index that is read safely."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index = read_index(path)

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self._index


_SAFE = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def is_safe(module: str, name: str) -> bool:
    """Whether a name in an index of tensors is one of the classes, or dtypes, that an index is made of."""
    return (module, name) in _SAFE or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))


class _IndexUnpickler(pickle.Unpickler):
    """Builds only the classes that an index of tensors is made of.

    BytesStorageMetadata is not among them: it marks pickled objects, which Scatterfold never writes and never reads.
    """

    def find_class(self, module: str, name: str) -> Any:
        if is_safe(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def read_index(path: Path) -> Metadata:
    """Which tensors a checkpoint holds and in which files their parts lie.

    Raises: CheckpointError if the index is missing, damaged, or wants more than to list tensors.
    """
    file = Path(path) / INDEX
    try:
        with open(file, "rb") as stream:
            index = _IndexUnpickler(stream).load()
        entries, places = index.state_dict_metadata, index.storage_data
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
            raise ValueError("it lists something that is no tensor")
        for place in places.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it points outside of the folder, to {place.relative_path}")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {path} is not a whole checkpoint") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return index
