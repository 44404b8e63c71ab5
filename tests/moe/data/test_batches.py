"""Batches: every sample goes to one rank once, and every validation token is a target once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import ConfigError
from scatterfold.moe.data.batches import MASKED, Batches, BatchMaker, Share, ValidBatches

EOD = 9
BYTE_LENGTHS = np.array([1, 1, 1, 2, 2, 3, 1, 1, 1, 0])


def maker(**options):
    return BatchMaker(EOD, BYTE_LENGTHS, **options)


@given(world=st.integers(1, 6), micro=st.integers(1, 4), count=st.integers(1, 4), step=st.integers(0, 50))
def test_ranks_share_a_global_batch_in_order(world, micro, count, step):
    size = world * micro * count
    shares = [Share(size, micro, rank, world) for rank in range(world)]
    samples = [index for share in shares for indices in share.samples(step) for index in indices]
    assert samples == list(range(step * size, (step + 1) * size))
    assert all(len(indices) == micro for share in shares for indices in share.samples(step))
    assert all(share.micro_batches == count for share in shares)


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"data.global_batch_size=10 does not divide over 4 .* a multiple of 4"):
        Share(10, 1, 0, 4)
    with pytest.raises(ConfigError, match=r"data.micro_batch_size=3 does not divide the 4 sequences .* of 2 ranks"):
        Share(8, 3, 0, 2)
    assert Share.of(8, None, 0, 2).micro_batch_size == 4


def test_boundaries_are_row_starts_and_separators():
    rows = [
        (np.array([1, EOD, 2, EOD]), np.array([EOD, 2, EOD, 3])),
        (np.array([EOD, 4, 5, 6]), np.array([4, 5, 6, EOD])),
    ]
    packed = maker()(rows)
    assert packed.cu_seqlens.tolist() == [0, 1, 3, 4, 8]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.tokens.dtype == torch.int64
    assert maker(pack_documents=False)(rows).cu_seqlens.tolist() == [0, 4, 8]
    assert (packed.num_targets, packed.num_bytes) == (8, 0 + 1 + 0 + 2 + 2 + 3 + 1 + 0)


def numbered_rows(length):
    return lambda number: (np.full(length, number % 9), np.full(length, (number + 1) % 9))


def test_prefetching_changes_nothing_in_any_order_of_steps():
    share = Share(4, 2, 1, 2)
    plain = Batches(numbered_rows(3), share, 3, maker(), prefetch=0)
    ahead = Batches(numbered_rows(3), share, 3, maker(), prefetch=3)
    for step in [0, 1, 2, 7, 8, 3, 3, 0]:
        for left, right in zip(plain.step(step), ahead.step(step), strict=True):
            assert torch.equal(left.tokens, right.tokens) and torch.equal(left.labels, right.labels)
    ahead.close()
    assert torch.equal(ahead.step(5)[0].tokens, plain.step(5)[0].tokens)
    ahead.close()
    assert (plain.tokens_per_step, plain.targets_per_step, plain.micro_batches) == (12, 12, 1)


def test_an_error_in_the_background_reaches_the_step_that_asked_for_it():
    def sample(number):
        if number >= 2:
            raise RuntimeError("no such sample")
        return numbered_rows(3)(number)

    batches = Batches(sample, Share(1, 1), 3, maker(), prefetch=2)
    batches.step(0)
    batches.step(1)
    with pytest.raises(RuntimeError, match="no such sample"):
        batches.step(2)
    batches.close()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    length=st.integers(2, 9),
    micro=st.integers(1, 3),
    world=st.integers(1, 4),
)
def test_validation_reads_every_token_once_whatever_the_world(tokens, length, micro, world):
    text = np.array(tokens)

    def read(start, stop):
        assert 0 <= start < stop <= len(text)
        return text[start:stop]

    ranks = [ValidBatches(read, len(text), length, micro, maker(), rank, world) for rank in range(world)]
    batches = [list(rank(None)) for rank in ranks]
    assert {len(own) for own in batches} == {len(ranks[0])}
    rows = [row for group in zip(*batches) for batch in group for row in zip(batch.tokens, batch.labels)]
    seen = torch.cat([labels[labels != MASKED] for _, labels in rows]).tolist()
    assert seen == tokens
    context = torch.cat([row_tokens[labels != MASKED] for row_tokens, labels in rows]).tolist()
    assert context == [EOD, *tokens[:-1]]  # each target follows the token before it; the text follows an EOD
    everything = [batch for own in batches for batch in own]
    assert sum(batch.num_targets for batch in everything) == len(tokens)
    assert sum(batch.num_bytes for batch in everything) == BYTE_LENGTHS[text].sum()
    assert {tuple(batch.tokens.shape) for batch in everything} == {(micro, length)}


def test_a_limited_evaluation_is_spread_over_the_text():
    text = np.arange(64) % 9
    valid = ValidBatches(lambda start, stop: text[start:stop], 64, 4, 2, maker())
    whole, some = list(valid(None)), list(valid(2))
    assert len(whole) == len(valid) == 8 and len(some) == 2 and len(list(valid(99))) == 8
    rows = torch.cat([batch.labels for batch in whole])
    assert torch.equal(torch.cat([batch.labels for batch in some]), rows[[0, 4, 8, 12]])
    ranks = [list(ValidBatches(valid._read, 64, 4, 1, maker(), rank, 2)(2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([ranks[i % 2][i // 2].labels for i in range(4)]), rows[[0, 4, 8, 12]])
