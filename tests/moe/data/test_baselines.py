"""Baselines against plain loops."""

import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import DataError
from scatterfold.moe.data.baselines import Trigram, gzip_bits, text_baselines, unigram_bits

TRAIN = b"the cat sat on the mat, the rat sat on the cat; and that was that. " * 3 + bytes(range(40))
VALID = b"the bat sat on that hat\xff"


def discount(counts):
    once, twice = sum(n == 1 for n in counts), sum(n == 2 for n in counts)
    return once / (once + 2 * twice) if once and twice else 0.5


def kneser_ney(text):
    """(contexts of 0, 1, 2 bytes, byte) -> probability, event by event."""
    trigrams = Counter(zip(text, text[1:], text[2:]))
    pairs = Counter((b, c) for _, b, c in trigrams)
    singles = Counter(c for _, c in pairs)
    tables = [{(c,): n for c, n in singles.items()}, dict(pairs), dict(trigrams)]
    discounts = [discount(table.values()) for table in tables]
    grouped = []
    for table in tables:
        group = defaultdict(dict)
        for event, n in table.items():
            group[event[:-1]][event[-1]] = n
        grouped.append(group)

    def probability(context, c):
        followers = grouped[len(context)].get(tuple(context), {})
        shorter = probability(context[1:], c) if context else 1 / 256
        total = sum(followers.values())
        if not total:
            return shorter
        d = discounts[len(context)]
        return max(followers.get(c, 0) - d, 0) / total + d * len(followers) / total * shorter

    return probability


def test_the_trigram_is_kneser_ney():
    model, reference = Trigram(TRAIN), kneser_ney(TRAIN)
    bits = -math.log2(reference([], VALID[0])) - math.log2(reference([VALID[0]], VALID[1]))
    bits -= sum(math.log2(reference([a, b], c)) for a, b, c in zip(VALID, VALID[1:], VALID[2:]))
    assert model.bits(VALID) == pytest.approx(bits / len(VALID), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(text=st.binary(min_size=0, max_size=200), a=st.integers(0, 255), b=st.integers(0, 255))
def test_probabilities_sum_to_one_after_every_context(text, a, b):
    model = Trigram(text)
    c = np.arange(256)
    assert model.first.sum() == pytest.approx(1) and model.second.sum(axis=1) == pytest.approx(np.ones(256))
    contexts = [(a, b), *zip(text, text[1:])][:20]
    for first, second in contexts:
        p = model.probability(np.full(256, first), np.full(256, second), c)
        assert p.sum() == pytest.approx(1) and p.min() > 0


def test_the_unigram_by_hand():
    # 3 a, 1 b, half a count more for each of 256 bytes: 132 in all
    expected = -(math.log2(3.5 / 132) + math.log2(0.5 / 132)) / 2
    assert unigram_bits(b"aaab", b"az") == pytest.approx(expected)


def test_gzip_is_the_whole_text_in_one_stream():
    text = VALID * 50
    assert gzip_bits(text) == 8 * len(gzip.compress(text, 9)) / len(text)


def test_chunks_change_nothing(monkeypatch):
    whole = text_baselines(TRAIN, VALID)
    monkeypatch.setattr("scatterfold.moe.data.baselines._CHUNK", 7)
    assert text_baselines(TRAIN, VALID) == pytest.approx(whole)
    assert list(whole) == ["unigram", "trigram", "gzip"] and whole["trigram"] < whole["unigram"]


def test_empty_text_is_refused():
    with pytest.raises(DataError, match="the validation text is empty"):
        text_baselines(TRAIN, b"")
    assert text_baselines(b"a", b"a")["trigram"] == pytest.approx(8)  # nothing learnt: uniform
