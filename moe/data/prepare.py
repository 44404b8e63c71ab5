"""Raw text -> a Megatron indexed dataset: resumable, in several processes, the same bytes for any number of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import ConfigError, DataError
from ...parallel.disk import flush
from .cache import WriteError, digest, locked, write_json, writing
from .sources import Piece, SourceFile, cut, find_files
from .tokenizer import Tokenizer, open_tokenizer
from .worker import Shard, cost_of, token_type, tokenize_shard

FORMAT = 1  # raise it when the same settings give other bytes
FEW_DOCUMENTS = 100  # below it, long documents are stored in parts
SHORTEST_PART = 256  # tokens

Progress = Callable[[int, int], None]  # source bytes done, of how many


@dataclass(frozen=True)
class PrepareSettings:
    """What `scatterfold data prepare` is asked for.

    Attributes:
        source: files and folders of text, or "stdlib".
        output: prefix of the dataset: OUTPUT.bin, OUTPUT.idx and the receipt OUTPUT.json.
        tokenizer: "bytes", or a Hugging Face tokenizer.json.
        eod: the tokenizer's text for the document separator; None to find it among the usual names.
        text_key: jsonl key or parquet column that holds the text.
        shuffle: store documents in a random order (by a hash of their text, the same on every machine), so that the
            end of the dataset, which a split takes for validation, is like the rest; equal documents then lie side by
            side and do not end up in both. False keeps the order of the source.
        workers: processes; None for one a core.
        shard_bytes: source bytes per unit of work; what a killed run has finished, it does not do again.
    """

    source: tuple[str, ...]
    output: str
    tokenizer: str = "bytes"
    eod: str | None = None
    text_key: str = "text"
    shuffle: bool = True
    workers: int | None = None
    shard_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))
        if not self.source:
            raise ConfigError("source=[] names no corpus, allowed: files and folders of text, or stdlib")
        for name in ("workers", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small, allowed: 1 or more")
        if not self.output or self.output.endswith(("/", os.sep)):
            raise ConfigError(f"output={self.output!r} is wrong, allowed: a prefix such as data/corpus")


@dataclass(frozen=True)
class PrepareReceipt:
    """What was prepared; OUTPUT.json holds the same.

    Attributes:
        prefix: of the dataset.
        sources: as asked for; files: (name, bytes) of each file read; skipped_files: others in the folders.
        documents, sequences, tokens: stored counts; tokens include one EOD a document.
        empty_documents: left out.
        text_bytes: UTF-8 bytes of the text.
        token_type: of the .bin.
        tokenizer: its description.
        text_key, shuffled: as asked for.
        bin_sha256, idx_sha256: of the two files.
        plan: identifies sources (with sizes and times), tokenizer and options.
    """

    prefix: str
    sources: list[str]
    files: list[list[Any]]
    skipped_files: int
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    text_bytes: int
    token_type: str
    tokenizer: dict[str, Any]
    text_key: str
    shuffled: bool
    bin_sha256: str
    idx_sha256: str
    plan: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def prepare(settings: PrepareSettings, progress: Progress | None = None) -> PrepareReceipt:
    """Tokenise a corpus into an indexed dataset; at once if that has been done.

    Shards are tokenised into OUTPUT.partial/, then merged; the dataset appears under its name when it is whole. A run
    that was killed goes on with the shards that are not done.

    Args:
        progress: called with (source bytes done, source bytes of the whole corpus), from any thread.

    Raises: DataError if the corpus is missing, empty or unreadable, or the output cannot be written or holds something
        else; nothing half-written stays behind.
    """
    files, skipped = find_files(settings.source)
    tokenizer = open_tokenizer(settings.tokenizer, settings.eod)
    plan = plan_of(settings, files, tokenizer)
    output = Path(settings.output).expanduser().absolute()
    work = output.with_name(output.name + ".partial")
    if (receipt := _existing(output, plan)) is not None:
        return receipt
    try:
        with writing(output):
            work.mkdir(parents=True, exist_ok=True)
            with locked(work, "prepare"):
                if (receipt := _existing(output, plan)) is None:  # another process may have been faster
                    shards = _shards(files, settings, tokenizer)
                    _tokenize(shards, settings, tokenizer, work, output, progress)
                    counts = _merge(shards, settings, tokenizer, work, output)
                    receipt = _receipt(settings, files, skipped, tokenizer, plan, output, counts)
                    _publish(work, output, receipt)
        shutil.rmtree(work, ignore_errors=True)
        return receipt
    except BaseException as error:
        _tidy(work, everything=isinstance(error, WriteError))
        raise


def plan_of(settings: PrepareSettings, files: Sequence[SourceFile], tokenizer: Tokenizer) -> str:
    """Identifies what a preparation gives: equal plans give equal bytes."""
    return digest([FORMAT, [asdict(file) for file in files], _spec(tokenizer), settings.text_key, settings.shuffle])


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    return {key: value for key, value in tokenizer.spec().items() if key != "path"}


def _existing(output: Path, plan: str) -> PrepareReceipt | None:
    """The receipt of a finished dataset. Raises: DataError if the output holds something else."""
    bin_file, idx_file, receipt_file = (output.with_name(output.name + suffix) for suffix in (".bin", ".idx", ".json"))
    if not idx_file.exists():  # it is renamed last
        if bin_file.exists() and not output.with_name(output.name + ".partial").exists():
            raise DataError(f"output={output}: {bin_file} exists without an .idx, allowed: remove it or choose another")
        return None
    try:
        receipt = PrepareReceipt(**json.loads(receipt_file.read_text()))
        if receipt.plan == plan and bin_file.is_file():
            return receipt
    except (OSError, TypeError, ValueError):
        pass
    raise DataError(
        f"output={output} holds a dataset of other sources or options, allowed: remove it or choose another"
    )


def _shards(files: Sequence[SourceFile], settings: PrepareSettings, tokenizer: Tokenizer) -> list[Shard]:
    """Cut the corpus into shards, in order. A shard's name identifies its content, so it is reused only for that."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for file in files:
        for piece in cut(file, settings.shard_bytes):
            if groups[-1] and filled + cost_of(piece) > settings.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(piece)
            filled += cost_of(piece)
    common = [FORMAT, _spec(tokenizer), settings.text_key]
    names = [digest([*common, index, [asdict(piece) for piece in group]]) for index, group in enumerate(groups)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups)]


def _tokenize(
    shards: Sequence[Shard],
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    work: Path,
    output: Path,
    progress: Progress | None,
) -> None:
    total = sum(cost_of(piece) for shard in shards for piece in shard.pieces)
    missing = [shard for shard in shards if not shard.is_done(work)]
    done = total - sum(cost_of(piece) for shard in missing for piece in shard.pieces)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    report(0)
    workers = min(settings.workers or os.cpu_count() or 1, len(missing))
    if workers <= 1:
        for shard in missing:
            tokenize_shard(shard, tokenizer, settings.text_key, work, report)
        return
    from .pool import Pool

    setup = {"tokenizer": tokenizer.spec(), "text_key": settings.text_key, "folder": str(work), "output": str(output)}
    with Pool(workers, setup) as pool:
        pool.run([asdict(shard) for shard in missing], report)


def _merge(
    shards: Sequence[Shard], settings: PrepareSettings, tokenizer: Tokenizer, work: Path, output: Path
) -> dict[str, int]:
    """Write all documents in their final order through megatron-core's builder, into the work folder."""
    from .megatron import indexed_dataset_builder

    dtype = token_type(tokenizer.vocab_size)
    tables = [np.load(work / f"{shard.name}.npz") for shard in shards]
    lengths = np.concatenate([table["lengths"] for table in tables])
    if not len(lengths):
        shutil.rmtree(work)
        raise DataError(f"{', '.join(settings.source)} holds no text: every document is empty")
    order = np.concatenate([table["keys"] for table in tables]).argsort(kind="stable")
    part = _part_length(lengths)
    builder = indexed_dataset_builder(str(work / "merged.bin"), dtype)
    for tokens in _documents(
        shards, [table["lengths"] for table in tables], work, dtype, order if settings.shuffle else None
    ):
        builder.add_document(tokens, [min(part, len(tokens) - at) for at in range(0, len(tokens), part)])
    builder.finalize(str(work / "merged.idx"))
    return {
        "documents": len(lengths),
        "sequences": int((-(-lengths // part)).sum()),
        "tokens": int(lengths.sum()),
        "text_bytes": sum(int(table["counts"][0]) for table in tables),
        "empty_documents": sum(int(table["counts"][1]) for table in tables),
    }


def _part_length(lengths: np.ndarray) -> int:
    """Longest sequence to store. A split goes by sequences, so a corpus of few documents (a single file, say) could
    not be split unless its long documents are stored in parts, as megatron-core stores sentences."""
    if len(lengths) >= FEW_DOCUMENTS:
        return 1 << 30  # lengths are int32 in the index
    return min(1 << 30, max(SHORTEST_PART, int(lengths.sum()) // FEW_DOCUMENTS))


def _documents(
    shards: Sequence[Shard],
    lengths: Sequence[np.ndarray],
    work: Path,
    dtype: type[np.integer],
    order: np.ndarray | None,
) -> Iterator[np.ndarray]:
    """Tokens of every document, in the order of the shards or in the given one."""
    tokens = [
        np.memmap(work / f"{shard.name}.bin", dtype=dtype, mode="r") if len(table) else np.empty(0, dtype)
        for shard, table in zip(shards, lengths)
    ]
    ends = [np.cumsum(table) for table in lengths]
    first = np.cumsum([0, *(len(table) for table in lengths)])
    for number in range(int(first[-1])) if order is None else order:
        shard = int(np.searchsorted(first, number, side="right")) - 1
        stop = ends[shard][number - first[shard]]
        yield tokens[shard][stop - lengths[shard][number - first[shard]] : stop]


def _receipt(
    settings: PrepareSettings,
    files: Sequence[SourceFile],
    skipped: int,
    tokenizer: Tokenizer,
    plan: str,
    output: Path,
    counts: dict[str, int],
) -> PrepareReceipt:
    work = output.with_name(output.name + ".partial")
    return PrepareReceipt(
        prefix=str(output),
        sources=list(settings.source),
        files=[[file.name, file.size] for file in files],
        skipped_files=skipped,
        **counts,
        token_type=token_type(tokenizer.vocab_size).__name__,
        tokenizer=tokenizer.spec(),
        text_key=settings.text_key,
        shuffled=settings.shuffle,
        bin_sha256=_sha256(work / "merged.bin"),
        idx_sha256=_sha256(work / "merged.idx"),
        plan=plan,
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(work: Path, output: Path, receipt: PrepareReceipt) -> None:
    """Give the files their final names, the .idx last: without it there is no dataset."""
    write_json(work / "merged.json", receipt.record())
    for suffix in (".bin", ".json", ".idx"):
        source = work / f"merged{suffix}"
        flush(source)
        source.replace(output.with_name(output.name + suffix))
    flush(output.parent)


def _tidy(work: Path, everything: bool) -> None:
    """After an error: remove what is half-written; keep whole shards for the next try if the disk took them."""
    if everything or not any(work.glob("*.npz")):
        shutil.rmtree(work, ignore_errors=True)
        return
    for path in [*work.glob("merged.*"), *work.glob(".*.tmp")]:
        path.unlink(missing_ok=True)
