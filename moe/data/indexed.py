"""Megatron indexed datasets: check that a pair of .bin and .idx is whole before anything reads it.

megatron-core's reader trusts the files, and a damaged index ends in a crash or in wrong tokens. The format: .idx is
9 bytes magic, u64 version 1, u8 dtype code, u64 number of sequences, u64 number of document indices (documents + 1),
then i32 lengths, i64 byte offsets, i64 document indices, and optionally i8 modes; .bin holds the tokens back to back.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...kernels.errors import DataError
from .cache import digest, locked, write_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 24  # tokens scanned at a time


@dataclass(frozen=True)
class IndexedFacts:
    """What a checked dataset holds.

    Attributes:
        documents, sequences, tokens: counts; megatron-core splits and shuffles sequences, mostly one a document.
        largest, smallest: of the token ids.
        content: a hash of lengths and tokens, by which a resumed run knows its corpus again wherever it lies.
    """

    documents: int
    sequences: int
    tokens: int
    largest: int
    smallest: int
    content: str


@dataclass(frozen=True)
class IndexedFiles:
    """An indexed dataset, memory-mapped.

    Attributes:
        tokens: (tokens,) all token ids in stored order.
        offsets: (sequences + 1,) int64, where each sequence starts in `tokens`.
    """

    prefix: Path
    tokens: np.ndarray
    offsets: np.ndarray


def indexed_prefix(path: Path) -> Path | None:
    """The prefix if `path` names an indexed dataset (PREFIX, PREFIX.bin or PREFIX.idx), else None.

    Raises: DataError if one of the two files is missing.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    bin_file, idx_file = _files(prefix)
    if not bin_file.is_file() and not idx_file.is_file():
        return None
    for file, other in ((bin_file, idx_file), (idx_file, bin_file)):
        if not file.is_file():
            raise DataError(f"{file} is missing beside {other}, allowed: both files of an indexed dataset")
    return prefix


def check_indexed(prefix: Path, cache: Path) -> IndexedFacts:
    """Check a dataset, whole index and every token id; the result is kept until a file changes.

    Raises: DataError that names the file, what was found and what was expected.
    """
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in _files(prefix)]
    name = digest([str(prefix.absolute()), states])
    known = cache / "checked" / f"{name}.json"
    with locked(cache, name):
        if known.is_file():
            return IndexedFacts(**json.loads(known.read_text()))
        files, documents = _read(prefix, whole=True)
        largest, smallest, content = _scan(files)
        facts = IndexedFacts(documents, len(files.offsets) - 1, len(files.tokens), largest, smallest, content)
        known.parent.mkdir(exist_ok=True)
        write_json(known, asdict(facts))
    return facts


def open_indexed(prefix: Path) -> IndexedFiles:
    """Map a dataset into memory. Raises: DataError if sizes and counts do not fit together."""
    return _read(prefix, whole=False)[0]


def _files(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _read(prefix: Path, whole: bool) -> tuple[IndexedFiles, int]:
    bin_file, idx_file = _files(prefix)
    try:
        dtype, sequences, documents = _header(idx_file)
        lengths, pointers, ends = _arrays(idx_file, sequences, documents)
        _check_sizes(bin_file, idx_file, dtype, lengths, pointers, ends)
        offsets = np.zeros(sequences + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        tokens = np.memmap(bin_file, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(f"{error.filename or idx_file} cannot be read: {error.strerror or error}") from error
    if offsets[-1] != len(tokens):
        raise DataError(f"{idx_file} is corrupt: its lengths sum to {offsets[-1]} tokens, {bin_file} has {len(tokens)}")
    if whole:
        _check_arrays(idx_file, dtype, lengths, pointers, ends, offsets)
    return IndexedFiles(prefix, tokens, offsets), documents - 1


def _header(idx_file: Path) -> tuple[type[np.integer], int, int]:
    with open(idx_file, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{idx_file} is truncated: {len(header)} bytes, expected {HEADER.size} or more")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{idx_file} is not a Megatron index: it starts with {magic!r}, expected {MAGIC!r}")
    if version != 1:
        raise DataError(f"{idx_file} has version {version}, expected 1")
    if code not in TOKEN_TYPES:
        codes = ", ".join(f"{key} ({TOKEN_TYPES[key].__name__})" for key in TOKEN_TYPES)
        raise DataError(f"{idx_file} has token type code {code}, expected one of {codes}")
    if sequences < 1 or documents < 2:
        raise DataError(f"{idx_file} is empty: {sequences} sequences, {max(documents - 1, 0)} documents")
    return TOKEN_TYPES[code], sequences, documents


def _arrays(idx_file: Path, sequences: int, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = os.path.getsize(idx_file)
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):  # modes are optional
        raise DataError(
            f"{idx_file} is truncated or corrupt: {size} bytes, expected {expected} for {sequences} sequences and "
            f"{documents - 1} documents"
        )
    content = np.memmap(idx_file, mode="r")
    lengths, pointers, ends = np.split(content[HEADER.size : expected], np.cumsum([4 * sequences, 8 * sequences]))
    return lengths.view(np.int32), pointers.view(np.int64), ends.view(np.int64)


def _check_sizes(
    bin_file: Path,
    idx_file: Path,
    dtype: type[np.integer],
    lengths: np.ndarray,
    pointers: np.ndarray,
    ends: np.ndarray,
) -> None:
    expected, size = int(pointers[-1]) + int(lengths[-1]) * np.dtype(dtype).itemsize, os.path.getsize(bin_file)
    if size != expected:
        raise DataError(f"{bin_file} is truncated or corrupt: {size} bytes, {idx_file} says {expected}")
    if size == 0:
        raise DataError(f"{bin_file} is empty")
    if ends[0] != 0 or ends[-1] != len(lengths):
        raise DataError(
            f"{idx_file} is corrupt: documents span sequences {ends[0]} to {ends[-1]}, expected 0 to {len(lengths)}"
        )


def _check_arrays(
    idx_file: Path,
    dtype: type[np.integer],
    lengths: np.ndarray,
    pointers: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
) -> None:
    if (negative := np.flatnonzero(lengths < 0)).size:
        raise DataError(f"{idx_file} is corrupt: sequence {negative[0]} has length {lengths[negative[0]]}")
    expected = offsets[:-1] * np.dtype(dtype).itemsize
    if (wrong := np.flatnonzero(pointers != expected)).size:
        at = wrong[0]
        raise DataError(f"{idx_file} is corrupt: sequence {at} is at byte {pointers[at]}, expected {expected[at]}")
    if (wrong := np.flatnonzero(np.diff(ends) < 0)).size:
        raise DataError(f"{idx_file} is corrupt: document {wrong[0]} ends before it starts")


def _scan(files: IndexedFiles) -> tuple[int, int, str]:
    largest, smallest = 0, 0
    content = hashlib.sha256(files.offsets.data)
    for start in range(0, len(files.tokens), _CHUNK):
        chunk = files.tokens[start : start + _CHUNK]
        largest, smallest = max(largest, int(chunk.max())), min(smallest, int(chunk.min()))
        content.update(chunk.astype(np.int32).data)  # whatever type the ids are stored in
    return largest, smallest, content.hexdigest()[:16]
