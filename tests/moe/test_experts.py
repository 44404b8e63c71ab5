"""`Experts` as a module: biases, recomputation, counts, initial values, decay; and that all of it trains."""

import pytest
import torch
from torch import nn

from scatterfold.kernels import ConfigError, Routing
from scatterfold.moe import Experts, MoELayer, TopKRouter
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.training.optimizers import AdamW

E, D, F = 4, 6, 5


def with_random_biases(experts):
    with torch.no_grad():
        for bias in (experts.b_in, experts.b_out):
            bias.normal_()
    return experts


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_each_expert_is_two_linear_layers(activation):
    torch.manual_seed(0)
    experts = with_random_biases(Experts(E, D, F, activation, bias=True))
    x = torch.randn(9, D)
    chosen = torch.stack([torch.randperm(E)[:2] for _ in x])
    out = experts(x, Routing.from_topk(chosen, torch.full((9, 2), 0.5), E))
    expected = []
    for row, own in zip(x, chosen.tolist()):
        total = torch.zeros(D)
        for e in own:
            h = nn.functional.linear(row, experts.w_in[e].view(-1, D), experts.b_in[e].flatten())
            a = nn.functional.silu(h[:F]) * h[F:] if activation == "swiglu" else nn.functional.relu(h) ** 2
            total = total + 0.5 * nn.functional.linear(a, experts.w_out[e], experts.b_out[e])
        expected.append(total)
    torch.testing.assert_close(out, torch.stack(expected))


def test_biases_start_at_zero_and_are_left_out_unless_asked_for():
    experts = Experts(E, D, F, bias=True)
    assert experts.b_in.shape == (E, 2, F) and experts.b_out.shape == (E, D)
    assert not experts.b_in.any() and not experts.b_out.any()
    assert dict(Experts(E, D, F).named_parameters()).keys() == {"w_in", "w_out"}
    assert "with biases" in repr(experts) and "with biases" not in repr(Experts(E, D, F))


def test_recomputing_changes_no_gradient_and_saves_the_pre_activations():
    results, saved = [], []
    for recompute in ("none", "all"):
        torch.manual_seed(0)
        experts = with_random_biases(Experts(E, D, F, bias=True, recompute=recompute))
        x = torch.randn(20, D, requires_grad=True)
        chosen = torch.rand(20, E).topk(2).indices
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = experts(x, Routing.from_topk(chosen, torch.rand(20, 2), E))
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in experts.parameters())])
        saved.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert saved[0] - saved[1] == 40 * 2 * F


def test_an_unknown_way_to_recompute_is_named():
    with pytest.raises(ConfigError, match="^experts.recompute='some' is unknown, allowed: none, all$"):
        Experts(E, D, F, recompute="some")


def plan(**experts):
    return ModelPlan.from_config(
        {
            "model": {
                "vocab_size": 30, "layers": 2, "width": 16, "heads": 4, "expert_width": 12, "ffn_width": 24,
                "num_experts": 4, "max_positions": 16,
            },
            "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
            "experts": {"_target_": "scatterfold.moe.Experts", **experts},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        }
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_model_with_biases_is_built_as_counted_initialised_with_zeros_and_spared_decay(activation):
    made = plan(activation=activation, bias=True)
    model = made.make_model()
    assert made.counts().total == sum(parameter.numel() for parameter in model.parameters())
    idle = sum(2 * sum(p[0].numel() for p in layer.experts.parameters()) for _, layer in model.moe_layers())
    assert made.counts().active == made.counts().total - idle
    model.reset_parameters(3)
    biases = {name: p for name, p in model.named_parameters() if name.endswith((".b_in", ".b_out"))}
    assert len(biases) == 4 and all(not p.any() for p in biases.values())
    groups = AdamW(lr=1e-3, weight_decay=0.1)(model).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed and not decayed & {id(p) for p in biases.values()}


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_layer_with_biases_learns_what_one_without_cannot(recompute):
    """The target is a constant: x is zero, so only the biases of the experts can reach it."""
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(D, E, 2), Experts(E, D, F, bias=True, recompute=recompute))
    optimizer = AdamW(lr=0.05, weight_decay=0.0)(layer)
    x, target = torch.zeros(16, D), torch.linspace(-1, 1, D)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert layer.experts.b_in.grad.any() or layer.experts.b_out.grad.any()
