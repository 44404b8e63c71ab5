"""Rows of a tensor that torch.save wrote into a larger file, without reading the others.

torch.distributed.checkpoint keeps each part of a tensor as an archive of its own and reads it whole, however little of
it is wanted. One expert of a stack of a hundred would cost a hundred times its size.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


class Rows(NamedTuple):
    """Where the rows of a tensor lie in a file: byte `start` on, in order and without gaps."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self, file: Path, rows: slice) -> Tensor:
        """(rows, …) of the tensor. Raises: OSError if the file cannot be read, or ends too early."""
        shape = (rows.stop - rows.start, *self.shape[1:])
        part = torch.empty(shape, dtype=self.dtype)
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(file, "rb") as stream:
            stream.seek(self.start + rows.start * width)
            if stream.readinto(part.view(-1).view(torch.uint8).numpy()) != part.nbytes:  # type: ignore[arg-type]
                raise OSError(f"{file} ends too early")
        return part


def find_rows(file: Path, offset: int, length: int) -> Rows | None:
    """The tensor of one dimension or more in the archive at `offset`; None if its rows do not lie there as they are."""
    try:
        with open(file, "rb") as stream:
            archive = zipfile.ZipFile(_Window(stream, offset, length))  # type: ignore[arg-type]
            root = archive.namelist()[0].partition("/")[0]
            storage, first, size, stride = _Description(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
            _, kind, key, _, _ = storage
            record = archive.getinfo(f"{root}/data/{key}")
            stream.seek(offset + record.header_offset)
            name, extra = struct.unpack("<HH", stream.read(30)[26:])  # lengths, in the head of a record
    except Exception:  # a damaged archive raises almost anything; who reads it whole says what is wrong
        return None
    shape, dtype = torch.Size(size), STORAGES[kind]
    contiguous = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    start = offset + record.header_offset + 30 + name + extra + first * dtype.itemsize
    inside = first * dtype.itemsize + shape.numel() * dtype.itemsize <= record.file_size
    if not shape or tuple(stride) != contiguous or record.compress_type != zipfile.ZIP_STORED or not inside:
        return None
    return Rows(start, shape, dtype)


class _Description(pickle.Unpickler):
    """What torch.save says about a tensor, as plain tuples: builds no tensor and knows no other class."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, size, stride, *others: (storage, first, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int) -> None:
        self._stream = stream
        self._offset = offset
        self._length = length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._stream.seek(self._offset + self._at)
        content = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content
