"""Routing tables built by Triton kernels equal those of `Routing`; run by test_interpreter.py."""

import pytest
import torch

from scatterfold.kernels import Routing
from scatterfold.kernels.triton_backend import routing
from scatterfold.kernels.triton_backend.routing import routing_tables


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few tokens make several blocks."""
    monkeypatch.setattr(routing, "_BLOCK", 64)


def choices(tokens, top_k, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def assert_same(tables, expected, order):
    token, by_expert, expert_offsets, assignment, token_offsets = tables
    assert torch.equal(token, expected.token)
    assert torch.equal(expert_offsets, expected.expert_offsets)
    assert torch.equal(assignment, expected.assignment)
    assert torch.equal(token_offsets, expected.token_offsets)
    assert torch.equal(by_expert, order)


def expected_from(experts, num_experts, keep=None):
    """The routing by torch's sorts; its weights are the positions in the flattened (T, K)."""
    tokens, top_k = experts.shape
    position = torch.arange(tokens * top_k, dtype=torch.float64)
    token = torch.arange(tokens).repeat_interleave(top_k)
    keep = None if keep is None else keep.flatten()
    expected = Routing.from_assignments(token, experts.flatten(), position, tokens, num_experts, keep)
    return expected, expected.weight.long()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (5, 2, 4), (70, 2, 8), (150, 1, 3), (30, 6, 64), (7, 10, 300)]
)
def test_top_k_tables_equal_the_sorted_ones(tokens, top_k, experts):
    chosen = choices(tokens, top_k, experts)
    assert_same(routing_tables(chosen, experts), *expected_from(chosen, experts))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_dropped_choices_become_padding(fraction):
    chosen = choices(40, 3, 7)
    keep = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < fraction
    assert_same(routing_tables(chosen, 7, keep), *expected_from(chosen, 7, keep))


def test_all_on_one_expert_and_none():
    chosen = torch.full((50, 1), 2)
    assert_same(routing_tables(chosen, 4), *expected_from(chosen, 4))
    token, order, expert_offsets, assignment, token_offsets = routing_tables(torch.empty(0, 2, dtype=torch.int64), 4)
    assert token.numel() == order.numel() == assignment.numel() == 0
    assert expert_offsets.tolist() == [0] * 5 and token_offsets.tolist() == [0]


def test_compiles_without_graph_break():
    chosen, keep = choices(20, 2, 6), torch.arange(40).view(20, 2) % 3 > 0
    compiled = torch.compile(lambda chosen, keep: routing_tables(chosen, 6, keep), fullgraph=True, backend="aot_eager")
    assert_same(compiled(chosen, keep), *expected_from(chosen, 6, keep))
    torch.library.opcheck(routing_tables, (chosen, 6, keep))


def test_int32_choices_and_views():
    chosen = choices(40, 4, 6).to(torch.int32)
    assert_same(routing_tables(chosen[:, :2], 6), *expected_from(chosen[:, :2], 6))
