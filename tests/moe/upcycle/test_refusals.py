"""Settings that fit nothing, or not the model: one line, before anything is read."""

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.upcycle import UpcycleSettings, architecture_of, upcycle

ALONE = [
    ({"method": "spars"}, "method=spars is unknown, allowed: sparse, fine_grained, drop, noise, shared, adapter"),
    ({"router": "hash"}, "router=hash is unknown, allowed: top_k, threshold"),
    ({"score": "relu"}, "score=relu is unknown, allowed: softmax, sigmoid"),
    ({"scale": "up"}, "scale=up is unknown, allowed: up_down, down, output, cube_root"),
    ({"layers": "odd"}, "layers=odd is unknown, allowed: all, every_other, last_half, a list of numbers"),
    ({"optimizer": "keep"}, "optimizer=keep is unknown, allowed: reset, carry"),
    ({"experts": 1}, "experts=1 is too small, allowed: 2 or more"),
    ({"top_k": 0}, "top_k=0 is too small, allowed: 1 or more"),
    ({"top_k": 9}, "top_k=9 is larger than experts=8"),
    ({"method": "drop", "share": 1.5}, "share=1.5 is out of range, allowed: 0 to 1"),
    ({"method": "noise", "noise_std": -1.0}, "noise_std=-1.0 is out of range, allowed: 0 or more"),
    ({"router_std": 0.0}, "router_std=0.0 sends all tokens to the first experts, allowed: above 0"),
    ({"router": "threshold", "threshold": 0.0}, "threshold=0.0 is out of range"),
    ({"router": "threshold", "score": "sigmoid"}, "score=sigmoid does not fit router=threshold"),
    ({"router": "threshold", "renormalise": False}, "renormalise=false does not fit router=threshold"),
    ({"router": "threshold", "top_k": 1}, "top_k=1 does not fit router=threshold"),
    ({"threshold": 0.7}, "threshold=0.7 means nothing to router=top_k, allowed: with router=threshold"),
    ({"granularity": 2}, "granularity=2 means nothing to method=sparse, allowed: with method=fine_grained or shared"),
    ({"method": "drop", "shuffle": True}, "shuffle=true means nothing to method=drop"),
    ({"noise_std": 0.5}, "noise_std=0.5 means nothing to method=sparse, allowed: with method=noise"),
    ({"shared_gate": True}, "shared_gate=true means nothing to method=sparse, allowed: with method=shared"),
    ({"adapter_width": 8}, "adapter_width=8 means nothing to method=sparse, allowed: with method=adapter"),
]
WITH_MODEL = [
    (
        {"method": "fine_grained", "granularity": 5, "experts": 5, "top_k": 5},
        "granularity=5 does not divide the dense MLP's hidden width 32",
    ),
    ({"method": "fine_grained", "granularity": 4}, "top_k=2 is not a multiple of the 4 routed shards of a copy"),
    (
        {"method": "fine_grained", "granularity": 4, "experts": 6, "top_k": 4},
        "experts=6 is not a multiple of the 4 routed shards",
    ),
    (
        {"method": "shared", "granularity": 4, "shared_shards": 1, "top_k": 2},
        "experts=8 is not a multiple of the 3 routed shards",
    ),
    (
        {"method": "shared", "granularity": 4, "shared_shards": 4},
        "shared_shards=4 leaves nothing to route of granularity=4, allowed: 1 to 3, or 0",
    ),
    ({"method": "shared", "shared_shards": 1}, "shared_shards=1 needs a granularity above it"),
    ({"method": "shared", "granularity": 16}, "experts=8 is not a multiple of granularity=16"),
    ({"method": "shared", "scale": "down"}, "scale=down means nothing where routed experts begin with a zero output"),
    ({"layers": (0, 2)}, r"layers=\[0, 2\] does not fit a model of 2 layers, allowed: 0 to 1"),
]


@pytest.mark.parametrize(("settings", "message"), ALONE)
def test_settings_that_fit_nothing(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        UpcycleSettings(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "message"), WITH_MODEL)
def test_settings_that_do_not_fit_the_model(make_dense, settings, message):
    with pytest.raises(ConfigError, match=message):
        upcycle([make_dense()], UpcycleSettings(**settings))


def test_every_other_of_one_layer_is_none(make_dense):
    with pytest.raises(ConfigError, match="layers=every_other does not fit a model of 1 layers"):
        upcycle([make_dense(layers=1)], UpcycleSettings(layers="every_other"))


def test_a_mixture_is_no_source(make_dense):
    moe = upcycle([make_dense()], UpcycleSettings())
    with pytest.raises(ConfigError, match="has model.num_experts=8, allowed: a dense model .scatterfold experts grow"):
        upcycle([moe], UpcycleSettings())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"router": "threshold"}, "router._target_="),
        ({"method": "fine_grained", "granularity": 2, "scale": "output"}, "router.scale=2.0"),
        ({"method": "adapter"}, "experts._target_="),
    ],
)
def test_what_hugging_face_cannot_say_names_the_way_out(make_dense, settings, field):
    made = upcycle([make_dense()], UpcycleSettings(**settings))
    with pytest.raises(ConfigError, match=rf"^{field}.* does not fit mixtral, allowed: .*, or to=scatterfold$"):
        architecture_of(made, "huggingface")
    assert architecture_of(made, "scatterfold") is None


@pytest.mark.parametrize(
    ("fields", "settings", "architecture"),
    [
        ({}, {}, "mixtral"),
        ({"attention_bias": True}, {}, "qwen2_moe"),
        ({"qk_norm": "head"}, {}, "qwen3_moe"),
        ({"qk_norm": "head"}, {"layers": "every_other"}, "qwen3_moe"),
        ({"qk_norm": "projection"}, {}, "olmoe"),
        ({}, {"method": "shared", "shared_gate": True}, "qwen2_moe"),
    ],
)
def test_the_architecture_follows_the_attention(make_dense, fields, settings, architecture):
    made = upcycle([make_dense(**fields)], UpcycleSettings(**settings))
    assert architecture_of(made, "huggingface") == architecture


def test_an_architecture_that_does_not_fit_is_refused(make_dense):
    made = upcycle([make_dense(qk_norm="head")], UpcycleSettings())
    with pytest.raises(ConfigError, match="model.qk_norm=head does not fit mixtral"):
        architecture_of(made, "huggingface", "mixtral")
    with pytest.raises(ConfigError, match="architecture=mixtrel is unknown, allowed: "):
        architecture_of(made, "huggingface", "mixtrel")
    with pytest.raises(ConfigError, match="architecture=mixtral does not go with to=scatterfold"):
        architecture_of(made, "scatterfold", "mixtral")
