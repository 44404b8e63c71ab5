"""What Megatron pickles, read without running or importing anything of it.

Two pickles matter: `.metadata`, the index of tensors, and common.pt, whose `args` describe the model. Both may name any
class of the Megatron that wrote them. Every class that is not one of the few plain ones below becomes an `Inert`: it
takes whatever it is given and does nothing.
"""

from __future__ import annotations

import argparse
import io
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from ....kernels import CheckpointError
from ....parallel.checkpoint.index import INDEX, is_safe
from .locate import COMMON

COMMON_OBJECT = "common_state/shard_0_1"  # where newer releases keep what common.pt held


class Inert:
    """Stands in for an object of a class that is not loaded; an enumeration's member shows what it was made of."""

    def __init__(self, *made_of: Any, **_: Any) -> None:
        self.made_of = made_of

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes of torch that describe tensors; anything else becomes inert. No name is ever imported."""

    def find_class(self, module: str, name: str) -> Any:
        if is_safe(module, name) or (module, name) == (BytesStorageMetadata.__module__, "BytesStorageMetadata"):
            return super().find_class(module, name)
        return Metadata if name == "MCoreMetadata" else Inert  # a subclass of Metadata in some releases


def read_index(folder: Path) -> Metadata:
    """Which tensors a checkpoint holds and where; pickled objects among them are listed, not read.

    Raises: CheckpointError if the index is damaged or points outside of the folder.
    """
    file = Path(folder) / INDEX
    try:
        with open(file, "rb") as stream:
            index = _IndexUnpickler(stream).load()
        for entry in index.state_dict_metadata.values():
            if not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
                raise ValueError("it lists something that is neither a tensor nor an object")
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it points outside of the folder, to {place.relative_path}")
            if not (Path(folder) / place.relative_path).is_file():
                raise CheckpointError(f"{Path(folder) / place.relative_path} is missing, but {file} names it")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{file} is damaged: {_line(error)}") from None
    return index


def read_common(folder: Path, index: Metadata) -> Mapping[str, Any]:
    """What a checkpoint holds besides tensors: its arguments, its step; empty if it says nothing.

    Raises: CheckpointError if it is there and damaged.
    """
    file = Path(folder) / COMMON
    try:
        if file.is_file():
            common = load_inert(file.read_bytes())
        elif COMMON_OBJECT in index.state_dict_metadata:
            place = index.storage_data[MetadataIndex(COMMON_OBJECT)]
            file = Path(folder) / place.relative_path
            with open(file, "rb") as stream:
                stream.seek(place.offset)
                common = load_inert(stream.read(place.length))[0]
        else:
            return {}
        return common if isinstance(common, Mapping) else {}
    except Exception as error:  # torch.load raises almost anything
        raise CheckpointError(f"{file} cannot be read: {_line(error)}") from None


def load_inert(data: bytes) -> Any:
    """`torch.load` that imports nothing: names other than those below become `Inert`."""
    plain = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
    }
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    stand_ins = [(plain.get(name, Inert), name) for name in unknown]
    with torch.serialization.safe_globals([*plain.values(), Inert, *stand_ins]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _line(error: Exception) -> str:
    """The line of an error that says what is wrong, without torch's advice to load the file unsafely after all."""
    text = str(error).partition("WeightsUnpickler error: ")
    lines = [line.strip() for line in (text[2] or text[0]).splitlines()]
    return next((line for line in lines if line and not line.startswith("Weights only")), repr(type(error).__name__))
