"""The data group of a config, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.errors import ConfigError


@dataclass(frozen=True)
class DataSettings:
    """What a run reads and how it is cut into batches.

    Attributes:
        path: "stdlib" (the standard library's source files), a file or folder of raw text, the prefix of an indexed
            dataset (PREFIX.bin and PREFIX.idx), a list of these, or a list of {path, weight}, or {path: weight}.
            Without weights each corpus counts by its size.
        tokenizer: "bytes", or a Hugging Face tokenizer.json.
        eod: the tokenizer's text for the document separator; None to find it among the usual names.
        sequence_length: tokens per row.
        global_batch_size: rows per optimizer step, over all ranks.
        micro_batch_size: rows per forward pass; None for all rows of a rank at once.
        split: shares of documents, "train,valid" or "train,valid,test", taken in the order in which they are stored.
        pack_documents: documents in one row do not see each other.
        text_key: jsonl key or parquet column that holds the text.
        cache_dir: where raw text is kept once prepared; None for $XDG_CACHE_HOME/scatterfold or ~/.cache/scatterfold.
        workers: processes that prepare raw text; None for one a core.
        prefetch: steps to prepare ahead in the background.
    """

    path: Any = "stdlib"
    tokenizer: str = "bytes"
    eod: str | None = None
    sequence_length: int = 512
    global_batch_size: int = 32
    micro_batch_size: int | None = None
    split: str = "95,5"
    pack_documents: bool = True
    text_key: str = "text"
    cache_dir: str | None = None
    workers: int | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("global_batch_size", 1), ("prefetch", 0)):
            self._at_least(name, least)
        for name in ("micro_batch_size", "workers"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        split_shares(self.split)
        corpora(self.path)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"data.{name}={value} is too small, allowed: {least} or more")


def split_shares(split: str) -> tuple[float, float, float]:
    """Normalised shares of train, valid and test of a split such as "95,5".

    Raises: ConfigError unless it is two or three numbers of which the first two are above 0.
    """
    try:
        numbers = [float(part) for part in str(split).split(",")]
    except ValueError:
        numbers = []
    valid = len(numbers) in (2, 3) and min(numbers[:2]) > 0 and min(numbers) >= 0 and sum(numbers) < float("inf")
    if not valid:
        raise ConfigError(
            f'data.split={split!r} is wrong, allowed: shares of train, valid (and test) such as "95,5" or "98,1,1"'
        )
    total = sum(numbers)
    train, valid_share, test = (number / total for number in [*numbers, 0.0][:3])
    return train, valid_share, test


def corpora(path: Any) -> list[tuple[str, float | None]]:
    """(path, weight) of each corpus that `data.path` names; weights are all numbers or all None.

    Raises: ConfigError if it is empty, a path is not a string, or a weight is not above 0 or given for some only.
    """
    entries = _entries(path)
    if not entries or not all(isinstance(name, str) and name for name, _ in entries):
        raise ConfigError(
            f"data.path={'null' if path is None else repr(path)} names no corpus, allowed: a path, a list of paths, or "
            "a list of {path, weight}"
        )
    if all(weight is None for _, weight in entries):
        return [(name, None) for name, _ in entries]
    for name, weight in entries:
        if weight is None:
            raise ConfigError(f"data.path gives {name} no weight but another corpus one, allowed: to all or to none")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise ConfigError(f"data.path: weight={weight!r} of {name} is out of range, allowed: a number above 0")
    return [(name, float(weight)) for name, weight in entries]


def _entries(path: Any) -> list[tuple[Any, Any]]:
    """(path, weight) as written, with None for what is not there."""
    if isinstance(path, Mapping) and "path" not in path:
        return list(path.items())
    entries: list[tuple[Any, Any]] = []
    for entry in path if isinstance(path, list | tuple) else [path]:
        if not isinstance(entry, Mapping):
            entries.append((entry, None))
            continue
        if unknown := sorted(map(str, set(entry) - {"path", "weight"})):
            raise ConfigError(f"data.path has an entry with the unknown key {unknown[0]!r}, allowed: path, weight")
        entries.append((entry.get("path"), entry.get("weight")))
    return entries
