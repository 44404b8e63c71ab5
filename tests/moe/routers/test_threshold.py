"""The threshold router against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import ConfigError
from scatterfold.moe.context import StepContext
from scatterfold.moe.routers import ThresholdRouter

WIDTH = 4


def loop_weights(logits, threshold, max_experts, renormalise=False, scale=1.0):
    """Take experts from the best down until their probabilities reach the threshold."""
    total = sum(math.exp(z) for z in logits)
    probs = [math.exp(z) / total for z in logits]
    weights, mass = {}, 0.0
    for expert in sorted(range(len(probs)), key=lambda e: (-probs[e], e)):
        if len(weights) == max_experts or (weights and mass >= threshold):
            break
        weights[expert] = probs[expert]
        mass += probs[expert]
    divisor = mass if renormalise else 1.0
    return [scale * weights.get(e, 0.0) / divisor for e in range(len(probs))]


def listed(routing):
    """(T, E) combine weights as nested lists."""
    matrix = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.float64)
    offsets = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        own = slice(offsets[expert], offsets[expert + 1])
        matrix[routing.token[own].long(), expert] = routing.weight[own].detach().double()
    return matrix.tolist()


@settings(max_examples=120, deadline=None)
@given(
    num_tokens=st.integers(0, 6),
    num_experts=st.integers(1, 7),
    threshold=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 1.0]),
    cap=st.one_of(st.none(), st.integers(1, 7)),
    renormalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_loop(num_tokens, num_experts, threshold, cap, renormalise, scale, seed):
    torch.manual_seed(seed)
    cap = None if cap is None else min(cap, num_experts)
    router = ThresholdRouter(
        WIDTH, num_experts, threshold, cap, renormalise=renormalise, scale=scale, z_loss=0.1
    ).double()
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(num_tokens, WIDTH, dtype=torch.float64)
    routed = router(hidden)
    rows = listed(routed.routing)
    for logits, row in zip((hidden @ router.weight.T).tolist(), rows):
        expected = loop_weights(logits, threshold, cap or num_experts, renormalise, scale)
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert routed.counts.tolist() == [sum(row[e] > 0 for row in rows) for e in range(num_experts)]
    assert routed.routing.token.numel() == num_tokens * (cap or num_experts)  # padded: nothing is read back


def test_a_tiny_threshold_takes_one_expert_and_one_takes_all():
    torch.manual_seed(0)
    hidden = torch.randn(20, WIDTH)
    assert ThresholdRouter(WIDTH, 6, 1e-9)(hidden).counts.sum() == 20
    assert ThresholdRouter(WIDTH, 6, 1.0)(hidden).counts.tolist() == [20] * 6
    assert ThresholdRouter(WIDTH, 6, 1.0, max_experts=2)(hidden).counts.sum() == 40


def test_equal_experts_are_taken_together_and_the_bound_keeps_the_lowest_ids():
    hidden = torch.randn(5, WIDTH)
    for cap, counts in ((None, [5] * 8), (3, [5, 5, 5, 0, 0, 0, 0, 0])):
        router = ThresholdRouter(WIDTH, 8, 0.3, cap)
        with torch.no_grad():
            router.weight.zero_()  # every probability is 1 / 8: three of them would reach 0.3
        assert router(hidden).counts.tolist() == counts


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_groups_of_equal_rows_are_never_split(noise):
    """Also where rounding makes their scores differ; a rule that ends at the first sum would cut most groups."""
    torch.manual_seed(0)
    groups, size, width = 8, 4, 64
    router = ThresholdRouter(width, groups * size, 0.5, renormalise=True, z_loss=0.1)
    with torch.no_grad():
        rows = torch.randn(groups, width) * 0.1
        router.weight.copy_(rows.repeat_interleave(size, 0) + noise * torch.randn(groups * size, width))
    hidden = torch.randn(400, width)
    chosen = torch.tensor(listed(router(hidden).routing)).unflatten(1, (groups, size)) > 0
    assert torch.equal(chosen.all(-1), chosen.any(-1))
    # As many groups as a router of one expert per group takes: what it costs a token is the same.
    mass = (hidden @ rows.T).softmax(-1).sort(descending=True).values.cumsum(-1)
    assert torch.equal(chosen.any(-1).sum(-1), (mass < 0.5).sum(-1) + 1)


def test_not_a_number_still_takes_one_expert():
    router = ThresholdRouter(WIDTH, 4, 0.5)
    routed = router(torch.full((3, WIDTH), torch.nan))
    assert routed.counts.sum() == 3


def test_gradient_by_finite_differences():
    torch.manual_seed(3)
    for renormalise in (False, True):
        router = ThresholdRouter(3, 5, 0.6, renormalise=renormalise).double()
        hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

        def weights(hidden, weight, router=router):
            routing = torch.func.functional_call(router, {"weight": weight}, (hidden,)).routing
            return routing.weight[: int(routing.expert_offsets[-1])]

        assert torch.autograd.gradcheck(weights, (hidden, torch.randn(5, 3, dtype=torch.float64, requires_grad=True)))


def test_padding_gets_no_gradient_and_no_value_even_if_it_is_not_finite():
    router = ThresholdRouter(WIDTH, 4, 0.5)
    routing = router(torch.randn(6, WIDTH)).routing
    total = int(routing.expert_offsets[-1])
    assert total < routing.weight.numel()
    routing.weight[:total].sum().backward()
    assert torch.isfinite(router.weight.grad).all()


def test_capacity_is_without_the_experts_per_token_and_drops_later_choices_first():
    router = ThresholdRouter(WIDTH, 2, 1.0, capacity_factor=1.0, min_capacity=1)  # every token wants both
    with torch.no_grad():
        router.weight.zero_()
        router.weight[1, 0] = 1.0
    hidden = torch.zeros(4, WIDTH)
    hidden[:, 0] = torch.tensor([1.0, -1.0, 2.0, 3.0])  # first choices: 1, 0, 1, 1
    routed = router(hidden)  # capacity 2: expert 1 takes tokens 0 and 2, expert 0 takes token 1, then token 0
    kept = [[e for e in range(2) if row[e] > 0] for row in listed(routed.routing)]
    assert kept == [[0, 1], [0], [1], []]
    assert routed.dropped == 4
    assert routed.counts.tolist() == [4, 4]
    by_probability = ThresholdRouter(WIDTH, 2, 1.0, capacity_factor=1.0, min_capacity=1, drop="probability")
    by_probability.weight = router.weight
    kept = [[e for e in range(2) if row[e] > 0] for row in listed(by_probability(hidden).routing)]
    assert kept == [[0], [0], [1], [1]]


def test_balance_loss_counts_all_assignments():
    torch.manual_seed(0)
    router = ThresholdRouter(WIDTH, 4, 0.6, balance_micro_batch=0.1)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(30, WIDTH)
    routed = router(hidden, StepContext(num_sequences=3))
    share = routed.counts / routed.counts.sum()
    probs = (hidden @ router.weight.T).softmax(-1).mean(0)
    torch.testing.assert_close(routed.losses["balance_micro_batch"], 0.1 * 4 * (share * probs).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "router.threshold=0.0 is out of range, allowed: above 0, at most 1"),
        ({"threshold": 1.5}, "router.threshold=1.5 is out of range, allowed: above 0, at most 1"),
        ({"max_experts": 5}, "router.max_experts=5 is out of range, allowed: null, 1 to model.num_experts=4"),
        ({"scale": -1.0}, "router.scale=-1.0 is out of range, allowed: above 0"),
        (
            {"max_experts": 1, "renormalise": True},
            "router.renormalise=true with router.max_experts=1 gives every weight the same value, so nothing trains "
            "the router, allowed: renormalise=false, or an auxiliary loss",
        ),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        ThresholdRouter(**{"width": WIDTH, "num_experts": 4, "threshold": 0.5, **arguments})
    assert str(error.value) == message
