"""The MoE layer end to end: against loops in float64, under recomputation, and for any split of a batch."""

import math

import pytest
import torch
from torch import nn

from scatterfold.moe.context import StepContext
from scatterfold.moe.experts import Experts
from scatterfold.moe.layer import MoELayer
from scatterfold.moe.recompute import checkpointed
from scatterfold.moe.routers import ThresholdRouter, TopKRouter
from scatterfold.moe.training.router_statistics import RouterStatistics

E, D, F = 5, 6, 4


def make_layer(router=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = MoELayer(router or TopKRouter(D, E, 2), Experts(E, D, F), **kwargs)
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer


def loop_layer(layer, hidden, threshold=None):
    """Router, SwiGLU experts and weighted sum in scalar Python."""
    w_in, w_out = layer.experts.w_in.flatten(1, 2).tolist(), layer.experts.w_out.tolist()
    rows = []
    for x in hidden.tolist():
        logits = [sum(w * v for w, v in zip(row, x)) for row in layer.router.weight.tolist()]
        total = sum(math.exp(z) for z in logits)
        probs = [math.exp(z) / total for z in logits]
        ranked = sorted(range(E), key=lambda e: (-probs[e], e))
        if threshold is None:
            chosen = ranked[:2]
            weights = {e: probs[e] / sum(probs[i] for i in chosen) for e in chosen}
        else:
            weights, mass = {}, 0.0
            for e in ranked:
                if mass < threshold:
                    weights[e] = probs[e]
                    mass += probs[e]
        out = [0.0] * D
        for e, weight in weights.items():
            h = [sum(w * v for w, v in zip(row, x)) for row in w_in[e]]
            a = [h[f] / (1 + math.exp(-h[f])) * h[F + f] for f in range(F)]
            for d in range(D):
                out[d] += weight * sum(w_out[e][d][f] * a[f] for f in range(F))
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_output_equals_the_loop(threshold):
    router = None if threshold is None else ThresholdRouter(D, E, threshold)
    layer = make_layer(router).double()
    hidden = torch.randn(3, 4, D, dtype=torch.float64)
    out = layer(hidden)
    assert out.shape == hidden.shape
    torch.testing.assert_close(out.flatten(0, 1), loop_layer(layer, hidden.flatten(0, 1), threshold))


@pytest.mark.parametrize("router", [TopKRouter(D, E, 2, renormalise=False), ThresholdRouter(D, E, 0.7)])
def test_gradients_by_finite_differences(router):
    layer = make_layer(router).double()
    hidden = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    names = ["router.weight", "experts.w_in", "experts.w_out"]

    def f(hidden, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (hidden,))

    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(f, (hidden, *values))


def test_equal_experts_and_weights_that_sum_to_one_are_the_dense_mlp():
    layer = make_layer(TopKRouter(D, E, 3))
    with torch.no_grad():
        layer.experts.w_in.copy_(layer.experts.w_in[:1].clone().expand(E, -1, -1, -1))
        layer.experts.w_out.copy_(layer.experts.w_out[:1].clone().expand(E, -1, -1))
    x = torch.randn(20, D)
    gate, up = (x @ matrix.T for matrix in layer.experts.w_in[0])
    torch.testing.assert_close(layer(x), (nn.functional.silu(gate) * up) @ layer.experts.w_out[0].T)


def test_a_dropped_token_gets_the_shared_expert_or_nothing():
    router = TopKRouter(D, E, 1, capacity_factor=0.1, min_capacity=1)
    x = torch.randn(30, D)
    for shared in (None, nn.Linear(D, D, bias=False)):
        layer = make_layer(router, shared=shared)
        routing = router(x).routing
        lost = torch.ones(30, dtype=torch.bool)
        lost[routing.token[: int(routing.expert_offsets[-1])].long()] = False
        assert lost.sum() >= 25
        expected = torch.zeros(30, D) if shared is None else shared(x)
        assert torch.equal(layer(x)[lost], expected[lost])
        assert (layer(x)[~lost] - expected[~lost]).abs().max() > 0


def test_auxiliary_losses_change_gradients_by_their_share_of_the_step_and_not_the_output():
    coefficients = {"balance_micro_batch": 0.3, "balance_sequence": 0.2, "z_loss": 0.1}
    with_losses = make_layer(TopKRouter(D, E, 2, **coefficients)).double()
    without = make_layer(TopKRouter(D, E, 2)).double()
    hidden = torch.randn(12, D, dtype=torch.float64)
    context = StepContext(num_sequences=3, global_tokens=48)
    out = with_losses(hidden, context)
    assert torch.equal(out, without(hidden, context))
    (out**2).sum().backward()
    losses = with_losses.router(hidden, context).losses
    ((without(hidden) ** 2).sum()).backward()
    (extra,) = torch.autograd.grad(sum(losses.values()), with_losses.router.weight)
    torch.testing.assert_close(with_losses.router.weight.grad, without.router.weight.grad + extra * 12 / 48)
    torch.testing.assert_close(with_losses.experts.w_in.grad, without.experts.w_in.grad)
    with_losses.zero_grad()
    with_losses.eval()
    (with_losses(hidden, context) ** 2).sum().backward()
    torch.testing.assert_close(with_losses.router.weight.grad, without.router.weight.grad)


def all_losses(**kwargs):
    return TopKRouter(
        D,
        E,
        2,
        bias_rate=0.01,
        jitter=0.1,
        capacity_factor=0.8,
        min_capacity=1,
        balance_micro_batch=0.1,
        balance_sequence=0.1,
        balance_global_batch=0.1,
        z_loss=0.1,
        **kwargs,
    )


def test_recomputation_changes_no_bit_and_counts_once():
    results = []
    for wrap in (lambda f, *a: f(*a), checkpointed):
        layer, statistics = make_layer(all_losses()), RouterStatistics([7], E)
        layer.index = 7
        torch.manual_seed(1)
        for _ in range(2):
            hidden = torch.randn(4, 6, D, requires_grad=True)
            out = wrap(layer, hidden, StepContext(4, 48, statistics))
            out.square().sum().backward()
        step = statistics.reduce(lambda t: t)
        layer.router.finish_step(step.counts[0])
        results.append(
            [out, hidden.grad, *(p.grad for p in layer.parameters()), *layer.buffers(), step.counts, step.tokens]
        )
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)
    assert results[1][-1].tolist() == [48]


def test_recomputation_replays_the_decision(monkeypatch):
    layer, decisions = make_layer(ThresholdRouter(D, E, 0.7)), []
    monkeypatch.setattr(
        layer.router,
        "choose",
        lambda scores: decisions.append(ThresholdRouter.choose(layer.router, scores)) or decisions[-1],
    )
    x = torch.randn(10, D, requires_grad=True)
    out = checkpointed(layer, x)
    layer.router.weight.data.neg_()  # .data: autograd does not notice; other numbers of experts would now be chosen
    out.sum().backward()
    assert len(decisions) == 1
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("loss", "invariant"),
    [("balance_global_batch", True), ("balance_sequence", True), ("z_loss", True), ("balance_micro_batch", False)],
)
def test_one_batch_of_eight_sequences_equals_eight_of_one(loss, invariant):
    hidden = torch.randn(8, 6, D, dtype=torch.float64)
    grads, losses = [], []
    for split in (1, 8, 2):
        layer = make_layer(TopKRouter(D, E, 2, **{loss: 1.0})).double()
        statistics = RouterStatistics([0], E)
        for _ in range(2):  # the second step uses the load of the first
            layer.zero_grad()
            for part in hidden.chunk(split):
                layer(part, StepContext(part.shape[0], 48, statistics)).sum().backward()
            step = statistics.reduce(lambda t: t)
            layer.router.finish_step(step.counts[0])
        grads.append(layer.router.weight.grad)
        losses.append(step.losses[loss])
    for other_grad, other_loss in zip(grads[1:], losses[1:]):
        assert torch.allclose(grads[0], other_grad, rtol=1e-6, atol=1e-9) == invariant
        assert torch.allclose(losses[0], other_loss, rtol=1e-6) == invariant


def test_statistics_are_recorded_where_they_are_asked_for():
    layer, statistics = make_layer(index=3), RouterStatistics([1, 3], E)
    layer(torch.randn(4, D))
    layer(torch.randn(4, D), StepContext(statistics=statistics))
    step = statistics.reduce(lambda t: t)
    assert step.counts.sum(-1).tolist() == [0, 8]


def test_no_tokens():
    layer = make_layer(all_losses())
    hidden = torch.randn(0, D, requires_grad=True)
    out = layer(hidden)
    out.sum().backward()
    assert out.shape == (0, D)
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_half_precision_model():
    layer = make_layer(all_losses()).bfloat16()
    hidden = torch.randn(3, 8, D).bfloat16().requires_grad_()
    out = layer(hidden, StepContext(num_sequences=3))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
