import pytest

from scatterfold import ConfigError, ModelConfig
from scatterfold.moe.blocks import LatentAttention

SHAPE = {"vocab_size": 41, "layers": 3, "width": 16, "heads": 4, "ffn_width": 32}
MOE = {"num_experts": 4, "expert_width": 8}
WIDTHS = {"kv_rank": 8, "nope_width": 4, "rope_width": 2, "value_width": 4}
LATENT = {"latent_attention": LatentAttention(**WIDTHS)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "model.layers=0 is too small, allowed: 1 or more"),
        ({"num_experts": -1}, "model.num_experts=-1 is too small"),
        ({"heads": 3}, "model.heads=3 does not divide model.width=16"),
        ({"kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4"),
        ({"head_width": 5}, "model.head_width=5 is odd"),
        ({"ffn_width": None}, "model.ffn_width=null, but layer 0 is dense"),
        ({"num_experts": 4}, "model.expert_width=null with model.num_experts=4"),
        (
            {"num_experts": 4, "expert_width": 8, "moe_layers": (1, 3)},
            r"moe_layers=\[1, 3\] names layer 3, allowed: 0 to 2",
        ),
        (
            {"num_experts": 4, "expert_width": 8, "first_k_dense": 3},
            "no layer is a MoE layer with model.first_k_dense=3",
        ),
        ({"num_experts": 4, "expert_width": 8, "ffn_width": None, "first_k_dense": 1}, "but layer 0 is dense"),
        ({"qk_norm": "heads"}, "model.qk_norm='heads' is unknown, allowed: none, head, projection"),
        ({"activation": "swish"}, "model.activation='swish' is unknown, allowed: swiglu"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0 is out of range, allowed: above 0"),
        ({"sliding_window": 0}, "model.sliding_window=0 is too small"),
        ({"shared_expert_gate": True}, "shared_expert_gate=true without model.shared_expert_width"),
        ({"rotary_width": 3}, "model.rotary_width=3 is out of range, allowed: an even number up to model.head_width=4"),
        ({"rotary_width": 6}, "model.rotary_width=6 is out of range"),
        ({"window_layers": (0,)}, r"window_layers=\[0\] without model.sliding_window, allowed: null"),
        ({"window_layers": (0, 3), "sliding_window": 4}, "names layer 3, allowed: 0 to 2"),
        ({"kv_heads": 2, **LATENT}, "model.kv_heads=2 with model.latent_attention, allowed: null"),
        ({"qk_norm": "head", **LATENT}, "model.qk_norm=head with model.latent_attention, allowed: none"),
        ({"attention_sinks": True, **LATENT}, "model.attention_sinks=True with model.latent_attention, allowed: false"),
    ],
)
def test_impossible_shapes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**{**SHAPE, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_rank": 0}, "model.latent_attention.kv_rank=0 is too small, allowed: 1 or more"),
        ({"rope_width": 3}, "model.latent_attention.rope_width=3 is odd"),
        ({"value_width": 7}, "value_width=7 is larger than nope_width \\+ rope_width = 6, allowed: at most that"),
        ({"norm_eps": 0.0}, "model.latent_attention.norm_eps=0.0 is out of range, allowed: above 0"),
    ],
)
def test_impossible_latents_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        LatentAttention(**{**WIDTHS, **settings})


def test_what_is_left_out_follows():
    config = ModelConfig(**SHAPE)
    assert (config.num_kv_heads, config.head_size) == (4, 4)
    assert not any(config.is_moe(layer) for layer in range(3))
    assert config.turned_width == 4
    config = ModelConfig(**{**SHAPE, "heads": 3}, **LATENT)
    assert (config.num_kv_heads, config.head_size, config.turned_width) == (3, 6, 2)


def test_a_window_of_some_layers():
    config = ModelConfig(**SHAPE, sliding_window=5, window_layers=(0, 2))
    assert [config.window_of(layer) for layer in range(3)] == [5, None, 5]
    assert [ModelConfig(**SHAPE, sliding_window=5).window_of(layer) for layer in range(3)] == [5, 5, 5]
