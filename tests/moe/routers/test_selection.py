import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.moe.routers.selection import mask_groups, top_experts


def loop_top(row, top_k):
    """Ids of the highest values, lowest id first among equals."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_tokens=st.integers(0, 5), num_experts=st.integers(1, 12), double=st.booleans())
def test_top_experts_equals_the_loop_with_ties(data, num_tokens, num_experts, double):
    top_k = data.draw(st.integers(1, num_experts))
    few_values = st.sampled_from([-float("inf"), -1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.25, 1.0, 3e38])
    any_value = st.floats(width=32, allow_nan=False)
    rows = [
        data.draw(
            st.lists(data.draw(st.sampled_from([few_values, any_value])), min_size=num_experts, max_size=num_experts)
        )
        for _ in range(num_tokens)
    ]
    scores = torch.tensor(rows, dtype=torch.float64 if double else torch.float32).reshape(num_tokens, num_experts)
    assert top_experts(scores, top_k).tolist() == [loop_top(row, top_k) for row in scores.tolist()]


def test_the_order_of_torch_topk_among_equals_would_not_do():
    scores = torch.ones(3, 8)
    assert top_experts(scores, 4).tolist() == [[0, 1, 2, 3]] * 3


def test_not_a_number_still_gives_distinct_experts():
    scores = torch.full((2, 5), torch.nan)
    scores[1, 3] = 1.0
    for row in top_experts(scores, 3).tolist():
        assert len(set(row)) == 3
        assert all(0 <= expert < 5 for expert in row)


@settings(max_examples=100, deadline=None)
@given(
    num_groups=st.integers(1, 4),
    group_size=st.integers(2, 4),
    group_score=st.sampled_from(["max", "top2_sum"]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_groups_equal_the_loop(num_groups, group_size, group_score, seed, data):
    top_groups = data.draw(st.integers(1, num_groups))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (6, num_groups * group_size), generator=generator).float()  # negative, and many ties
    result = mask_groups(scores, num_groups, top_groups, group_score)
    for row, masked in zip(scores.tolist(), result.tolist()):
        groups = [sorted(row[g * group_size : (g + 1) * group_size], reverse=True) for g in range(num_groups)]
        group_values = [sum(group[: 1 if group_score == "max" else 2]) for group in groups]
        open_groups = loop_top(group_values, top_groups)
        expected = [value if e // group_size in open_groups else -float("inf") for e, value in enumerate(row)]
        assert masked == expected


@pytest.mark.parametrize("num_experts", [1, 7, 64, 257])
def test_float32_and_float64_agree(num_experts):
    torch.manual_seed(0)
    scores = torch.randn(50, num_experts)
    top_k = min(5, num_experts)
    assert torch.equal(top_experts(scores, top_k), top_experts(scores.double(), top_k))
