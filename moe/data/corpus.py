"""Corpora for training: splits, epochs, and blends, addressed by one global sample number."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import ConfigError, DataError
from . import megatron
from .batches import Row
from .indexed import IndexedFacts, IndexedFiles
from .settings import split_shares
from .tokenizer import Tokenizer

BLEND_CYCLE = 1 << 16  # positions after which the interleaving of a blend repeats, if no weight is very small
LONGEST_CYCLE = 1 << 22
_OPEN_EPOCHS = 2  # a step may lie across the end of an epoch


class TokenSpan:
    """Several stretches of tokens read as one."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 token ids."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        pieces = []
        for index in range(first, last + 1):
            offset = self._starts[index]
            pieces.append(self.parts[index][max(start - offset, 0) : stop - offset])
        return np.concatenate(pieces).astype(np.int64)


@dataclass
class Corpus:
    """One indexed dataset, split by its sequences in stored order.

    Attributes:
        train, valid: (start, stop) of sequences.
        samples_per_epoch: rows of `sequence_length` tokens in the training part.
    """

    name: str
    files: IndexedFiles
    facts: IndexedFacts
    split: str
    sequence_length: int
    seed: int
    tokenizer: Tokenizer
    index_folder: Path
    _epochs: OrderedDict[int, Any] = field(default_factory=OrderedDict)
    _dataset: Any = None

    def __post_init__(self) -> None:
        sequences = len(self.files.offsets) - 1
        shares = split_shares(self.split)
        edges = [round(share * sequences) for share in np.cumsum([0.0, *shares[:2]]).tolist()]
        self.train, self.valid = (edges[0], edges[1]), (edges[1], edges[2])
        for part, (start, stop) in (("training", self.train), ("validation", self.valid)):
            if start == stop:
                raise DataError(
                    f"data.split={self.split!r} of {self.name} leaves no document for {part}: it holds {sequences}"
                )
        train_tokens = self.num_tokens(self.train)
        self.samples_per_epoch = (train_tokens - 1) // self.sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"data.sequence_length={self.sequence_length} is longer than the data: the training split of "
                f"{self.name} holds {train_tokens} tokens, allowed: {train_tokens - 1} or less"
            )

    def num_tokens(self, part: tuple[int, int]) -> int:
        return int(self.files.offsets[part[1]] - self.files.offsets[part[0]])

    def tokens(self, part: tuple[int, int]) -> np.ndarray:
        """All tokens of a part, mapped from the file."""
        return self.files.tokens[self.files.offsets[part[0]] : self.files.offsets[part[1]]]

    def sample(self, number: int) -> Row:
        """Row `number` of an endless training text, in which every epoch has its own order."""
        epoch, index = divmod(number, self.samples_per_epoch)
        item = self._epoch(epoch)[index]
        return item["tokens"].numpy(), item["labels"].numpy()

    def _epoch(self, epoch: int) -> Any:
        if epoch in self._epochs:
            return self._epochs[epoch]
        if self._dataset is None:
            self._dataset = megatron.open_indexed_dataset(str(self.files.prefix))
        self._epochs[epoch] = megatron.one_epoch_dataset(
            self._dataset,
            str(self.files.prefix),
            np.arange(*self.train, dtype=np.int64),
            self.sequence_length,
            epoch_seed(self.seed, epoch),
            self.tokenizer.vocab_size,
            self.tokenizer.eod,
            self.index_folder,
        )
        while len(self._epochs) > _OPEN_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]


class Blend:
    """Corpora interleaved by weight. Position p is a function of p alone: neither steps nor ranks change it.

    megatron-core's greedy interleaving is laid out once for a cycle of positions, and every cycle repeats it with the
    next samples of each corpus, so any position is found without counting from the start.

    Raises: ConfigError if a weight is so small that its corpus would hardly ever be read.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        self.corpora = list(corpora)
        self.weights = (np.array(weights) / np.sum(weights)).tolist()
        self._corpus, self._sample = megatron.blending_indices(self.weights, self._cycle())
        self._per_cycle = np.bincount(self._corpus, minlength=len(self.corpora))

    def _cycle(self) -> int:
        """Long enough for the smallest share to be right within a few percent."""
        smallest = int(np.argmin(self.weights))
        if self.weights[smallest] < 1 / LONGEST_CYCLE:
            raise ConfigError(
                f"data.path: {self.corpora[smallest].name} has {self.weights[smallest]:.3g} of all weight, allowed: "
                f"{1 / LONGEST_CYCLE:.3g} or more"
            )
        return int(min(max(16 / self.weights[smallest], BLEND_CYCLE), LONGEST_CYCLE))

    def locate(self, number: int) -> tuple[int, int]:
        """(corpus, sample of that corpus) of a position."""
        cycle, position = divmod(number, len(self._corpus))
        corpus = int(self._corpus[position])
        return corpus, cycle * int(self._per_cycle[corpus]) + int(self._sample[position])

    def sample(self, number: int) -> Row:
        corpus, sample = self.locate(number)
        return self.corpora[corpus].sample(sample)


def epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for the order of one epoch."""
    return int.from_bytes(hashlib.sha256(f"data/{seed}/{epoch}".encode()).digest()[:4], "little")
