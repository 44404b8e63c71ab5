"""Open what `data.path` names: prepare raw text on first use, check it, and cut it into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...kernels.errors import DataError
from .batches import Batch, Batches, BatchMaker, Share, ValidBatches
from .cache import cache_folder, digest, locked
from .corpus import Blend, Corpus, TokenSpan
from .indexed import IndexedFacts, check_indexed, indexed_prefix, open_indexed
from .prepare import PrepareSettings, Progress, plan_of, prepare
from .settings import DataSettings, corpora
from .sources import STDLIB, find_files
from .tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Data:
    """Everything that a run reads.

    Attributes:
        train: this rank's training batches.
        valid_batches: (limit) -> this rank's validation batches from the start; None for all.
        tokenizer: of the corpora.
        description: figures to show and to keep, JSON values only.
    """

    train: Batches
    valid_batches: Callable[[int | None], Iterable[Batch]]
    tokenizer: Tokenizer
    description: dict[str, Any]
    train_tokens: TokenSpan
    valid_tokens: TokenSpan

    def train_text(self) -> bytes:
        """The whole training text, documents one after the other."""
        return _text(self.tokenizer, self.train_tokens)

    def valid_text(self) -> bytes:
        """The whole validation text, documents one after the other."""
        return _text(self.tokenizer, self.valid_tokens)


def open_data(
    settings: DataSettings,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Data:
    """Open the corpora of a run. Every rank calls it by itself; file locks let one prepare and the others wait.

    Args:
        rank, world: among the data-parallel ranks.
        seed: of the order of the training samples.
        device: where batches go; for CUDA they are put into page-locked memory.
        progress: called with (bytes done, bytes in all) while raw text is prepared.

    Raises: ConfigError if the batch sizes do not divide; DataError if a corpus is missing, empty, damaged, too short,
        or does not fit the tokenizer, or the cache cannot be written.
    """
    share = Share.of(settings.global_batch_size, settings.micro_batch_size, rank, world)
    named = corpora(settings.path)
    tokenizer = open_tokenizer(settings.tokenizer, settings.eod)
    cache = cache_folder(settings.cache_dir)
    opened = [_open_corpus(name, settings, tokenizer, cache, seed, progress) for name, _ in named]
    weights = [weight or corpus.samples_per_epoch for (_, weight), corpus in zip(named, opened)]
    blend = Blend(opened, weights) if len(opened) > 1 else None
    make = BatchMaker(
        tokenizer.eod,
        tokenizer.byte_lengths,
        settings.pack_documents,
        pin=device is not None and device.type == "cuda",
    )
    valid = TokenSpan([corpus.tokens(corpus.valid) for corpus in opened])
    return Data(
        train=Batches((blend or opened[0]).sample, share, settings.sequence_length, make, prefetch=settings.prefetch),
        valid_batches=ValidBatches(
            valid.read, len(valid), settings.sequence_length, share.micro_batch_size, make, rank, world
        ),
        tokenizer=tokenizer,
        description=_describe(settings, tokenizer, opened, np.array(weights) / np.sum(weights)),
        train_tokens=TokenSpan([corpus.tokens(corpus.train) for corpus in opened]),
        valid_tokens=valid,
    )


def open_tokens(settings: DataSettings, tokenizer: Tokenizer) -> TokenSpan:
    """All tokens of the corpora that `settings.path` names, in stored order; raw text is prepared on first use.

    Raises: DataError if a corpus is missing, empty, damaged, or does not fit the tokenizer.
    """
    cache = cache_folder(settings.cache_dir)
    prefixes = [_checked(name, settings, tokenizer, cache, None)[0] for name, _ in corpora(settings.path)]
    return TokenSpan([open_indexed(prefix).tokens for prefix in prefixes])


def _checked(
    name: str, settings: DataSettings, tokenizer: Tokenizer, cache: Path, progress: Progress | None
) -> tuple[Path, IndexedFacts]:
    """Prefix of a corpus as an indexed dataset, and what is in it."""
    prefix = None if name == STDLIB else indexed_prefix(Path(name).expanduser())
    if prefix is None:
        prefix = _prepared(name, settings, tokenizer, cache, progress)
    facts = check_indexed(prefix, cache)
    if facts.largest >= tokenizer.vocab_size or facts.smallest < 0:
        wrong = facts.smallest if facts.smallest < 0 else facts.largest
        raise DataError(
            f"{prefix} was made with another tokenizer: it holds token id {wrong}, data.tokenizer="
            f"{settings.tokenizer} allows 0 to {tokenizer.vocab_size - 1}"
        )
    return prefix, facts


def _open_corpus(
    name: str, settings: DataSettings, tokenizer: Tokenizer, cache: Path, seed: int, progress: Progress | None
) -> Corpus:
    prefix, facts = _checked(name, settings, tokenizer, cache, progress)
    corpus = Corpus(
        name=name,
        files=open_indexed(prefix),
        facts=facts,
        split=settings.split,
        sequence_length=settings.sequence_length,
        seed=seed,
        tokenizer=tokenizer,
        index_folder=cache / "indices",
    )
    if settings.pack_documents and not _has_separators(corpus):
        raise DataError(
            f"{prefix} has no end-of-document token (id {tokenizer.eod}), which data.pack_documents=true needs to keep "
            "documents apart, allowed: prepare it with append-eod, another data.eod, or data.pack_documents=false"
        )
    return corpus


def _has_separators(corpus: Corpus) -> bool:
    """Whether the last sequence of the training part or one of the first thousand ends in EOD."""
    ends = np.append(corpus.files.offsets[1:1001], corpus.files.offsets[-1]) - 1
    ends = ends[ends >= 0]
    return bool((corpus.files.tokens[ends] == corpus.tokenizer.eod).any())


def _prepared(name: str, settings: DataSettings, tokenizer: Tokenizer, cache: Path, progress: Progress | None) -> Path:
    """Prefix in the cache of a raw corpus, which is prepared if that has not been done."""
    label = Path(name).name or "corpus"
    asked = PrepareSettings(
        source=(name,),
        output=str(cache / "prepared" / label),
        tokenizer=settings.tokenizer,
        eod=settings.eod,
        text_key=settings.text_key,
        workers=settings.workers,
    )
    plan = plan_of(asked, find_files(asked.source)[0], tokenizer)
    output = cache / "prepared" / f"{label}-{plan}"
    with locked(cache, digest(str(output))):
        receipt = prepare(PrepareSettings(**{**vars(asked), "output": str(output)}), progress)
    return Path(receipt.prefix)


def _describe(
    settings: DataSettings, tokenizer: Tokenizer, opened: list[Corpus], weights: np.ndarray
) -> dict[str, Any]:
    return {
        "corpora": [
            {
                "path": corpus.name,
                "weight": float(weight),
                "documents": corpus.facts.documents,
                "content": corpus.facts.content,
                "train_tokens": corpus.num_tokens(corpus.train),
                "valid_tokens": corpus.num_tokens(corpus.valid),
                "samples_per_epoch": corpus.samples_per_epoch,
            }
            for corpus, weight in zip(opened, weights)
        ],
        "train_tokens": sum(corpus.num_tokens(corpus.train) for corpus in opened),
        "valid_tokens": sum(corpus.num_tokens(corpus.valid) for corpus in opened),
        "sequence_length": settings.sequence_length,
        "tokenizer": tokenizer.spec(),
        "vocab_size": tokenizer.vocab_size,
    }


def _text(tokenizer: Tokenizer, span: TokenSpan) -> bytes:
    return b"".join(tokenizer.to_bytes(part) for part in span.parts)
