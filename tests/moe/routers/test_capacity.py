import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import ConfigError
from scatterfold.moe.routers.capacity import Capacity


def loop_keep(experts, scores, wanted, num_sequences, limit, drop):
    """Fill the experts of each sequence one assignment after the other, in order of rank, then policy."""
    num_tokens, num_ranks = len(experts), len(experts[0]) if experts else 0
    length = num_tokens // num_sequences
    keep = [[False] * num_ranks for _ in experts]
    for sequence in range(num_sequences):
        tokens = range(sequence * length, (sequence + 1) * length)
        load = {}
        for rank in range(num_ranks):
            candidates = [t for t in tokens if wanted is None or wanted[t][rank]]
            if drop == "probability":
                candidates.sort(key=lambda t: -scores[t][rank])  # stable: earlier position among equals
            for t in candidates:
                expert = experts[t][rank]
                if load.get(expert, 0) < limit:
                    load[expert] = load.get(expert, 0) + 1
                    keep[t][rank] = True
    return keep


@settings(max_examples=150, deadline=None)
@given(
    num_sequences=st.integers(1, 3),
    length=st.integers(1, 6),
    num_experts=st.integers(1, 5),
    drop=st.sampled_from(["position", "probability"]),
    factor=st.sampled_from([0.3, 0.5, 1.0, 1.5]),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_the_loop(num_sequences, length, num_experts, drop, factor, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, top_k = num_sequences * length, min(2, num_experts)
    experts = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    scores = torch.randint(1, 5, (num_tokens, top_k), generator=generator) / 4  # with ties
    wanted = torch.rand(num_tokens, top_k, generator=generator) < 0.7 if masked else None
    capacity = Capacity(factor, minimum=1, drop=drop)
    keep = capacity.keep(experts, scores, wanted, num_experts, num_sequences, top_k)
    limit = max(1, math.ceil(factor * top_k * length / num_experts - 1e-9))
    listed = None if wanted is None else wanted.tolist()
    assert keep.tolist() == loop_keep(experts.tolist(), scores.tolist(), listed, num_sequences, limit, drop)


def test_first_choices_come_before_second_ones_then_position():
    # Expert 0 takes two. Token 0 wants it second; tokens 1, 2, 3 want it first.
    experts = torch.tensor([[1, 0], [0, 1], [0, 2], [0, 3]])
    capacity = Capacity(1.0, minimum=2)
    keep = capacity.keep(experts, torch.ones(4, 2), None, 4, 1, 1)
    assert keep.tolist() == [[True, False], [True, True], [True, True], [False, True]]


def test_the_improbable_are_dropped_first():
    experts = torch.tensor([[0], [0], [0], [0]])
    scores = torch.tensor([[0.5], [0.9], [0.7], [0.9]])
    capacity = Capacity(1.0, minimum=3, drop="probability")
    assert capacity.keep(experts, scores, None, 4, 1, 1).tolist() == [[False], [True], [True], [True]]
    capacity = Capacity(1.0, minimum=1, drop="probability")
    assert capacity.keep(experts, scores, None, 4, 1, 1).tolist() == [[False], [True], [False], [False]]


def test_what_is_dropped_does_not_depend_on_the_split_into_micro_batches():
    torch.manual_seed(0)
    experts = torch.rand(4 * 16, 8).argsort(dim=-1)[:, :2]
    scores = torch.rand(4 * 16, 2)
    for drop in ("position", "probability"):
        capacity = Capacity(0.6, minimum=1, drop=drop)
        whole = capacity.keep(experts, scores, None, 8, 4, 2)
        parts = [capacity.keep(e, s, None, 8, 1, 2) for e, s in zip(experts.chunk(4), scores.chunk(4))]
        assert torch.equal(whole, torch.cat(parts))
        assert 0 < whole.sum() < whole.numel()


@pytest.mark.parametrize(
    ("factor", "top_k", "length", "experts", "expected"),
    [(1.0, 2, 16, 8, 4), (1.25, 1, 64, 8, 10), (1.0, 1, 10, 8, 2), (1.1, 1, 80, 8, 11), (0.01, 1, 8, 8, 1)],
)
def test_limit(factor, top_k, length, experts, expected):
    assert Capacity(factor, minimum=1).limit(top_k, length, experts) == expected


def test_minimum_and_empty_input():
    assert Capacity(0.1, minimum=4).limit(1, 8, 8) == 4
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert Capacity(1.0).keep(none, torch.zeros(0, 2), None, 8, 1, 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0.0}, "router.capacity_factor=0.0 is out of range, allowed: null, above 0"),
        ({"factor": 1.0, "minimum": 0}, "router.min_capacity=0 is too small, allowed: 1 or more"),
        ({"factor": 1.0, "drop": "random"}, "router.drop='random' is unknown, allowed: position, probability"),
    ],
)
def test_wrong_values(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Capacity(**arguments)
