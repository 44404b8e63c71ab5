"""Which models of ours DeepSeek, GLM-4 and GPT-OSS can say, and which not."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from scatterfold.kernels import ConfigError  # noqa: E402
from scatterfold.moe.build import ModelPlan  # noqa: E402
from scatterfold.moe.interop.stored import StoredModel, wanted_shapes  # noqa: E402
from scatterfold.parallel.checkpoint.lazy import in_memory  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import assert_same_model, load, write  # noqa: E402

LATENT = {"kv_rank": 12, "nope_width": 8, "rope_width": 4, "value_width": 10}
MODEL = {
    **{"vocab_size": 61, "layers": 3, "width": 32, "heads": 4, "ffn_width": 24, "max_positions": 64},
    **{"num_experts": 8, "expert_width": 20, "first_k_dense": 1, "shared_expert_width": 40},
}
SIGMOID = {"score": "sigmoid", "renormalise": True, "bias_rate": 0.001, "scale": 1.5}
CLAMPED = {"activation": "clamped_swiglu", "bias": True}
CHOSEN = {"score": "softmax_after", "gate_bias": True}
OPEN = {**MODEL, "first_k_dense": 0, "shared_expert_width": None, "attention_sinks": True}


def groups(model, router, experts=None):
    return {
        "model": {**MODEL, **model},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 3, **router},
        "experts": {"_target_": "scatterfold.moe.Experts", **(experts or {})},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }


def stored_model(config):
    """A model of ours with random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = wanted_shapes(ModelPlan.from_config(config))
    tensors = {
        name: in_memory(0.3 * torch.randn(shape, generator=generator) + (1.0 if "norm" in name else 0.0))
        for name, shape in shapes.items()
    }
    return StoredModel(source="here", format="scatterfold", config=config, tensors=tensors)


FITTING = {
    "deepseek_v2": groups({"latent_attention": LATENT}, {"renormalise": False}),
    "deepseek_v3": groups({"latent_attention": {**LATENT, "interleaved": False, "q_rank": 6}}, SIGMOID),
    "glm4_moe": groups({"kv_heads": 2, "rotary_width": 6, "head_width": 10}, {**SIGMOID, "balance_global_batch": 0.1}),
    "gpt_oss": groups({**OPEN, "sliding_window": 5, "window_layers": (1,)}, CHOSEN, CLAMPED),
}


@pytest.mark.parametrize("model_type", FITTING)
def test_a_model_of_ours_finds_the_family_that_says_it(model_type, tmp_path):
    stored = stored_model(FITTING[model_type])
    folder = write(stored, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    assert_same_model(load(folder), stored.build())


MISFITS = [
    ("deepseek_v3", groups({}, SIGMOID), "model.latent_attention=null does not fit deepseek_v3"),
    ("deepseek_v3", groups({"latent_attention": LATENT}, {}), "router.score=softmax does not fit deepseek_v3"),
    ("deepseek_v2", groups({"latent_attention": LATENT}, {}), "router.renormalise=true does not fit deepseek_v2"),
    (
        "deepseek_v2",
        groups({"latent_attention": {**LATENT, "interleaved": False}}, {"renormalise": False}),
        "model.latent_attention.interleaved=false does not fit deepseek_v2, allowed: true",
    ),
    (
        "deepseek_v3",
        groups({"latent_attention": {**LATENT, "norm_eps": 1e-5}}, SIGMOID),
        "model.latent_attention.norm_eps=1e-05 does not fit deepseek_v3, allowed: 1e-06",
    ),
    (
        "deepseek_v3",
        groups({"latent_attention": LATENT, "attention_bias": True}, SIGMOID),
        "model.attention_output_bias=false does not fit deepseek_v3, allowed: true",
    ),
    (
        "deepseek_v3",
        groups({"latent_attention": LATENT, "shared_expert_width": 30}, SIGMOID),
        "model.shared_expert_width=30 does not fit deepseek_v3, allowed: a multiple of model.expert_width=20",
    ),
    (
        "deepseek_v3",
        groups({"latent_attention": LATENT, "moe_layers": (0, 2)}, SIGMOID),
        "model.moe_layers=[0, 2] does not fit deepseek_v3, allowed: all layers from one on",
    ),
    (
        "deepseek_v3",
        groups({"latent_attention": LATENT}, {**SIGMOID, "num_groups": 2}),
        "router.group_score=max does not fit deepseek_v3, allowed: top2_sum",
    ),
    ("glm4_moe", groups({"qk_norm": "projection"}, SIGMOID), "model.qk_norm=projection does not fit glm4_moe"),
    ("glm4_moe", groups({"sliding_window": 5}, SIGMOID), "model.sliding_window=5 does not fit glm4_moe, allowed: null"),
    ("gpt_oss", groups(OPEN, CHOSEN), "experts.bias=false does not fit gpt_oss, allowed: true"),
    (
        "gpt_oss",
        groups(OPEN, CHOSEN, {"bias": True}),
        "experts.activation=swiglu does not fit gpt_oss, allowed: clamped_swiglu",
    ),
    ("gpt_oss", groups(OPEN, {}, CLAMPED), "router.score=softmax does not fit gpt_oss, allowed: softmax_after"),
    ("qwen3_moe", groups({**OPEN, "qk_norm": "head"}, {}), "model.attention_sinks=true does not fit qwen3_moe"),
    (
        "mixtral",
        groups({**OPEN, "attention_sinks": False, "rotary_width": 4}, {}),
        "model.rotary_width=4 does not fit mixtral, allowed: null",
    ),
    (
        "mixtral",
        groups({**OPEN, "attention_sinks": False, "latent_attention": LATENT}, {}),
        "does not fit mixtral, allowed: null",
    ),
]


@pytest.mark.parametrize("model_type, config, message", MISFITS, ids=[case[2] for case in MISFITS])
def test_what_a_family_cannot_say(model_type, config, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        write(stored_model(config), tmp_path / "model", architecture=model_type)
    assert message in str(error.value) and "\n" not in str(error.value)
