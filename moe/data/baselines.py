"""What simple models reach on the validation text, in bits per byte: byte unigram, byte trigram, gzip."""

from __future__ import annotations

import gzip
import math
from typing import TYPE_CHECKING

import numpy as np

from ...kernels.errors import DataError

if TYPE_CHECKING:
    from .open import Data

_CHUNK = 1 << 22  # bytes worked on at a time


def measure_baselines(data: Data) -> dict[str, float]:
    """`unigram`, `trigram` and `gzip` of what a run reads: fitted on all of its training text, measured on all of its
    validation text."""
    return text_baselines(data.train_text(), data.valid_text())


def text_baselines(train: bytes, valid: bytes) -> dict[str, float]:
    """Bits per byte of the validation text.

    Returns: `unigram`, each byte coded by its frequency in the training text; `trigram`, by the two bytes before it;
        `gzip`, gzip -9 of the validation text in one stream.
    Raises: DataError if either text is empty.
    """
    for name, text in (("training", train), ("validation", valid)):
        if not text:
            raise DataError(f"the {name} text is empty: baselines need at least one byte")
    return {"unigram": unigram_bits(train, valid), "trigram": Trigram(train).bits(valid), "gzip": gzip_bits(valid)}


def gzip_bits(text: bytes) -> float:
    """Bits per byte of the text after gzip -9."""
    return 8.0 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def unigram_bits(train: bytes, valid: bytes) -> float:
    """Cross-entropy in bits per byte under training frequencies; half a count is added to each of the 256 bytes."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 0.5
    bits = -np.log2(counts / counts.sum())
    return float(np.bincount(np.frombuffer(valid, np.uint8), minlength=256) @ bits / len(valid))


class Trigram:
    """A byte trigram model with interpolated Kneser-Ney smoothing.

    A count gives up a discount D, and what is saved is spread by the next shorter context, where a byte counts once for
    each different byte it was seen after; below the single byte lies the uniform distribution. D = n1 / (n1 + 2 n2) per
    order, from the number of events seen once and twice (Ney, Essen and Kneser 1994; Chen and Goodman 1999, 2.7). On
    the standard library's sources it is a little stronger than Witten-Bell and than absolute discounting.

    Args:
        text: to count on.
    """

    def __init__(self, text: bytes) -> None:
        self._count = _count_trigrams(np.frombuffer(text, np.uint8))  # (a, b, c)
        seen = self._count > 0
        pairs = seen.sum(axis=0, dtype=np.int64)  # (b, c): different bytes before bc
        singles = (pairs > 0).sum(axis=0, dtype=np.int64)  # (c,): different bytes before c
        uniform = np.full(256, 1 / 256)
        self.first = _interpolate(singles, uniform)
        self.second = _interpolate(pairs, self.first)
        self._discount = _discount(self._count)
        total = self._count.sum(axis=2, dtype=np.int64)
        self._scale = 1.0 / np.maximum(total, 1)
        self._saved = np.where(total > 0, self._discount * seen.sum(axis=2) * self._scale, 1.0)

    def probability(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Probability of byte c after bytes a, b; arrays of one shape."""
        own = np.maximum(self._count[a, b, c] - self._discount, 0.0) * self._scale[a, b]
        return own + self._saved[a, b] * self.second[b, c]

    def bits(self, text: bytes) -> float:
        """Bits per byte of a text; its first byte is coded without context, its second by the first."""
        values = np.frombuffer(text, np.uint8)
        total = -math.log2(self.first[values[0]])
        if len(values) > 1:
            total -= math.log2(self.second[values[0], values[1]])
        for start in range(2, len(values), _CHUNK):
            stop = min(start + _CHUNK, len(values))
            a, b, c = (values[start - back : stop - back] for back in (2, 1, 0))
            total -= float(np.log2(self.probability(a, b, c)).sum())
        return total / len(values)


def _count_trigrams(values: np.ndarray) -> np.ndarray:
    counts = np.zeros(1 << 24, dtype=np.int64)
    for start in range(2, len(values), _CHUNK):
        stop = min(start + _CHUNK, len(values))
        a, b, c = (values[start - back : stop - back].astype(np.int32) for back in (2, 1, 0))
        code, count = np.unique(a << 16 | b << 8 | c, return_counts=True)
        counts[code] += count
    return counts.reshape(256, 256, 256)


def _discount(counts: np.ndarray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


def _interpolate(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Discounted frequencies over the last axis, with the discounts spread like `shorter`."""
    discount = _discount(counts)
    total = counts.sum(axis=-1, keepdims=True)
    own = np.maximum(counts - discount, 0.0) / np.maximum(total, 1)
    saved = np.where(total > 0, discount * (counts > 0).sum(axis=-1, keepdims=True) / np.maximum(total, 1), 1.0)
    return own + saved * shorter
