"""Counts from the configuration against the built module, an operation counter, and published figures."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.moe.blocks import LatentAttention
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.models import count_model
from scatterfold.moe.models.counts import layer_costs

PRESETS = Path(__file__).resolve().parents[3] / "configs" / "model"
SHAPE = {"vocab_size": 40, "layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": 32, "ffn_width": 24}
MOE = {"num_experts": 6, "expert_width": 20}

VARIANTS = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "moe": MOE,
    "everything": {
        **MOE,
        "first_k_dense": 1,
        "shared_expert_width": 12,
        "shared_expert_gate": True,
        "attention_bias": True,
        "qk_norm": "head",
        "head_width": 6,
        "activation": "relu2",
    },
    "sinks": {"attention_sinks": True, "attention_bias": True, "attention_output_bias": True, "rotary_width": 2},
    "latent": {**MOE, "kv_heads": None, "latent_attention": LatentAttention(12, 6, 4, 8, q_rank=10)},
    "latent without a query rank": {
        **{"kv_heads": None, "attention_bias": True, "attention_output_bias": True},
        "latent_attention": LatentAttention(12, 6, 4, 8),
    },
    "projection norm": {**MOE, "moe_layers": (2,), "qk_norm": "projection", "shared_expert_width": 12},
}


def build(config, activation="swiglu"):
    return Transformer(
        config,
        lambda: TopKRouter(config.width, config.num_experts, 2),
        lambda: Experts(config.num_experts, config.width, config.expert_width, activation),
    )


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_counts_equal_the_built_module(name, activation):
    config = ModelConfig(**{**SHAPE, **VARIANTS[name]})
    model = build(config, activation)
    counts = count_model(config, experts_per_token=2, expert_activation=activation)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for _, layer in model.moe_layers():
        per_expert = sum(parameter[0].numel() for parameter in layer.experts.parameters())
        idle += (config.num_experts - 2) * per_expert
    assert counts.active == counts.total - idle
    assert counts.embedding == model.embedding.weight.numel()


def test_flops_equal_those_of_an_operation_counter():
    """Of a dense model: the counter sees every matrix product, but attention without its causal saving."""
    config = ModelConfig(**{**SHAPE, "width": 64, "ffn_width": 96})
    model, length = build(config), 32
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = count_model(config, sequence_length=length)
    by_name = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    measured = sum(flops for op, flops in by_name.items() if "attention" not in op)
    assert measured == pytest.approx(6 * (counts.active - counts.embedding) * length, rel=5e-3)  # norms differ
    attention = counts.flops_per_token - 6 * (counts.active - counts.embedding)
    assert attention == 12 * 4 * 64 * (length + 1) / 2


def test_a_window_bounds_what_attention_costs():
    config = ModelConfig(**SHAPE, sliding_window=3)
    seen = (1 + 2 + 3 * 6) / 8
    counts = count_model(config, sequence_length=8)
    assert counts.flops_per_token == 6 * (counts.active - counts.embedding) + 12 * 4 * 16 * seen
    config = ModelConfig(**SHAPE, sliding_window=3, window_layers=(1,))
    attention = count_model(config, sequence_length=8).flops_per_token - 6 * (counts.active - counts.embedding)
    assert attention == 12 * 16 * (seen + 3 * 4.5)


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_and_head_cost_what_the_model_costs(name):
    config = ModelConfig(**{**SHAPE, **VARIANTS[name]})
    counts = count_model(config, experts_per_token=2, sequence_length=8)
    costs, head = layer_costs(config, experts_per_token=2, sequence_length=8)
    assert len(costs) == config.layers
    assert sum(costs) + head == pytest.approx(counts.flops_per_token)
    if name == "everything":
        assert costs[0] != costs[1] == costs[2]  # dense, then MoE


def test_flops_of_latent_attention_equal_those_of_an_operation_counter():
    latent = LatentAttention(24, 16, 8, 12, q_rank=40)
    config = ModelConfig(**{**SHAPE, "width": 64, "ffn_width": 96, "kv_heads": None}, latent_attention=latent)
    model, length = build(config), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64)).sum().backward()
    counts = count_model(config, sequence_length=length)
    by_name = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    measured = sum(flops for op, flops in by_name.items() if "attention" not in op)
    assert measured == pytest.approx(6 * (counts.active - counts.embedding) * length, rel=5e-3)  # norms differ
    attention = counts.flops_per_token - 6 * (counts.active - counts.embedding)
    assert attention == 4 * 4 * 6 * (16 + 8 + 12) * (length + 1) / 2


def test_a_pipeline_splits_by_what_layers_cost():
    plan = plan_of("qwen3_30b_a3b", 8)
    split = plan.split(4, sequence_length=4096)
    assert [len(stage) for stage in split] == [13, 13, 13, 9]  # the head costs as much as 4.2 layers
    assert plan.split(1) == [range(plan.config.layers)]


def plan_of(preset, top_k):
    return ModelPlan.from_config(
        {
            "model": yaml.safe_load((PRESETS / f"{preset}.yaml").read_text()),
            "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": top_k},
            "experts": {"_target_": "scatterfold.moe.Experts"},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        },
        vocab_size={"tiny": 257, "small": 32000}.get(preset),
    )


@pytest.mark.parametrize(
    ("preset", "top_k", "total", "active"),
    [("mixtral_8x7b", 2, 46.7, 12.9), ("qwen3_30b_a3b", 8, 30.5, 3.3), ("olmoe_1b_7b", 8, 6.9, 1.3)],
)
def test_presets_have_their_published_sizes(preset, top_k, total, active):
    counts = plan_of(preset, top_k).counts()
    assert counts.total / 1e9 == pytest.approx(total, abs=0.06)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.06)


DEEPSEEK = {"kv_rank": 512, "nope_width": 128, "rope_width": 64, "value_width": 128}
PUBLISHED = {
    "DeepSeek-V3": (
        {
            **{"vocab_size": 129280, "layers": 61, "width": 7168, "heads": 128, "ffn_width": 18432, "first_k_dense": 3},
            **{"num_experts": 256, "expert_width": 2048, "shared_expert_width": 2048},
            "latent_attention": LatentAttention(**DEEPSEEK, q_rank=1536),
        },
        671.0,
    ),
    "DeepSeek-V2-Lite": (
        {
            **{"vocab_size": 102400, "layers": 27, "width": 2048, "heads": 16, "ffn_width": 10944, "first_k_dense": 1},
            **{"num_experts": 64, "expert_width": 1408, "shared_expert_width": 2816},
            "latent_attention": LatentAttention(**DEEPSEEK),
        },
        15.7,
    ),
    "gpt-oss-20b": (
        {
            **{"vocab_size": 201088, "layers": 24, "width": 2880, "heads": 64, "kv_heads": 8, "head_width": 64},
            **{"num_experts": 32, "expert_width": 2880, "attention_sinks": True, "attention_bias": True},
            "attention_output_bias": True,
        },
        20.9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_families_have_their_published_sizes(name):
    shape, total = PUBLISHED[name]
    config = ModelConfig(**shape)
    biases = {"router_parameters": 32 * (config.width + 1), "expert_bias": True} if name == "gpt-oss-20b" else {}
    assert count_model(config, **biases).total / 1e9 == pytest.approx(total, abs=0.06)


@pytest.mark.parametrize("preset", [path.stem for path in sorted(PRESETS.glob("*.yaml"))])
def test_presets_are_built_as_counted(preset):
    plan = plan_of(preset, top_k=2)
    with torch.device("meta"):
        model = plan.make_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.counts().total


def test_the_count_of_a_plan_knows_the_router_and_the_activation():
    config = {
        "model": {**SHAPE, **MOE},
        "router": {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.5, "gate_bias": True},
        "experts": {"_target_": "scatterfold.moe.Experts", "activation": "relu2"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    plan = ModelPlan.from_config(config)
    counts = plan.counts()
    assert counts.total == counts.active == sum(parameter.numel() for parameter in plan.make_model().parameters())
