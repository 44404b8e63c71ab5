"""`scatterfold data`: from raw text to the datasets that training reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .arguments import argument
from .subcommands import run_subcommand

if TYPE_CHECKING:
    from ..moe.data.prepare import PrepareReceipt

HELP = """Work on text corpora.

  prepare    raw text into a Megatron indexed dataset

Example:
  scatterfold data prepare source=books/ output=data/books"""


@dataclass(frozen=True)
class Prepare:
    """Turn raw text into a Megatron indexed dataset (OUTPUT.bin, OUTPUT.idx) and a receipt (OUTPUT.json).

    Reads folders and files of .txt, .md, .py and other text, .jsonl (.gz, .zst) and .parquet. A preparation that was
    cut short goes on where it was; the result is the same for any number of workers.
    """

    EXAMPLE: ClassVar[str] = (
        "scatterfold data prepare source=corpus.jsonl.gz output=data/corpus tokenizer=tokenizer.json"
    )

    source: tuple[str, ...] = argument("file or folder, several as [A,B], or stdlib: the running Python's library")
    output: str = argument("prefix of the dataset")
    tokenizer: str = argument("bytes, or a Hugging Face tokenizer.json", default="bytes")
    eod: str | None = argument(
        "the tokenizer's text for the document separator, found by itself if usual", default=None
    )
    workers: int | None = argument("processes, one a core if not given", default=None, least=1)
    text_key: str = argument("jsonl key or parquet column of the text", default="text")
    shuffle: bool = argument("store documents in a random order, so that any end of them can validate", default=True)
    json: Path | None = argument("also write the receipt to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_subcommand("data", HELP, {"prepare": (Prepare, _prepare)}, argv)


def _prepare(settings: Prepare) -> int:
    from ..moe.data.prepare import PrepareSettings, prepare
    from .files import check_target, write_atomically

    check_target(settings.json)
    with _progress_bar("preparing") as progress:
        receipt = prepare(
            PrepareSettings(
                source=settings.source,
                output=settings.output,
                tokenizer=settings.tokenizer,
                eod=settings.eod,
                text_key=settings.text_key,
                shuffle=settings.shuffle,
                workers=settings.workers,
            ),
            progress=progress,
        )
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(receipt.record(), indent=2) + "\n")
    _show(receipt)
    return 0


@contextmanager
def _progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal; nothing in a log file."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(receipt: PrepareReceipt) -> None:
    rows = [
        ("dataset", f"{receipt.prefix}.bin, .idx"),
        ("documents", f"{receipt.documents:,}, and {receipt.empty_documents:,} empty ones left out"),
        ("tokens", f"{receipt.tokens:,} ({receipt.token_type})"),
        ("text", f"{receipt.text_bytes:,} bytes in {len(receipt.files):,} files"),
    ]
    if receipt.skipped_files:
        rows.append(("skipped", f"{receipt.skipped_files:,} files that hold no text"))
    for name, value in rows:
        print(f"{name:<9}  {value}")


if __name__ == "__main__":
    sys.exit(main())
