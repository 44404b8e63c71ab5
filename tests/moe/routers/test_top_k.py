"""The top-k router against loops in float64 and against the routers of published models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import ConfigError
from scatterfold.moe.context import StepContext
from scatterfold.moe.routers import TopKRouter

WIDTH = 6


def dense(routing):
    """(T, E) matrix of combine weights, zero where a token does not go."""
    matrix = torch.zeros(routing.num_tokens, routing.num_experts, dtype=routing.weight.dtype)
    offsets = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        own = slice(offsets[expert], offsets[expert + 1])
        matrix[routing.token[own].long(), expert] = routing.weight[own].detach()
    return matrix


def loop_weights(logits, *, top_k, score, renormalise, scale, groups=(1, 1, "max"), bias=None):
    """Combine weights of one token, by the words of the papers."""
    num_experts = len(logits)
    if score == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    elif score == "softmax":
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
    else:
        scores = list(logits)
    ranked_by = [s + b for s, b in zip(scores, bias or [0.0] * num_experts)]
    num_groups, top_groups, group_score = groups
    size = num_experts // num_groups
    best = [sorted(ranked_by[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
    value = [group[0] if group_score == "max" else group[0] + group[1] for group in best]
    open_groups = sorted(range(num_groups), key=lambda g: (-value[g], g))[:top_groups]
    candidates = [e for e in range(num_experts) if e // size in open_groups]
    chosen = sorted(candidates, key=lambda e: (-ranked_by[e], e))[:top_k]
    weights = {e: scores[e] for e in chosen}
    if score == "softmax_after":
        total = sum(math.exp(z) for z in weights.values())
        weights = {e: math.exp(z) / total for e, z in weights.items()}
    if renormalise:
        total = sum(weights.values())
        weights = {e: w / total for e, w in weights.items()}
    return [scale * weights.get(e, 0.0) for e in range(num_experts)]


@settings(max_examples=120, deadline=None)
@given(
    num_tokens=st.integers(0, 6),
    groups=st.sampled_from([(1, 1, "max"), (2, 1, "max"), (4, 2, "top2_sum"), (2, 2, "top2_sum")]),
    top_k=st.integers(1, 4),
    score=st.sampled_from(["softmax", "sigmoid", "softmax_after"]),
    renormalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    with_bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_weights_equal_the_loop(num_tokens, groups, top_k, score, renormalise, scale, with_bias, seed):
    torch.manual_seed(seed)
    router = TopKRouter(
        WIDTH,
        8,
        top_k,
        score=score,
        renormalise=renormalise,
        scale=scale,
        num_groups=groups[0],
        top_groups=groups[1],
        group_score=groups[2],
        bias_rate=0.1 if with_bias else None,
        z_loss=0.1,
    ).double()
    torch.nn.init.normal_(router.weight)
    bias = None
    if with_bias:
        router.expert_bias.copy_(torch.randint(-2, 3, (8,)) * 0.2)
        bias = router.expert_bias.tolist()
    hidden = torch.randn(num_tokens, WIDTH, dtype=torch.float64)
    matrix = dense(router(hidden).routing)
    for logits, row in zip((hidden @ router.weight.T).tolist(), matrix.tolist()):
        expected = loop_weights(
            logits, top_k=top_k, score=score, renormalise=renormalise, scale=scale, groups=groups, bias=bias
        )
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_ties_go_to_the_lowest_expert_id():
    router = TopKRouter(WIDTH, 8, 3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(1, WIDTH).expand(8, -1))  # all experts tie
    routing = router(torch.randn(5, WIDTH)).routing
    assert routing.counts.tolist() == [5, 5, 5, 0, 0, 0, 0, 0]


def test_softmax_then_renormalise_equals_softmax_over_the_chosen_in_value_and_gradient():
    hidden = torch.randn(7, WIDTH, dtype=torch.float64)
    grads = []
    for score in ("softmax", "softmax_after"):
        torch.manual_seed(0)
        router = TopKRouter(WIDTH, 8, 3, score=score, renormalise=True).double()
        weight = router(hidden).routing.weight
        (weight * torch.arange(21)).sum().backward()
        grads.append((weight.detach(), router.weight.grad))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_gradient_by_finite_differences(score, renormalise):
    torch.manual_seed(1)
    router = TopKRouter(4, 5, 2, score=score, renormalise=renormalise, scale=1.5, gate_bias=True).double()
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def weights(hidden, weight, bias):
        return torch.func.functional_call(router, {"weight": weight, "bias": bias}, (hidden,)).routing.weight

    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weights, (hidden, weight, torch.randn(5, dtype=torch.float64, requires_grad=True)))


def test_raw_softmax_reaches_every_logit():
    router = TopKRouter(WIDTH, 8, 1, renormalise=False)
    router(torch.randn(3, WIDTH)).routing.weight.sum().backward()
    assert (router.weight.grad.abs().sum(-1) > 0).all()


def test_gate_bias_shifts_the_logits():
    router = TopKRouter(WIDTH, 4, 1, gate_bias=True)
    with torch.no_grad():
        router.bias[2] = 100.0
    assert router(torch.randn(9, WIDTH)).routing.counts.tolist() == [0, 0, 9, 0]


def test_router_maths_is_in_float32_also_under_autocast():
    torch.manual_seed(0)
    router = TopKRouter(WIDTH, 8, 2, z_loss=1.0)
    hidden = torch.randn(64, WIDTH).bfloat16()
    expected = router(hidden.float())
    with torch.autocast("cpu", torch.bfloat16):
        routed = router(hidden)
    assert routed.routing.weight.dtype == torch.float32
    assert torch.equal(routed.routing.weight, expected.routing.weight)
    assert torch.equal(routed.losses["z_loss"], expected.losses["z_loss"])


def test_fewer_experts_in_evaluation():
    torch.manual_seed(0)
    router = TopKRouter(WIDTH, 8, 4, eval_top_k=2)
    same = TopKRouter(WIDTH, 8, 4)
    same.load_state_dict(router.state_dict())
    hidden = torch.randn(5, WIDTH)
    assert router.max_experts_per_token == 4
    assert torch.equal(dense(router(hidden).routing), dense(same(hidden).routing))
    router.eval()
    assert router.max_experts_per_token == 2
    matrix = dense(router(hidden).routing)
    assert (matrix > 0).sum(-1).tolist() == [2] * 5
    torch.testing.assert_close(matrix.sum(-1), torch.ones(5))  # renormalised over the two


def test_jitter_only_in_training():
    torch.manual_seed(0)
    router = TopKRouter(WIDTH, 4, 1, jitter=0.5, z_loss=1.0)
    hidden = torch.randn(50, WIDTH)
    assert not torch.equal(router(hidden).routing.weight, router(hidden).routing.weight)
    router.eval()
    assert torch.equal(router(hidden).routing.weight, router(hidden).routing.weight)
    router.train()
    ones = torch.ones(2000, 1)
    noisy = TopKRouter(1, 1, 1, jitter=0.5)
    with torch.no_grad():
        noisy.weight.fill_(1.0)
    logits = noisy._logits(ones)
    assert 0.5 <= logits.min() < 0.52
    assert 1.48 < logits.max() <= 1.5


class TestExpertBias:
    def test_moves_by_the_sign_of_the_missing_load_of_scripted_counts(self):
        router = TopKRouter(WIDTH, 4, 1, bias_rate=0.125)
        router.finish_step(torch.tensor([4, 0, 2, 2]))  # mean 2
        assert router.expert_bias.tolist() == [-0.125, 0.125, 0.0, 0.0]
        router.finish_step(torch.tensor([3, 3, 1, 1], dtype=torch.float64))
        assert router.expert_bias.tolist() == [-0.25, 0.0, 0.125, 0.125]

    def test_changes_the_choice_and_not_the_weight(self):
        router = TopKRouter(WIDTH, 4, 1, score="sigmoid", renormalise=False, bias_rate=0.1)
        hidden = torch.randn(9, WIDTH)
        router.expert_bias[3] = 5.0
        routing = router(hidden).routing
        assert routing.counts.tolist() == [0, 0, 0, 9]
        torch.testing.assert_close(routing.weight, (hidden @ router.weight[3]).sigmoid())

    def test_is_not_touched_by_forward_or_evaluation(self):
        router = TopKRouter(WIDTH, 4, 1, bias_rate=0.1)
        for mode in (True, False):
            router.train(mode)
            router(torch.randn(9, WIDTH)).routing.weight.sum().backward()
        assert router.expert_bias.tolist() == [0.0] * 4

    def test_a_rate_of_zero_keeps_it(self):
        router = TopKRouter(WIDTH, 4, 1, bias_rate=0.0)
        router.expert_bias.fill_(0.5)
        router.finish_step(torch.tensor([4, 0, 2, 2]))
        assert router.expert_bias.tolist() == [0.5] * 4

    def test_balances_a_skewed_router(self):
        torch.manual_seed(0)
        router = TopKRouter(WIDTH, 8, 2, score="sigmoid", bias_rate=0.02)
        with torch.no_grad():
            router.weight.normal_(std=0.3)
        hidden = torch.randn(512, WIDTH) + 1.0
        violations = []
        for _ in range(100):
            counts = router(hidden).counts
            violations.append(counts.max().item() / counts.double().mean().item() - 1)
            router.finish_step(counts)
        assert violations[0] > 0.8
        assert violations[-1] < 0.25

    def test_balance_losses_count_the_choice_without_bias(self):
        torch.manual_seed(0)
        biased = TopKRouter(WIDTH, 4, 2, bias_rate=0.1, balance_sequence=0.1, balance_micro_batch=0.1)
        plain = TopKRouter(WIDTH, 4, 2, balance_sequence=0.1, balance_micro_batch=0.1)
        plain.weight = biased.weight
        biased.expert_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 8.0]))
        hidden, context = torch.randn(12, WIDTH), StepContext(num_sequences=3)
        one, other = biased(hidden, context), plain(hidden, context)
        assert one.counts.tolist() == [12, 0, 0, 12]
        assert one.losses == other.losses

    def test_stays_float32_when_the_model_is_cast_and_moves_with_it(self):
        router = TopKRouter(WIDTH, 4, 1, bias_rate=0.1, balance_global_batch=0.1)
        router.expert_bias.fill_(0.251)
        router.bfloat16()
        assert router.weight.dtype == torch.bfloat16
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, torch.full((4,), 0.251))
        assert router.losses["balance_global_batch"].load.dtype == torch.float32
        torch.nn.Sequential(router).to(torch.float64)
        assert router.expert_bias.dtype == torch.float32
        assert router.expert_bias is dict(router.named_buffers())["expert_bias"]

    def test_is_saved_and_survives_meta_construction(self):
        with torch.device("meta"):
            router = TopKRouter(WIDTH, 4, 1, bias_rate=0.1, balance_global_batch=0.1)
        router.to_empty(device="cpu")
        router.reset_buffers()
        assert set(router.state_dict()) == {"weight", "expert_bias", "losses.balance_global_batch.load"}
        assert router.expert_bias.tolist() == [0.0] * 4
        assert router.losses["balance_global_batch"].load.tolist() == [0.25] * 4
        with torch.device("meta"):
            cast = TopKRouter(WIDTH, 4, 1, bias_rate=0.1).bfloat16()
        assert cast.expert_bias.dtype == torch.float32


def test_capacity_drops_counts_and_keeps_the_weights_of_the_rest():
    router = TopKRouter(WIDTH, 4, 1, capacity_factor=0.5, eval_capacity_factor=None, min_capacity=1)
    full = TopKRouter(WIDTH, 4, 1)
    full.weight = router.weight
    hidden = torch.randn(64, WIDTH)
    routed, everything = router(hidden, StepContext(num_sequences=2)), full(hidden)
    limit = 4  # ceil(0.5 * 1 * 32 / 4)
    kept, all_of_them = dense(routed.routing), dense(everything.routing)
    assert torch.equal(routed.counts, everything.counts)
    assert routed.dropped == 64 - (kept > 0).sum()
    assert routed.dropped > 0
    for half in range(2):
        rows = slice(32 * half, 32 * half + 32)
        for expert in range(4):
            wanted = all_of_them[rows, expert].nonzero().flatten().tolist()
            assert kept[rows, expert].nonzero().flatten().tolist() == wanted[:limit]
    assert torch.equal(kept, torch.where(kept > 0, all_of_them, 0))
    router.eval()
    assert router(hidden).dropped == 0


def test_losses_only_in_training_and_only_those_asked_for():
    router = TopKRouter(WIDTH, 4, 2, balance_micro_batch=0.1, z_loss=0.1)
    assert set(router(torch.randn(4, WIDTH)).losses) == {"balance_micro_batch", "z_loss"}
    assert router.eval()(torch.randn(4, WIDTH)).losses == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "router.top_k=9 is larger than model.num_experts=8"),
        ({"top_k": 0}, "router.top_k=0 is too small, allowed: 1 to model.num_experts=8"),
        ({"eval_top_k": 9}, "router.eval_top_k=9 is larger than model.num_experts=8"),
        ({"score": "tanh"}, "router.score='tanh' is unknown, allowed: softmax, sigmoid, softmax_after"),
        ({"num_groups": 3}, "router.num_groups=3 does not divide model.num_experts=8"),
        ({"num_groups": 2, "top_groups": 3}, "router.top_groups=3 is out of range, allowed: 1 to num_groups=2"),
        (
            {"num_groups": 8, "top_groups": 1},
            "router.top_k=2 is larger than the 1 experts of router.top_groups=1 of router.num_groups=8 groups",
        ),
        ({"group_score": "sum"}, "router.group_score='sum' is unknown, allowed: max, top2_sum"),
        (
            {"num_groups": 8, "top_groups": 8, "group_score": "top2_sum"},
            "router.group_score='top2_sum' needs two experts per group, router.num_groups=8 leaves 1 of "
            "model.num_experts=8",
        ),
        ({"bias_rate": -1.0}, "router.bias_rate=-1.0 is out of range, allowed: null, 0 or more"),
        ({"scale": 0.0}, "router.scale=0.0 is out of range, allowed: above 0"),
        ({"jitter": 1.0}, "router.jitter=1.0 is out of range, allowed: 0 to below 1"),
        ({"z_loss": -0.1}, "router.z_loss=-0.1 is out of range, allowed: 0 or more"),
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0 is out of range, allowed: null, above 0"),
        ({"width": 0}, "model.width=0 is too small, allowed: 1 or more"),
        (
            {"top_k": 1, "renormalise": True},
            "router.top_k=1 with router.renormalise=true and router.score='softmax' gives every weight the same value, "
            "so nothing trains the router, allowed: renormalise=false with score=softmax or sigmoid, or an auxiliary "
            "loss",
        ),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        TopKRouter(**{"width": WIDTH, "num_experts": 8, "top_k": 2, **arguments})
    assert str(error.value) == message


def test_sequences_of_unequal_length_are_refused():
    with pytest.raises(ConfigError, match="^10 tokens cannot be context.num_sequences=3 sequences"):
        TopKRouter(WIDTH, 4, 1)(torch.randn(10, WIDTH), StepContext(num_sequences=3))


def published(name):
    """A router of the transformers library with random weights, and ours with the same."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "deepseek_v3":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

        config = DeepseekV3Config(
            hidden_size=WIDTH,
            n_routed_experts=16,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
        theirs = module.DeepseekV3TopkRouter(config)
        theirs.e_score_correction_bias.normal_(std=0.3)
        ours = TopKRouter(
            WIDTH,
            16,
            3,
            score="sigmoid",
            renormalise=True,
            scale=2.5,
            num_groups=4,
            top_groups=2,
            group_score="top2_sum",
            bias_rate=0.001,
        )
        ours.expert_bias.copy_(theirs.e_score_correction_bias)
    elif name == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as module
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig

        theirs = module.MixtralTopKRouter(MixtralConfig(hidden_size=WIDTH, num_local_experts=8, num_experts_per_tok=2))
        ours = TopKRouter(WIDTH, 8, 2, renormalise=True)
    else:
        from transformers.models.olmoe import modeling_olmoe as module
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig

        theirs = module.OlmoeTopKRouter(
            OlmoeConfig(hidden_size=WIDTH, num_experts=8, num_experts_per_tok=4, norm_topk_prob=False)
        )
        ours = TopKRouter(WIDTH, 8, 4, renormalise=False)
    torch.nn.init.normal_(theirs.weight)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    return theirs, ours


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "olmoe"])
def test_parity_with_published_models(name):
    theirs, ours = published(name)
    hidden = torch.randn(40, WIDTH)
    with torch.no_grad():
        _, weights, experts = theirs(hidden)
        expected = torch.zeros(40, ours.num_experts).scatter_(1, experts, weights.float())
        torch.testing.assert_close(dense(ours(hidden).routing), expected, rtol=1e-5, atol=1e-6)
