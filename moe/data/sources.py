"""Raw text: which files a corpus has, and how each is read document by document.

A document is a text file, a line of a .jsonl, or a row of a parquet file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...kernels.errors import DataError

_PROSE = ".txt .md .markdown .rst .org .tex .adoc .html .htm .xml .csv .tsv .toml .ini .cfg .yaml .yml"
_PROGRAMS = (
    ".py .pyi .ipynb .js .jsx .ts .tsx .java .kt .scala .go .rs .rb .php .pl .lua .jl .r .swift .cs "
    ".c .h .cc .cpp .cxx .hh .hpp .cu .cuh .m .hs .ml .clj .ex .erl .sh .bash .sql .css .scss"
)
TEXT_SUFFIXES = frozenset(f"{_PROSE} {_PROGRAMS}".split())
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
STDLIB = "stdlib"  # data.path of the embedded corpus


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        path: where it is.
        name: how receipts name it: its path below the source that led to it.
        kind: text, jsonl or parquet.
        size, modified: in bytes and nanoseconds.
        train_only: its documents are stored first, where no validation split reaches.
    """

    path: str
    name: str
    kind: str
    size: int
    modified: int
    train_only: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of a file that one process reads: bytes of a .jsonl or row groups of a parquet file; None for all."""

    file: SourceFile
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Document:
    """Text, and how many bytes of the source it stands for (for a progress bar)."""

    text: str
    cost: int


def kind_of(name: str, inside_folder: bool) -> str | None:
    """text, jsonl or parquet by a file's name; None for files of a folder that are not text."""
    lower = name.lower()
    if lower.endswith(LINE_SUFFIXES):
        return "jsonl"
    if lower.endswith(PARQUET_SUFFIX):
        return "parquet"
    if not inside_folder or os.path.splitext(lower)[1] in TEXT_SUFFIXES:
        return "text"
    return None


def find_files(sources: Sequence[str]) -> tuple[list[SourceFile], int]:
    """The files of a corpus in an order that depends on names only, and how many others were left out.

    Hidden files and folders and __pycache__ are left out, links to folders are not followed.
    Raises: DataError if a source does not exist or holds no text.
    """
    files: list[SourceFile] = []
    skipped = 0
    for source in sources:
        found, others = _files_of(source)
        if not found:
            raise DataError(f"{source} holds no text, allowed: {' '.join(LINE_SUFFIXES)} .parquet .txt .md .py …")
        files += found
        skipped += others
    if not sum(file.size for file in files):
        raise DataError(f"{', '.join(sources)} holds no text: all {len(files)} files are empty")
    return files, skipped


def _files_of(source: str) -> tuple[list[SourceFile], int]:
    if source == STDLIB:
        from .stdlib import standard_library_files

        return standard_library_files(), 0
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(
            f'{source} does not exist, allowed: "stdlib", a file or folder of text, or the prefix of an indexed dataset'
        )
    if not root.is_dir():
        return [describe(root, root.name, kind_of(root.name, inside_folder=False) or "text")], 0
    files, skipped = [], 0
    for folder, folders, names in os.walk(root, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            kind = None if name.startswith(".") else kind_of(name, inside_folder=True)
            if kind is None:
                skipped += 1
            else:
                path = Path(folder) / name
                files.append(describe(path, path.relative_to(root).as_posix(), kind))
    return sorted(files, key=lambda file: file.name), skipped


def describe(path: Path, name: str, kind: str, train_only: bool = False) -> SourceFile:
    """A file with its size and time."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return SourceFile(str(path.absolute()), name, kind, state.st_size, state.st_mtime_ns, train_only)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Cut a large .jsonl or parquet file into pieces of about `size` bytes; other files stay whole."""
    parts = -(-file.size // size)
    if parts <= 1 or file.kind == "text" or (file.kind == "jsonl" and not file.path.endswith(".jsonl")):
        return [Piece(file)]
    if file.kind == "jsonl":
        return [Piece(file, at, min(at + size, file.size)) for at in range(0, file.size, size)]
    groups = _open_parquet(file).num_row_groups
    step = max(1, -(-groups // parts))
    return [Piece(file, at, min(at + step, groups)) for at in range(0, groups, step)]


def read_documents(piece: Piece, text_key: str) -> Iterator[Document]:
    """The documents of a piece, in order. Raises: DataError that names file and line of what cannot be read."""
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}[piece.file.kind]
    try:
        yield from read(piece, text_key)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{piece.file.path} cannot be read: {reason}") from error


def _read_text(piece: Piece, text_key: str) -> Iterator[Document]:
    content = Path(piece.file.path).read_bytes()
    yield Document(_decode(content, piece.file.path, 1), len(content))


def _decode(content: bytes, path: str, line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise DataError(f"{path} line {line}: byte 0x{byte:02x} is not valid UTF-8, allowed: UTF-8 text") from None


def _read_lines(piece: Piece, text_key: str) -> Iterator[Document]:
    path = piece.file.path
    with _open_lines(path) as file:
        number = _seek_line(file, piece.start)
        compressed = not path.lower().endswith(".jsonl")
        position = file.tell() if not compressed else 0
        while piece.stop is None or position < piece.stop:
            line = file.readline()
            if not line:
                break
            position += len(line)
            number += 1
            if line.strip():
                yield Document(_text_of(line, text_key, path, number), 0 if compressed else len(line))


def _open_lines(path: str) -> io.BufferedIOBase:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs the package zstandard: pip install 'scatterfold[data]'") from None
        return io.BufferedReader(_ZstdReader(open(path, "rb"), zstandard), 1 << 20)
    return open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """Decompress frame after frame. zstandard's own reader takes a file that was cut off for one that ended."""

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True  # nothing of the current frame was read
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._file.read(1 << 17)
            if not block:
                if not self._fresh:
                    raise EOFError("the zstd stream ends early")
                return 0
            self._output = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, block: bytes) -> bytes:
        output = []
        while block:
            try:
                output.append(self._frame.decompress(block))
            except self._zstandard.ZstdError as error:
                raise OSError(f"broken zstd stream: {error}") from None
            self._fresh, block = self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        return b"".join(output)


def _seek_line(file: io.BufferedIOBase, start: int) -> int:
    """Go to the first line that starts at or after byte `start`; the number of lines before it."""
    if start == 0:
        return 0
    lines = 0
    left = start - 1
    while left:
        block = file.read(min(left, 1 << 24))
        if not block:
            break
        lines += block.count(b"\n")
        left -= len(block)
    return lines + (1 if file.readline() else 0)


def _text_of(line: bytes, text_key: str, path: str, number: int) -> str:
    text = _decode(line, path, number)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number} is a JSON {type(record).__name__}, allowed: an object")
    if text_key not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise DataError(f"{path} line {number} has no key {text_key!r}, allowed for data.text_key: {keys}")
    value = record[text_key]
    if not isinstance(value, str):
        raise DataError(f"{path} line {number}: {text_key!r} is a {type(value).__name__}, allowed: a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path} line {number}: {text_key!r} has half a surrogate pair, allowed: UTF-8 text") from None
    return value


def _open_parquet(file: SourceFile) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.path} needs the package pyarrow: pip install 'scatterfold[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is not a whole parquet file: {' '.join(str(error).split())}") from None


def _read_parquet(piece: Piece, text_key: str) -> Iterator[Document]:
    table = _open_parquet(piece.file)
    import pyarrow

    schema = table.schema_arrow
    if text_key not in schema.names:
        raise DataError(
            f"{piece.file.path} has no column {text_key!r}, allowed for data.text_key: {', '.join(schema.names)}"
        )
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise DataError(f"{piece.file.path}: column {text_key!r} holds {kind}, allowed: strings")
    stop = table.num_row_groups if piece.stop is None else piece.stop
    try:
        for batch in table.iter_batches(1024, row_groups=range(piece.start, stop), columns=[text_key]):
            for value in batch.column(0):
                text = value.as_py()
                if text is not None:
                    yield Document(text, 0)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{piece.file.path} is damaged: {' '.join(str(error).split())}") from None
