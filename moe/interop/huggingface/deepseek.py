"""What DeepSeek's mixtures and GLM-4's share: dense layers first, shared experts, sigmoid routers, latent attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...blocks import LatentAttention
from ...build import ModelPlan
from .config_json import ConfigJson
from .decoder import TOP_K, attention_rules, mlp_rules, outer_rules, read_decoder, write_decoder
from .misfit import Misfit, demand_experts, demand_router
from .mixture import COUNTS, routed_rules
from .tensor_rules import TensorRule, added, linear, same

LATENT_NORM_EPS = 1e-6  # their class takes it whatever rms_norm_eps says
MIXTURE_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(COUNTS),
    "scoring_func": None,
    "topk_method": None,
    "moe_layer_freq": None,
}
LATENT_DEFAULTS: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_mixture(hf: ConfigJson) -> dict[str, Any]:
    """Which layers have experts, how many, and their widths: of the `model` group."""
    hf.only("moe_layer_freq", 1)
    expert_width = hf.whole("moe_intermediate_size", 1)
    return {
        "num_experts": hf.one_of("n_routed_experts", *COUNTS, least=2),
        "expert_width": expert_width,
        "ffn_width": hf.whole("intermediate_size", 1),
        "first_k_dense": hf.whole_or_none("first_k_dense_replace") or 0,
        "shared_expert_width": expert_width * hf.whole("n_shared_experts", 1),
    }


def write_mixture(model_type: str, plan: ModelPlan) -> dict[str, Any]:
    """The same as their keys; intermediate_size must be there even if no layer is dense.

    Raises: Misfit for dense layers that are not the first ones, or a shared expert that is no multiple of an expert.
    """
    config = plan.config
    demand_experts(model_type, plan)
    dense = config.layers - len(plan.moe_layers)
    if plan.moe_layers != list(range(dense, config.layers)):
        raise Misfit(model_type, "model.moe_layers", plan.moe_layers, "all layers from one on")
    width, shared = config.expert_width or 0, config.shared_expert_width
    if shared is None or shared % width:
        raise Misfit(model_type, "model.shared_expert_width", shared, f"a multiple of model.expert_width={width}")
    return {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": shared // width,
        "moe_intermediate_size": width,
        "intermediate_size": config.ffn_width or width,
        "first_k_dense_replace": dense,
    }


def read_sigmoid_router(hf: ConfigJson) -> dict[str, Any]:
    """The `router` group of DeepSeek-V3. The bias stays as it is until `router.bias_rate` is set."""
    hf.only("scoring_func", "sigmoid")
    hf.only("topk_method", "noaux_tc")
    return {
        "_target_": TOP_K,
        "top_k": hf.whole("num_experts_per_tok", 1),
        "score": "sigmoid",
        "renormalise": hf.flag("norm_topk_prob"),
        "scale": hf.real("routed_scaling_factor"),
        "num_groups": hf.whole("n_group", 1),
        "top_groups": hf.whole("topk_group", 1),
        "group_score": "top2_sum",
        "bias_rate": 0.0,
    }


def write_sigmoid_router(model_type: str, plan: ModelPlan) -> dict[str, Any]:
    """The same as their keys. Raises: Misfit for a router that is another one."""
    router = demand_router(model_type, plan, ("sigmoid",), scale=..., num_groups=..., bias_rate=...)
    if router["num_groups"] > 1 and router["group_score"] != "top2_sum":
        raise Misfit(model_type, "router.group_score", router["group_score"], "top2_sum")
    return {
        "num_experts_per_tok": router["top_k"],
        "norm_topk_prob": router["renormalise"],
        "routed_scaling_factor": router["scale"],
        "n_group": router["num_groups"],
        "topk_group": router["top_groups"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def read_latent(hf: ConfigJson, interleaved: bool) -> dict[str, Any]:
    """The `model` group as far as DeepSeek's decoders agree."""
    hf.only("mlp_bias", False)
    model = read_decoder(hf)
    if model["kv_heads"] != model["heads"]:
        raise hf.refusal("num_key_value_heads", f"{model['heads']}, one for each head of latent attention")
    bias = hf.flag("attention_bias")
    return {
        **{key: value for key, value in model.items() if key not in ("kv_heads", "head_width")},
        "attention_bias": bias,
        "attention_output_bias": bias,
        "latent_attention": {
            "kv_rank": hf.whole("kv_lora_rank", 1),
            "q_rank": hf.whole_or_none("q_lora_rank", 1),
            "nope_width": hf.whole("qk_nope_head_dim", 1),
            "rope_width": hf.whole("qk_rope_head_dim", 1),
            "value_width": hf.whole("v_head_dim", 1),
            "interleaved": interleaved,
            "norm_eps": LATENT_NORM_EPS,
        },
    }


def write_latent(model_type: str, plan: ModelPlan) -> dict[str, Any]:
    """The same as their keys. Raises: Misfit for attention that is not latent, or of another kind."""
    config, latent = plan.config, demand_latent(model_type, plan)
    if config.attention_output_bias != config.attention_bias:
        raise Misfit(
            model_type, "model.attention_output_bias", config.attention_output_bias, str(config.attention_bias).lower()
        )
    return {
        **write_decoder(model_type, plan),
        "head_dim": latent.rope_width,  # of what turns: from it their class makes the angles
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.nope_width,
        "qk_rope_head_dim": latent.rope_width,
        "v_head_dim": latent.value_width,
        "attention_bias": config.attention_bias,
    }


def demand_latent(model_type: str, plan: ModelPlan) -> LatentAttention:
    """The widths of latent attention. Raises: Misfit where it is not latent, or its norms are not theirs."""
    latent = plan.config.latent_attention
    if latent is None:
        raise Misfit(model_type, "model.latent_attention", None, "latent attention")
    if latent.norm_eps != LATENT_NORM_EPS:
        raise Misfit(model_type, "model.latent_attention.norm_eps", latent.norm_eps, str(LATENT_NORM_EPS))
    return latent


def next_token_layers(hf: ConfigJson) -> list[str]:
    """Patterns of the keys of layers behind the last one, which predict further tokens (multi-token prediction).

    They take part in nothing that the model itself computes, and are dropped on reading.
    """
    layers, more = hf.whole("num_hidden_layers", 1), hf.whole_or_none("num_nextn_predict_layers")
    return [f"model.layers.{layers + number}.*" for number in range(1 if more is None else more)]


def mixture_rules(plan: ModelPlan, correction_bias: bool) -> Sequence[TensorRule]:
    """All of a model with latent attention or grouped queries, shared experts, and dense layers first.

    Args:
        correction_bias: the router has `e_score_correction_bias`, our expert bias; zeros where we have none.
    """
    config = plan.config
    before, after = outer_rules(config)
    attention = attention_rules if config.latent_attention is None else latent_rules
    layers = []
    for layer in range(config.layers):
        layers += attention(config, layer)
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        if not config.is_moe(layer):
            layers += mlp_rules(ours, theirs)
            continue
        layers += [*routed_rules(plan, layer), *mlp_rules(f"{ours}.shared", f"{theirs}.shared_experts")]
        if correction_bias:
            key = f"{theirs}.gate.e_score_correction_bias"
            has_bias = plan.router.get("bias_rate") is not None
            layers.append(same(f"{ours}.router.expert_bias", key) if has_bias else added(key, (config.num_experts,)))
    return [*before, *layers, *after]


def latent_rules(config: Any, layer: int) -> list[TensorRule]:
    """Norms and latent attention of one layer."""
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
    rules = [same(f"blocks.{layer}.attention_norm.weight", f"model.layers.{layer}.input_layernorm.weight")]
    if config.latent_attention.q_rank is None:
        rules += linear(f"{ours}.wq", f"{theirs}.q_proj")
    else:
        rules += linear(f"{ours}.wq_down", f"{theirs}.q_a_proj", config.attention_bias)
        rules += linear(f"{ours}.q_norm", f"{theirs}.q_a_layernorm")
        rules += linear(f"{ours}.wq", f"{theirs}.q_b_proj")
    rules += linear(f"{ours}.wkv_down", f"{theirs}.kv_a_proj_with_mqa", config.attention_bias)
    rules += linear(f"{ours}.kv_norm", f"{theirs}.kv_a_layernorm")
    rules += linear(f"{ours}.wkv", f"{theirs}.kv_b_proj")
    rules += linear(f"{ours}.wo", f"{theirs}.o_proj", config.attention_output_bias)
    rules.append(same(f"blocks.{layer}.mlp_norm.weight", f"model.layers.{layer}.post_attention_layernorm.weight"))
    return rules
