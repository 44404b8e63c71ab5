"""Upcycled models compute what their dense sources do, and where they do not, by how much they do not."""

import pytest
import torch

from scatterfold.moe.upcycle import UpcycleSettings, upcycle
from scatterfold.moe.upcycle.convert import method_of

LIMIT = 1e-5  # float32, of the largest logit
ACTIVATIONS = ("geglu", "reglu", "clamped_swiglu", "relu", "relu2", "gelu", "silu")
ROUTERS = {
    "softmax, renormalised": {},
    "softmax, raw, even": {"renormalise": False},
    "sigmoid, renormalised": {"score": "sigmoid", "renormalise": True},
    "sigmoid, raw, at zero": {"score": "sigmoid", "renormalise": False},
    "threshold, renormalised": {"router": "threshold", "threshold": 0.6},
}
METHODS = {
    "sparse": {"method": "sparse"},
    "sparse, every expert": {"method": "sparse", "top_k": 8},
    "cut in 1": {"method": "fine_grained", "granularity": 1},
    "cut in 2": {"method": "fine_grained", "granularity": 2, "top_k": 4},
    "cut in 4, shuffled": {"method": "fine_grained", "granularity": 4, "top_k": 4, "experts": 16, "shuffle": True},
    "cut in 8": {"method": "fine_grained", "granularity": 8, "top_k": 16, "experts": 32},
    "one copy cut in 4": {"method": "fine_grained", "granularity": 4, "top_k": 4, "experts": 4},
    "drop nothing": {"method": "drop", "share": 0.0},
    "no noise": {"method": "noise", "noise_std": 0.0},
    "all shared": {"method": "shared"},
    "all shared, gated, routed shards": {"method": "shared", "shared_gate": True, "granularity": 2, "top_k": 3},
    "1 of 4 shared": {"method": "shared", "granularity": 4, "shared_shards": 1, "top_k": 3, "experts": 9},
    "2 of 4 shared, gated, shuffled": {
        "method": "shared",
        "granularity": 4,
        "shared_shards": 2,
        "top_k": 4,
        "shared_gate": True,
        "shuffle": True,
    },
    "3 of 4 shared": {"method": "shared", "granularity": 4, "shared_shards": 3},
    "adapter": {"method": "adapter", "adapter_width": 8},
    "branch-train-mix of one": {"method": "branch_train_mix"},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_the_start_is_the_dense_model(make_dense, logits, router):
    dense = make_dense()
    before = logits(dense)
    for name, method in METHODS.items():
        check_start(dense, before, logits, UpcycleSettings(**method, **ROUTERS[router]), name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_start_is_the_dense_model_with_any_activation(make_dense, logits, activation):
    """Two routers, whose constants differ, and every way in which a constant gets into the matrices."""
    dense = make_dense(activation=activation, layers=1)
    before = logits(dense)
    for router in ("softmax, renormalised", "softmax, raw, even"):
        for name in ("cut in 4, shuffled", "2 of 4 shared, gated, shuffled", "adapter"):
            check_start(dense, before, logits, UpcycleSettings(**METHODS[name], **ROUTERS[router]), name)


def check_start(dense, before, logits, settings, name):
    assert relative(logits(upcycle([dense], settings)), before) < LIMIT, name
    assert method_of([dense], settings).promise().exact, name


@pytest.mark.parametrize("scale", ["up_down", "down", "output"])
def test_the_constant_may_stand_in_several_places(make_dense, logits, scale):
    dense = make_dense()
    settings = UpcycleSettings(
        method="fine_grained", granularity=4, experts=16, top_k=8, scale=scale, renormalise=False
    )
    made = upcycle([dense], settings)
    assert relative(logits(made), logits(dense)) < LIMIT
    gate, up = made.tensors["blocks.0.mlp.experts.w_in"].read()[0]
    down = made.tensors["blocks.0.mlp.experts.w_out"].read()[0]
    c = 16 * 4 / 8  # R G^2 / K with R = 4 copies
    factors = {"up_down": (1, c**0.5, c**0.5, 1), "down": (1, 1, c, 1), "output": (1, 1, 1, c)}[scale]
    source = [dense.tensors[f"blocks.0.mlp.{name}.weight"].read() for name in ("w_gate", "w_up", "w_out")]
    torch.testing.assert_close(gate, source[0][:8] * factors[0])
    torch.testing.assert_close(up, source[1][:8] * factors[1])
    torch.testing.assert_close(down, source[2][:, :8] * factors[2])
    assert made.config["router"].get("scale", 1.0) == factors[3]


@pytest.mark.parametrize(
    ("layers", "moe"),
    [("all", [0, 1, 2, 3, 4]), ("every_other", [1, 3]), ("last_half", [2, 3, 4]), ((0, 3), [0, 3]), ((4,), [4])],
)
def test_only_the_chosen_layers_become_moe_layers(make_dense, logits, layers, moe):
    dense = make_dense(layers=5)
    made = upcycle([dense], UpcycleSettings(layers=layers))
    assert made.plan().moe_layers == moe
    assert relative(logits(made), logits(dense)) < LIMIT
    assert made.config["model"]["ffn_width"] == (None if layers == "all" else 32)
    untouched = {name for name in dense.tensors if ".mlp." not in name or int(name.split(".")[1]) not in moe}
    assert untouched == dense.tensors.keys() & made.tensors.keys()
    assert all(torch.equal(dense.tensors[name].read(), made.tensors[name].read()) for name in untouched)


@pytest.mark.parametrize(
    ("activation", "scale", "granularity", "error"),
    [
        ("swiglu", "cube_root", 2, 0.075),
        ("swiglu", "cube_root", 4, 0.144),
        ("swiglu", "cube_root", 8, 0.201),
        ("geglu", "cube_root", 2, 0.057),
        ("geglu", "cube_root", 4, 0.103),
        ("geglu", "cube_root", 8, 0.135),
        ("reglu", "cube_root", 8, 0.0),
        ("relu2", "cube_root", 8, 0.0),
        ("gelu", "up_down", 2, 0.08),
        ("gelu", "up_down", 4, 0.14),
        ("gelu", "up_down", 8, 0.17),
    ],
)
def test_what_is_not_exact_is_off_by_what_is_said(make_dense, activation, scale, granularity, error):
    """The relative error of the MLP's output, by a loop over tokens' experts in float64."""
    dense = make_dense(activation=activation, layers=1, width=256, ffn_width=1024)
    settings = UpcycleSettings(
        method="fine_grained", granularity=granularity, experts=4 * granularity, top_k=granularity, scale=scale
    )
    method, made = method_of([dense], settings), upcycle([dense], settings)
    assert method.promise().exact == (error == 0.0)
    x = torch.randn(200, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def read(stored, name):
        return stored.tensors[f"blocks.0.mlp.{name}"].read().double()

    gated = activation in ("swiglu", "geglu", "reglu")
    gate = read(dense, "w_gate.weight") if gated else None
    expected = mlp(activation, x, gate, read(dense, "w_up.weight"), read(dense, "w_out.weight"))
    w_in, w_out, rows = read(made, "experts.w_in"), read(made, "experts.w_out"), read(made, "router.weight")
    out = torch.zeros_like(expected)
    for token, scores in enumerate((x @ rows.T).tolist()):
        chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:granularity]
        for e in chosen:  # equal scores, so equal weights
            gate, up = w_in[e] if gated else (None, w_in[e])
            out[token] += mlp(activation, x[token : token + 1], gate, up, w_out[e])[0] / granularity
    found = float((out - expected).norm() / expected.norm())
    assert found == pytest.approx(error, abs=0.006 if error else 1e-6)


def test_uneven_raw_weights_are_too_large_and_the_plan_says_so(make_dense):
    """y = rho f(x) with rho >= 1: what a router of standard deviation 0.02 costs where weights are not renormalised."""
    dense = make_dense(layers=1, width=256, ffn_width=256)
    settings = UpcycleSettings(renormalise=False, router_std=0.02)
    assert not method_of([dense], settings).promise().exact
    rows = upcycle([dense], settings).tensors["blocks.0.mlp.router.weight"].read()
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(1))
    rho = (x @ rows.T).softmax(-1).topk(2).values.sum(-1) * 8 / 2
    assert rho.min() >= 1
    assert float((rho - 1).square().mean().sqrt()) == pytest.approx(0.42, abs=0.04)  # 8 copies, 2 of them chosen


def test_a_fresh_router_spreads_the_tokens(make_dense):
    """Also where its rows are tiny: a router of zeros would send all tokens to the first experts."""
    dense = make_dense(layers=1, width=256)
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(1))
    for renormalise in (True, False):
        made = upcycle([dense], UpcycleSettings(renormalise=renormalise))
        router = made.plan().make_router()
        with torch.no_grad():
            router.weight.copy_(made.tensors["blocks.0.mlp.router.weight"].read())
        load = router.eval()(x).counts / x.shape[0]
        assert load.min() > 0.15 and load.max() < 0.35  # 2 of 8: 0.25 if even


def mlp(activation, x, gate, up, down):
    act = {
        "swiglu": torch.nn.functional.silu,
        "geglu": torch.nn.functional.gelu,
        "reglu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "relu2": lambda h: torch.relu(h) ** 2,
    }[activation]
    return (act(x @ up.T) if gate is None else act(x @ gate.T) * (x @ up.T)) @ down.T


def relative(after, before):
    return float((after - before).abs().max() / before.abs().max())
