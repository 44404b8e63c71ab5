"""How sequences are cut over context parallel ranks, without ranks."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.parallel.context.ring import RingContext
from scatterfold.parallel.context.zigzag import check_length, own_part, to_rank_order, to_sequence_order


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_zigzag_and_return_to_order(cp, dim):
    length = 12 * cp
    positions = torch.arange(length).expand(2, length)
    whole = positions if dim == 1 else positions.T
    parts = [own_part(whole, dim, cp, rank) for rank in range(cp)]
    joined = torch.cat(parts, dim)
    assert torch.equal(joined, to_rank_order(whole, dim, cp))
    assert torch.equal(to_sequence_order(joined, dim, cp), whole)
    chunk = length // (2 * cp)
    for rank, part in enumerate(parts):
        held = part.select(1 - dim, 0).tolist()
        if cp > 1:
            last = length - rank * chunk
            assert held == [*range(rank * chunk, (rank + 1) * chunk), *range(last - chunk, last)]


def test_every_rank_has_as_many_pairs_to_compute():
    pairs = {int(own_part(torch.arange(48), 0, 4, rank).add(1).sum()) for rank in range(4)}
    assert len(pairs) == 1


def test_lengths_that_do_not_divide_are_refused():
    check_length(16, 2, 4)
    check_length(15, 1, 5)
    with pytest.raises(ConfigError, match="10 tokens does not divide into 2 x layout.cp = 4 equal parts"):
        check_length(10, 2)
    with pytest.raises(ConfigError, match="12 tokens does not divide into layout.cp x layout.tp = 8 equal parts"):
        check_length(12, 2, 4)


@pytest.mark.parametrize(
    ("device", "cu_seqlens", "window", "message"),
    [
        ("cpu", None, None, "context_attention=ring runs on CUDA only, not on cpu, allowed: gather"),
        ("cuda", [0, 3, 8], None, "context_attention=ring cannot keep packed documents apart, allowed: gather"),
        ("cuda", [0, 8], 4, "context_attention=ring knows no model.sliding_window=4, allowed: gather"),
    ],
)
def test_what_a_ring_cannot_do_is_refused(device, cu_seqlens, window, message):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ConfigError, match=message):
        RingContext.of(cu_seqlens, 1, 8, None, torch.device(device), window)


def test_a_ring_with_one_document_a_row_and_a_wide_window_is_allowed():
    assert RingContext.of(torch.tensor([0, 8, 16]), 2, 8, None, torch.device("cuda"), 8).group is None
