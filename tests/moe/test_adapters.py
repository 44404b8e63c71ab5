"""Adapters on one frozen MLP (PESC) against plain loops, and what a model of them has, costs and trains."""

import pytest
import torch
from torch import nn

from scatterfold.kernels import ConfigError, Routing
from scatterfold.moe import AdapterExperts, MoELayer, ThresholdRouter, TopKRouter
from scatterfold.moe.blocks import MLP
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.layout_checks import check_layout
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.parallel import Layout

E, D, F, A, T = 4, 8, 12, 5, 9


def layer_of(router=None, **options):
    torch.manual_seed(0)
    layer = MoELayer(router or TopKRouter(D, E, 2), AdapterExperts(E, D, F, adapter_width=A, **options)).double()
    nn.init.normal_(layer.experts.adapters.w_out)
    return layer


def loop(layer, x):
    """Each token and each of its experts one after the other."""
    adapters, routing = layer.experts.adapters, layer.router(x).routing
    gate, up = (x @ linear.weight.T for linear in (layer.experts.ffn.w_gate, layer.experts.ffn.w_up))
    u = (nn.functional.silu(gate) * up) @ layer.experts.ffn.w_out.weight.T
    out = torch.zeros_like(x)
    for e in range(E):
        for n in range(int(routing.expert_offsets[e]), int(routing.expert_offsets[e + 1])):
            t = int(routing.token[n])
            adapted = nn.functional.gelu(u[t] @ adapters.w_in[e].T) @ adapters.w_out[e].T
            row = torch.zeros_like(x).index_add(0, torch.tensor([t]), (u[t] + layer.experts.alpha * adapted)[None])
            out = out + routing.weight[n] * row
    return out


ROUTERS = {
    "top-k": lambda: TopKRouter(D, E, 2),
    "raw": lambda: TopKRouter(D, E, 3, renormalise=False),
    "sigmoid": lambda: TopKRouter(D, E, 2, score="sigmoid", renormalise=False, scale=1.5),
    "threshold": lambda: ThresholdRouter(D, E, 0.6),
    "capacity": lambda: TopKRouter(D, E, 2, capacity_factor=0.5, min_capacity=1),  # some tokens reach nobody
}


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_and_its_gradients_are_those_of_a_loop(router, alpha):
    layer = layer_of(ROUTERS[router]().double(), alpha=alpha, train_ffn=True)
    nn.init.normal_(layer.router.weight)
    x = torch.randn(T, D, dtype=torch.double)
    grad, parameters = torch.randn(T, D, dtype=torch.double), dict(layer.named_parameters())
    found, expected = [], []
    for function, into in ((layer, found), (lambda x: loop(layer, x), expected)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        into.extend([out, *torch.autograd.grad(out, [leaf, *parameters.values()], grad)])
    for name, one, other in zip(["out", "x", *parameters], found, expected):
        torch.testing.assert_close(one, other, msg=name)


def test_at_the_start_a_layer_whose_weights_sum_to_one_is_the_dense_mlp():
    torch.manual_seed(0)
    experts, mlp = AdapterExperts(E, D, F, activation="relu2"), MLP(D, F, "relu2")
    experts.ffn.load_state_dict(mlp.state_dict())
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(MoELayer(TopKRouter(D, E, 2), experts)(x), mlp(x), rtol=1e-6, atol=1e-6)
    half = MoELayer(TopKRouter(D, E, 2, scale=0.5), experts)
    torch.testing.assert_close(half(x), 0.5 * mlp(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_padding_of_a_dispatcher_is_neither_read_nor_given_a_gradient(missing):
    """Rows 3 and 4 and the last two assignments are padding, and hold anything."""
    layer = layer_of()
    real = Routing.from_topk(torch.tensor([[0, 2], [1, 2], [3, 0]]), torch.rand(3, 2).double(), E)
    rows = torch.randn(3, D, dtype=torch.double)

    def run(routing, rows):
        leaf = rows.clone().requires_grad_()
        weight = routing.weight.clone().requires_grad_()
        out = layer.experts(leaf, routing.with_weight(weight))
        return out, *torch.autograd.grad(out[:3].sum(), [leaf, weight])

    junk = torch.tensor([2**30, -7], dtype=torch.int32)
    padded = Routing(
        token=torch.cat([real.token, junk]),
        weight=torch.cat([real.weight, torch.full((2,), missing).double()]),
        expert_offsets=real.expert_offsets,
        assignment=torch.cat([real.assignment, junk]),
        token_offsets=torch.cat([real.token_offsets, real.token_offsets[-1:].expand(2)]),
    )
    out, grad_rows, grad_weight = run(padded, torch.cat([rows, torch.full((2, D), missing).double()]))
    expected = run(real, rows)
    for one, other in zip((out[:3], grad_rows[:3], grad_weight[:6]), expected):
        torch.testing.assert_close(one, other)
    assert not out[3:].any() and not grad_rows[3:].any() and not grad_weight[6:].any()


def test_a_routing_in_two_halves_adds_up_to_the_whole():
    """As ranks with half of the experts each compute it: what is common to all experts is in both, by weight."""
    layer = layer_of()
    chosen, weights = torch.rand(T, E).topk(3).indices, torch.rand(T, 3).double()
    u = torch.randn(T, D, dtype=torch.double)
    halves = [Routing.from_topk(chosen, weights, E, keep=keep) for keep in (chosen < 2, chosen >= 2)]
    whole = layer.experts(u, Routing.from_topk(chosen, weights, E))
    torch.testing.assert_close(sum(layer.experts(u, half) for half in halves), whole)


def test_no_token_at_all():
    layer = layer_of()
    out = layer(torch.zeros(0, D, dtype=torch.double, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, D) and layer.experts.adapters.w_in.grad is not None


def plan(layers=2, top_k=2, **experts):
    return ModelPlan.from_config(
        {
            "model": {
                "vocab_size": 30, "layers": layers, "width": 16, "heads": 4, "expert_width": 12, "ffn_width": 24,
                "num_experts": E, "first_k_dense": 1, "max_positions": 16,
            },
            "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": top_k},
            "experts": {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 6, **experts},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        }
    )  # fmt: skip


@pytest.mark.parametrize("experts", [{}, {"activation": "gelu"}, {"train_ffn": True}])
def test_a_model_is_built_as_counted(experts):
    made = plan(**experts)
    model = made.make_model()
    layer = model.moe_layers()[0][1]
    assert made.counts().total == sum(parameter.numel() for parameter in model.parameters())
    idle = 2 * sum(parameter[0].numel() for parameter in layer.experts.adapters.parameters())
    assert made.counts().active == made.counts().total - idle
    # What a layer adds to a dense one: E adapters of two matrices, and the router (PESC, section 3.2).
    ffn = sum(parameter.numel() for parameter in layer.experts.ffn.parameters())
    assert sum(parameter.numel() for parameter in layer.parameters()) - ffn == E * 2 * 16 * 6 + E * 16
    # A frozen matrix costs a forward pass and the gradient of its input: 4 operations a weight, not 6.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - idle - model.embedding.weight.numel()
    frozen = 0 if experts.get("train_ffn") else ffn
    attention = 2 * 12 * 4 * 4 * (16 + 1) / 2
    assert made.counts().flops_per_token == 6 * trained + 4 * frozen + attention
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == frozen


def test_initial_values_follow_the_seed_and_adapters_begin_as_nothing():
    model = plan().make_model()
    for seed in (3, 4):
        model.reset_parameters(seed)
        adapters = model.moe_layers()[0][1].experts.adapters
        assert not adapters.w_out.any() and adapters.w_in.std() > 0.1


def test_only_adapters_and_router_of_a_layer_get_gradients_state_and_decay():
    model = plan().make_model()
    optimizer = AdamW(lr=0.1, weight_decay=0.5)(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # of the first step, V get no gradient, for U is zero
        tokens = torch.randint(0, 30, (2, 16))
        model(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {f"blocks.1.mlp.experts.ffn.{name}.weight" for name in ("w_gate", "w_up", "w_out")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_width": 0}, "experts.adapter_width=0 is too small"),
        ({"alpha": 0.0}, "experts.alpha=0 turns the adapters off"),
        ({"activation": "swish"}, "activation='swish' is unknown"),
        ({"backend": "cuda"}, "experts.backend='cuda' is unknown"),
        ({"recompute": "half"}, "experts.recompute='half' is unknown"),
    ],
)
def test_a_mistake_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(etp=4), "layout.etp=4 does not divide experts.adapter_width=6, allowed: 1, 2, 3, 6"),
        (Layout(tp=8), "layout.tp=8 does not divide model.heads=4"),
    ],
)
def test_a_layout_that_cannot_cut_them_is_refused_before_the_start(layout, message):
    made = plan()
    made = ModelPlan(
        made.config, made.router, made.experts, {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"}
    )
    with pytest.raises(ConfigError, match=message):
        check_layout(layout.resolve(8), made, 16)


def test_a_width_of_the_mlp_that_tp_cannot_cut_is_refused_before_the_start():
    made = ModelPlan.from_config(
        {
            "model": {"vocab_size": 30, "layers": 1, "width": 16, "heads": 4, "expert_width": 7, "num_experts": E},
            "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
            "experts": {"_target_": "scatterfold.moe.AdapterExperts"},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        }
    )
    with pytest.raises(ConfigError, match="layout.tp=2 does not divide model.expert_width=7, which adapters share"):
        check_layout(Layout(tp=2).resolve(2), made, 16)


def test_compiled_adapters_are_one_graph():
    torch._dynamo.reset()
    layer = layer_of(alpha=0.5)
    chosen = torch.rand(T, E).topk(2).indices

    def run(u, weights):
        return layer.experts(u, Routing.from_topk(chosen, weights, E))

    results = []
    for function in (torch.compile(run, backend="aot_eager", fullgraph=True), run):
        torch.manual_seed(3)
        leaves = [torch.randn(T, D, dtype=torch.double), torch.rand(T, 2, dtype=torch.double)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
