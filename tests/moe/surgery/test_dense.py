"""One expert left: the dense model against its MLP, computed by hand."""

import pytest
import torch
from torch.nn import functional

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.mixture import Mixture
from scatterfold.moe.surgery.operations import Prune
from scatterfold.moe.surgery.usage import Usage

CPU = torch.device("cpu")


def mlp_of(model, layer, x):
    return model.blocks[str(layer)].mlp(x)


def expert_by_hand(values, layer, expert, x, activation):
    w_in, w_out = (values[f"blocks.{layer}.mlp.experts.{name}"][expert].double() for name in ("w_in", "w_out"))
    if activation == "relu2":
        return functional.relu(x @ w_in.T) ** 2 @ w_out.T
    return (functional.silu(x @ w_in[0].T) * (x @ w_in[1].T)) @ w_out.T


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_one_expert_left_equals_its_mlp(stored, values, activation):
    source = stored({"scale": 1.5}, {"activation": activation}, activation=activation)
    made = Prune(experts=(3,)).make(Mixture.of(source), None, None, CPU)
    model = made.stored.build().double()
    assert made.stored.plan().counts().total == sum(p.numel() for p in model.parameters())
    x = torch.randn(7, 16, dtype=torch.double)
    for layer in (0, 1):
        expected = 1.5 * expert_by_hand(values(source), layer, 3, x, activation)
        torch.testing.assert_close(mlp_of(model, layer, x), expected, rtol=1e-5, atol=1e-6)
    assert made.notes == ("one expert is left, the model is dense", "its weight 1.5 is folded in")


def test_a_model_whose_router_always_chooses_one_expert_stays_the_same(stored, logits):
    tensors = {f"blocks.{i}.mlp.router.bias": torch.tensor([0.0] * 5 + [90.0] + [0.0] * 2) for i in (0, 1)}
    source = stored({"gate_bias": True, "top_k": 1, "renormalise": False}, tensors=tensors)
    usage = Usage((0, 1), torch.eye(8)[[5, 5]].double() * 60, torch.eye(8)[[5, 5]].double() * 60, 60)
    made = Prune(keep=1).make(Mixture.of(source), usage, None, CPU)
    torch.testing.assert_close(logits(made.stored), logits(source), rtol=1e-5, atol=1e-5)


def test_of_a_raw_router_the_mean_weight_is_folded_in(stored, values):
    source = stored({"renormalise": False})
    hits, weight = torch.ones(2, 8).double(), torch.ones(2, 8).double() * 0.3
    hits[:, 4], weight[:, 4] = 40.0, torch.tensor([10.0, 14.0]).double()
    made = Prune(keep=1).make(Mixture.of(source), Usage((0, 1), hits, weight, 40), None, CPU)
    x = torch.randn(7, 16, dtype=torch.double)
    for layer, factor in ((0, 10 / 40), (1, 14 / 40)):
        expected = factor * expert_by_hand(values(source), layer, 4, x, "swiglu")
        torch.testing.assert_close(mlp_of(made.stored.build().double(), layer, x), expected, rtol=1e-5, atol=1e-6)
    assert "0.25 in layer 0, 0.35 in layer 1" in made.notes[1]
    with pytest.raises(ConfigError, match="keep=1 of a router whose weights do not add up to a constant needs"):
        Prune(experts=(1,)).check(Mixture.of(source), False)
    hits[0, 6] = 0
    with pytest.raises(ConfigError, match="expert 6 of layer 0 gets none of the 40 tokens"):
        Prune(experts=(6,)).make(Mixture.of(source), Usage((0, 1), hits, weight, 40), None, CPU)


@pytest.mark.parametrize("ffn_width", [9, 30])  # narrower and wider than expert and shared expert together
def test_a_shared_expert_is_taken_in_and_all_mlps_get_one_width(stored, values, ffn_width):
    source = stored(layers=3, first_k_dense=1, shared_expert_width=6, ffn_width=ffn_width)
    made = Prune(experts=(2,)).make(Mixture.of(source), None, None, CPU)
    config = made.stored.checked().plan().config
    assert config.ffn_width == max(12 + 6, ffn_width) and config.shared_expert_width is None
    model, before, x = made.stored.build().double(), source.build().double(), torch.randn(7, 16, dtype=torch.double)
    torch.testing.assert_close(mlp_of(model, 0, x), mlp_of(before, 0, x))
    for layer in (1, 2):
        shared = before.blocks[str(layer)].mlp.shared(x)
        expected = shared + expert_by_hand(values(source), layer, 2, x, "swiglu")
        torch.testing.assert_close(mlp_of(model, layer, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "model", "message"),
    [
        ({"bias": True}, {}, "keep=1 with experts.bias=true"),
        ({"_target_": "scatterfold.moe.AdapterExperts"}, {}, "keep=1 would leave an MLP and its adapter"),
        ({}, {"shared_expert_width": 6, "shared_expert_gate": True}, "model.shared_expert_gate=true"),
        ({"activation": "relu2"}, {"shared_expert_width": 6}, "experts.activation=relu2 and model.activation=swiglu"),
        ({"activation": "relu2"}, {"first_k_dense": 1}, "two kinds of MLPs"),
    ],
)
def test_what_a_dense_mlp_cannot_be_is_refused(stored, experts, model, message):
    with pytest.raises(ConfigError, match=message):
        Prune(experts=(1,)).config(Mixture.of(stored(None, experts, **model)))


def test_frozen_names_that_are_gone_are_forgotten(stored):
    source = stored(frozen=["blocks.*.experts.*", "embedding.*"])
    assert Prune(experts=(1,)).make(Mixture.of(source), None, None, CPU).stored.plan().config.frozen == ()
