"""`Routing` against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import Routing


def check_invariants(routing, pairs, num_tokens, num_experts):
    """The routing lists exactly the (token, expert, weight) of `pairs`, by expert and by token."""
    by_expert = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    total = len(by_expert)
    assert routing.num_tokens == num_tokens
    assert routing.num_experts == num_experts
    assert routing.token[:total].tolist() == [token for token, _, _ in by_expert]
    assert routing.weight[:total].tolist() == [weight for _, _, weight in by_expert]
    counts = [sum(expert == e for _, expert, _ in pairs) for e in range(num_experts)]
    assert routing.counts.tolist() == counts
    assert routing.expert_offsets.tolist() == [sum(counts[:e]) for e in range(num_experts + 1)]
    offsets, assignment = routing.token_offsets.tolist(), routing.assignment.tolist()
    for token in range(num_tokens):
        own = assignment[offsets[token] : offsets[token + 1]]
        assert own == [i for i, pair in enumerate(by_expert) if pair[0] == token]  # ascending expert
    assert offsets[0] == 0
    assert offsets[-1] == total
    assert sorted(assignment) == list(range(routing.token.numel()))  # padding too: a permutation
    for table in (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets):
        assert table.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(data=st.data(), num_tokens=st.integers(0, 20), num_experts=st.integers(1, 9), masked=st.booleans())
def test_from_assignments_equals_the_loop(data, num_tokens, num_experts, masked):
    cells = [(t, e) for t in range(num_tokens) for e in range(num_experts)]
    chosen = data.draw(st.lists(st.sampled_from(cells), unique=True, max_size=60)) if cells else []
    weights = [float(i) for i in range(len(chosen))]
    kept = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen))) if masked else None
    routing = Routing.from_assignments(
        torch.tensor([t for t, _ in chosen], dtype=torch.int64),
        torch.tensor([e for _, e in chosen], dtype=torch.int64),
        torch.tensor(weights),
        num_tokens,
        num_experts,
        keep=None if kept is None else torch.tensor(kept, dtype=torch.bool),
    )
    pairs = [(t, e, w) for i, ((t, e), w) in enumerate(zip(chosen, weights)) if kept is None or kept[i]]
    check_invariants(routing, pairs, num_tokens, num_experts)


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    popular=st.booleans(),
    keep_share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_from_topk_equals_the_loop(num_tokens, num_experts, top_k, popular, keep_share, seed):
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if popular:
        scores = torch.arange(num_experts).expand(num_tokens, -1)  # all tokens on the same experts
    experts = scores.argsort(dim=-1, descending=True)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator)
    keep = None if keep_share is None else torch.rand(num_tokens, top_k, generator=generator) < keep_share
    routing = Routing.from_topk(experts, weights, num_experts, keep=keep)
    pairs = [
        (t, int(experts[t, k]), float(weights[t, k]))
        for t in range(num_tokens)
        for k in range(top_k)
        if keep is None or keep[t, k]
    ]
    check_invariants(routing, pairs, num_tokens, num_experts)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(40_000, 3), (70_000, 40_000)])
def test_ids_beyond_short_integers(num_tokens, num_experts):
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(num_experts, (num_tokens, 1), generator=generator)
    token, weights = torch.arange(num_tokens), torch.rand(num_tokens, 1, generator=generator)
    by_expert = sorted(range(num_tokens), key=lambda t: (int(experts[t, 0]), t))
    for routing in (
        Routing.from_topk(experts, weights, num_experts),
        Routing.from_assignments(token, experts[:, 0], weights[:, 0], num_tokens, num_experts),
    ):
        assert routing.token.tolist() == by_expert
        assert torch.equal(routing.token[routing.assignment].long(), token)
        assert torch.equal(routing.counts.long(), torch.bincount(experts[:, 0], minlength=num_experts))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_any_integer_type_of_ids(dtype):
    experts = torch.tensor([[2, 0], [1, 2], [0, 1]])
    weights = torch.rand(3, 2)
    expected = Routing.from_topk(experts, weights, 3)
    routing = Routing.from_topk(experts.to(dtype), weights, 3)
    assert torch.equal(routing.token, expected.token)
    token = torch.arange(3).repeat_interleave(2)
    listed = Routing.from_assignments(token.to(dtype), experts.flatten().to(dtype), weights.flatten(), 3, 3)
    for name in ("token", "weight", "expert_offsets", "assignment", "token_offsets"):
        assert torch.equal(getattr(listed, name), getattr(expected, name))


def test_weights_keep_their_gradient_and_their_type():
    experts = torch.tensor([[2, 0], [1, 2], [0, 1]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = torch.rand(3, 2, dtype=dtype).requires_grad_()
        routing = Routing.from_topk(experts, weights, 3)
        assert routing.weight.dtype == dtype
        factor = torch.arange(6, dtype=dtype)
        (routing.weight * factor).sum().backward()
        for position, (token, expert) in enumerate(zip(routing.token.tolist(), [0, 0, 1, 1, 2, 2])):
            slot = experts[token].tolist().index(expert)
            assert weights.grad[token, slot] == factor[position]


def test_gradient_by_finite_differences_with_padding():
    experts = torch.tensor([[2, 0], [1, 2], [0, 1]])
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[True, False], [True, True], [False, True]])

    def counted(weights):
        routing = Routing.from_topk(experts, weights, 3, keep=keep)
        return routing.weight[: int(keep.sum())]

    assert torch.autograd.gradcheck(counted, weights)


def test_with_weight_changes_nothing_else():
    routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    other = routing.with_weight(torch.zeros(2))
    assert other.token is routing.token
    assert other.weight.tolist() == [0, 0]
