"""What the Llama family of decoders shares: keys of config.json, and names of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...build import ModelPlan
from ...models.config import ModelConfig
from .config_json import ConfigJson
from .misfit import HIDDEN_ACTS, Misfit, hidden_activation
from .rope import ROPE_DEFAULTS, demand_whole_rotation, read_rope, write_rope
from .tensor_rules import TensorRule, linear, same

TOP_K = "scatterfold.moe.routers.TopKRouter"
EXPERTS = "scatterfold.moe.Experts"
DISPATCHER = "scatterfold.parallel.dispatchers.AllToAllDispatcher"
DECODER_DEFAULTS: Mapping[str, Any] = {
    **ROPE_DEFAULTS,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read_decoder(hf: ConfigJson, partial_rotation: bool = False) -> dict[str, Any]:
    """The `model` group as far as all of the family agree; the width of the dense MLP is left to the caller.

    Args:
        partial_rotation: the caller reads which part of a head turns; else it has to be all of it.

    Raises: CheckpointError for a value that we cannot do.
    """
    width, heads = hf.whole("hidden_size", 1), hf.whole("num_attention_heads", 1)
    rope = read_rope(hf)
    if not partial_rotation:
        demand_whole_rotation(hf)
    model = {
        "vocab_size": hf.whole("vocab_size", 1),
        "layers": hf.whole("num_hidden_layers", 1),
        "width": width,
        "heads": heads,
        "kv_heads": hf.whole_or_none("num_key_value_heads", 1) or heads,
        "head_width": hf.whole_or_none("head_dim", 1) or width // heads,
        "norm_eps": hf.real("rms_norm_eps"),
        "tie_embeddings": hf.flag("tie_word_embeddings"),
        **rope,
    }
    activation = read_activation(hf)
    if activation != "swiglu":
        model["activation"] = activation
    if hf.get("initializer_range"):
        model["init_std"] = hf.real("initializer_range")
    return model


def read_activation(hf: ConfigJson) -> str:
    """Our name of `hidden_act`."""
    return HIDDEN_ACTS[hf.only("hidden_act", *HIDDEN_ACTS) or "silu"]


def read_attention_bias(hf: ConfigJson) -> dict[str, bool]:
    """Biases on all four projections of the attention, or on none."""
    bias = hf.flag("attention_bias")
    return {"attention_bias": bias, "attention_output_bias": bias}


def write_attention_bias(model_type: str, config: ModelConfig) -> dict[str, bool]:
    """The same as their key. Raises: Misfit if some of the projections have a bias."""
    if config.attention_output_bias != config.attention_bias:
        allowed = "true" if config.attention_bias else "false"
        raise Misfit(model_type, "model.attention_output_bias", config.attention_output_bias, allowed)
    return {"attention_bias": config.attention_bias}


BIASES = {"attention_bias": ..., "attention_output_bias": ...}  # for `demand_model`, before `write_attention_bias`


def write_decoder(model_type: str, plan: ModelPlan, hidden_act: str | None = None) -> dict[str, Any]:
    """Their keys of what `read_decoder` reads.

    Args:
        hidden_act: what the key of this name says; None for the name of our activation.

    Raises: Misfit for activations or a rotary embedding that they cannot say.
    """
    config = plan.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": hidden_act or hidden_activation(model_type, plan),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(model_type, config),
        **({} if config.init_std is None else {"initializer_range": config.init_std}),
    }


def dense_groups(model: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a dense model; router and experts are there for when it gets some."""
    return {
        "model": dict(model),
        "router": {"_target_": TOP_K, "top_k": 2},
        "experts": experts_node(model.get("activation", "swiglu")),
        "dispatcher": {"_target_": DISPATCHER},
    }


def experts_node(activation: str, **settings: Any) -> dict[str, Any]:
    """The `experts` group."""
    given = settings if activation == "swiglu" else {"activation": activation, **settings}
    return {"_target_": EXPERTS, **given}


def outer_rules(config: ModelConfig) -> tuple[list[TensorRule], list[TensorRule]]:
    """What comes before the layers, and what after them.

    Of tied embeddings a folder may hold either one, or both.
    """
    names = ("model.embed_tokens.weight", "lm_head.weight")
    embedding = same("embedding.weight", *(names if config.tie_embeddings else names[:1]))
    head = [] if config.tie_embeddings else [same("head.weight", "lm_head.weight")]
    return [embedding], [same("norm.weight", "model.norm.weight"), *head]


def attention_rules(config: ModelConfig, layer: int) -> list[TensorRule]:
    """Norms and grouped-query attention of one layer; norms of queries and keys, sinks where it has them."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    rules = [same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")]
    for name in ("q", "k", "v"):
        rules += linear(f"{ours}.attention.w{name}", f"{theirs}.self_attn.{name}_proj", config.attention_bias)
    rules += linear(f"{ours}.attention.wo", f"{theirs}.self_attn.o_proj", config.attention_output_bias)
    if config.attention_sinks:
        rules.append(same(f"{ours}.attention.sinks", f"{theirs}.self_attn.sinks"))
    if config.qk_norm != "none":
        rules += [
            same(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight")
            for name in ("q_norm", "k_norm")
        ]
    rules.append(same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
    return rules


def mlp_rules(name: str, key: str) -> list[TensorRule]:
    """A gated MLP."""
    parts = {"w_gate": "gate_proj", "w_up": "up_proj", "w_out": "down_proj"}
    return [same(f"{name}.{ours}.weight", f"{key}.{theirs}.weight") for ours, theirs in parts.items()]


def dense_rules(plan: ModelPlan) -> Sequence[TensorRule]:
    """All of a dense model."""
    before, after = outer_rules(plan.config)
    layers = [
        rule
        for layer in range(plan.config.layers)
        for rule in (
            *attention_rules(plan.config, layer),
            *mlp_rules(f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"),
        )
    ]
    return [*before, *layers, *after]
