"""Tokenise a shard of a corpus, in the calling process or in a worker process (see pool.py).

A worker process reads jobs from its standard input, one JSON object a line, and answers on its standard output. It ends
when its input does, so it never outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...kernels.errors import DataError
from ...parallel.disk import flush
from .cache import WriteError, writing
from .sources import Document, Piece, SourceFile, read_documents
from .tokenizer import Tokenizer, tokenizer_from

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Shard:
    """The unit of work and of resuming: pieces of a corpus, tokenised into FOLDER/NAME.bin and FOLDER/NAME.npz.

    The .npz (per document: length in tokens with EOD, and sort key) is renamed last: a shard that has it is whole.
    """

    name: str
    pieces: tuple[Piece, ...]

    def is_done(self, folder: Path) -> bool:
        return (folder / f"{self.name}.npz").is_file()


def token_type(vocab_size: int) -> type[np.integer]:
    """The type that megatron-core chooses for ids of a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def tokenize_shard(
    shard: Shard, tokenizer: Tokenizer, text_key: str, folder: Path, report: Callable[[int], None]
) -> None:
    """Write the tokens of a shard's documents, each ending in EOD, in the order of the pieces.

    `report` is called with the number of source bytes done since the last call.
    """
    final = [folder / f"{shard.name}{suffix}" for suffix in (".bin", ".npz")]
    temporary = [folder / f".{shard.name}{suffix}.{os.getpid()}.tmp" for suffix in (".bin", ".npz")]
    try:
        with open(temporary[0], "wb") as file:
            table = _write_tokens(file, shard, tokenizer, text_key, report)
        with open(temporary[1], "wb") as file:
            np.savez(file, lengths=table["lengths"], keys=table["keys"], counts=table["counts"])
        for path, name in zip(temporary, final):
            flush(path)
            path.replace(name)
        flush(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _write_tokens(
    file: BinaryIO, shard: Shard, tokenizer: Tokenizer, text_key: str, report: Callable[[int], None]
) -> dict[str, np.ndarray]:
    dtype = token_type(tokenizer.vocab_size)
    lengths, keys, num_bytes, empty = [], [], 0, 0
    for piece in shard.pieces:
        reported = 0
        for batch in _batches(read_documents(piece, text_key)):
            texts = [document.text for document in batch if document.text]
            empty += len(batch) - len(texts)
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                file.write(np.append(ids.astype(dtype), dtype(tokenizer.eod)).tobytes())
                lengths.append(len(ids) + 1)
                content = text.encode()
                num_bytes += len(content)
                keys.append(0 if piece.file.train_only else _key(content))
            cost = min(sum(document.cost for document in batch), cost_of(piece) - reported)
            reported += cost
            report(cost)
        report(cost_of(piece) - reported)  # what a compressed file or a skipped line did not report
    return {
        "lengths": np.array(lengths, dtype=np.int64),
        "keys": np.array(keys, dtype=np.uint64),
        "counts": np.array([num_bytes, empty], dtype=np.int64),
    }


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _key(content: bytes) -> int:
    """Where a document stands in the shuffled order: a hash of its text, so equal documents lie side by side."""
    return max(1, int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def cost_of(piece: Piece) -> int:
    """Bytes of the source that a piece stands for."""
    if piece.file.kind == "jsonl" and piece.stop is not None:
        return piece.stop - piece.start
    return piece.file.size if piece.start == 0 else 0  # a parquet file counts with its first piece


def shard_from_json(value: dict[str, Any]) -> Shard:
    pieces = [Piece(SourceFile(**piece["file"]), piece["start"], piece["stop"]) for piece in value["pieces"]]
    return Shard(value["name"], tuple(pieces))


def main() -> None:
    """Answer jobs until the input ends: {"bytes": n} while working, then {"done": true} or {"error": message}."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may write into the answers
    setup = json.loads(sys.stdin.readline() or "null")
    if setup is None:
        return
    folder, output, text_key = Path(setup["folder"]), Path(setup["output"]), setup["text_key"]

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    try:
        tokenizer = tokenizer_from(setup["tokenizer"])
        for line in sys.stdin:
            with writing(output):
                tokenize_shard(
                    shard_from_json(json.loads(line)), tokenizer, text_key, folder, lambda count: answer(bytes=count)
                )
            answer(done=True)
    except DataError as error:
        answer(error=str(error), write=isinstance(error, WriteError))
    except BrokenPipeError:
        os._exit(1)
