"""What a layout cannot cut is said in one line, before anything starts."""

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.layout_checks import check_layout, check_ring
from scatterfold.parallel import Layout

MODEL = {
    "vocab_size": 29,
    "layers": 2,
    "width": 24,
    "heads": 6,
    "kv_heads": 2,
    "expert_width": 9,
    "num_experts": 6,
}


def check(world, sequence_length=24, dispatcher="AllToAllDispatcher", **sizes):
    model = {name: sizes.pop(name) for name in list(sizes) if name in (*MODEL, "ffn_width", "tie_embeddings")}
    config = {
        "model": {**MODEL, **model},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": f"scatterfold.parallel.dispatchers.{dispatcher}"},
    }
    check_layout(Layout(**sizes).resolve(world), ModelPlan.from_config(config), sequence_length)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"ep": 6},
        {"ep": 2, "etp": 3},
        {"tp": 2, "cp": 3},
        {"tp": 2, "ep": 3, "pp": 2},
        {"dispatcher": "LocalDispatcher", "dp_shard": 12},
    ],
)
def test_what_works(sizes):
    check(12, **sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ep": 4}, "layout.ep=4 does not divide model.num_experts=6, allowed: 1, 2, 3, 6"),
        ({"etp": 2}, "layout.etp=2 does not divide model.expert_width=9, allowed: 1, 3, 9"),
        ({"ep": 2, "num_experts": 0, "ffn_width": 24}, "layout.ep=2 with model.num_experts=0, allowed: 1"),
        ({"etp": 3, "num_experts": 1, "ffn_width": 24}, "layout.etp=3 with model.num_experts=1, allowed: 1"),
        ({"ep": 2, "dispatcher": "LocalDispatcher"}, "dispatcher=local cannot reach the experts of layout.ep=2"),
        ({"tp": 4}, "layout.tp=4 does not divide model.heads=6"),
        ({"tp": 3}, "layout.tp=3 does not divide model.kv_heads=2"),
        ({"tp": 2, "kv_heads": 6, "num_experts": 0, "ffn_width": 25}, "layout.tp=2 does not divide model.ffn_width=25"),
        ({"cp": 2, "sequence_length": 6}, "a sequence of 6 tokens does not divide into 2 x layout.cp = 4 equal parts"),
        ({"tp": 2, "sequence_length": 7}, "a sequence of 7 tokens does not divide into layout.cp x layout.tp = 2"),
        ({"pp": 2, "tie_embeddings": True}, "model.tie_embeddings=true with layout.pp=2, allowed: false, or"),
    ],
)
def test_what_does_not(sizes, message):
    with pytest.raises(ConfigError) as caught:
        check(12, **sizes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"device": "cpu"}, "ring runs on CUDA only, allowed: gather"),
        ({}, {"precision": "fp32"}, "ring cannot compute with trainer.precision=fp32, allowed: trainer.precision=bf16"),
        ({}, {"pack_documents": True}, "ring cannot keep packed documents apart, allowed: data.pack_documents=false"),
        ({"sliding_window": 8}, {}, "ring knows no model.sliding_window=8, allowed: gather"),
        ({"attention_sinks": True}, {}, "ring knows no model.attention_sinks, allowed: gather"),
        (
            {
                "latent_attention": {"kv_rank": 8, "nope_width": 8, "rope_width": 8, "value_width": 8},
                "head_width": None,
            },
            {},
            "ring knows no model.latent_attention, allowed: gather",
        ),
        ({"head_width": 4}, {}, "ring cannot compute heads of width 4, allowed: a multiple of 8"),
    ],
)
def test_what_ring_attention_cannot_do(model, options, message):
    config = {"vocab_size": 29, "layers": 2, "width": 48, "heads": 6, "ffn_width": 8, "num_experts": 0, **model}
    nodes = {"model": config, "router": {}, "experts": {}, "dispatcher": {}}
    given = {"device": "cuda", "precision": "bf16", "pack_documents": False}
    check_ring(
        ModelPlan.from_config(
            {
                **nodes,
                "model": {
                    **config,
                    **{"sliding_window": None, "head_width": 8, "latent_attention": None, "attention_sinks": False},
                },
            }
        ),
        16,
        **given,
    )
    with pytest.raises(ConfigError, match=message):
        check_ring(ModelPlan.from_config(nodes), 16, **{**given, **options})
