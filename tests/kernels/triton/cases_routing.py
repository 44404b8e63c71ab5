"""Routing tables built by Triton kernels equal those of `Routing`; run by test_interpreter.py."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import Routing
from scatterfold.kernels.triton_backend import listed_routing, routing
from scatterfold.kernels.triton_backend.listed_routing import listed_routing_tables
from scatterfold.kernels.triton_backend.routing import routing_tables

FIELDS = ("token", "weight", "expert_offsets", "assignment", "token_offsets")


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that few tokens make several blocks."""
    with mock.patch.object(routing, "_BLOCK", 64), mock.patch.object(listed_routing, "_BLOCK", 32):
        yield


def on_device(forced=True):
    """Routing tables are built where experts run: by the kernels, or by torch."""
    return mock.patch.dict(os.environ, {"SCATTERFOLD_BACKEND": "triton" if forced else "cpu"})


def assert_built_alike(build, weights):
    """`build(weights)` on the device and by torch: every table, and the gradient, bit for bit."""
    results = []
    for forced in (True, False):
        leaf = weights.clone().requires_grad_()
        with on_device(forced):
            made = build(leaf)
        made.weight.backward(torch.arange(made.weight.numel(), dtype=leaf.dtype) + 1)
        results.append([*(getattr(made, name).detach() for name in FIELDS), leaf.grad])
    for ours, expected in zip(*results):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


SHARES = st.sampled_from([None, 0.0, 0.4, 1.0])


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 6),
    share=SHARES,
    seed=st.integers(0, 99),
)
def test_routing_from_top_k_is_the_same_on_the_device(tokens, experts, top_k, share, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    keep = None if share is None else torch.rand(chosen.shape, generator=generator) < share
    weights = torch.rand(chosen.shape, generator=generator)
    assert_built_alike(lambda weights: Routing.from_topk(chosen, weights, experts, keep), weights)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 40),
    density=st.floats(0, 1),
    share=SHARES,
    seed=st.integers(0, 99),
)
def test_routing_from_a_list_is_the_same_on_the_device(tokens, experts, density, share, seed):
    generator = torch.Generator().manual_seed(seed)
    token, expert = (torch.rand(tokens, experts, generator=generator) < density).nonzero(as_tuple=True)
    shuffle = torch.randperm(len(token), generator=generator)
    token, expert = token[shuffle].to(torch.int32), expert[shuffle]
    keep = None if share is None else torch.rand(len(token), generator=generator) < share
    weights = torch.rand(len(token), generator=generator)
    assert_built_alike(lambda w: Routing.from_assignments(token, expert, w, tokens, experts, keep), weights)


@pytest.mark.parametrize("experts", [256, 512])
def test_a_list_over_many_experts(experts):
    token, expert = (torch.rand(37, experts, generator=torch.Generator().manual_seed(0)) < 0.05).nonzero(as_tuple=True)
    order = torch.randperm(len(token), generator=torch.Generator().manual_seed(1))
    assert_built_alike(
        lambda w: Routing.from_assignments(token[order], expert[order], w, 37, experts), torch.rand(len(token))
    )


def test_tables_of_a_list_compile_without_graph_break():
    token, expert, keep = torch.arange(20) % 7, torch.arange(20) // 7, torch.arange(20) % 3 > 0

    def run(weights):
        return Routing.from_assignments(token, expert, weights, 7, 3, keep)

    with on_device():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_built_alike(compiled, torch.rand(20))
    torch.library.opcheck(listed_routing_tables, (token, expert, 7, 3, keep))


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
