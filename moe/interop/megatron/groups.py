"""From fields of Megatron's to our groups, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...build import ModelPlan
from ...models.config import ModelConfig
from ...routers.top_k import TopKRouter
from ..huggingface.config_json import ConfigJson
from ..huggingface.decoder import dense_groups, experts_node
from ..huggingface.misfit import Misfit, completed, demand_experts, demand_model
from ..huggingface.mixture import mixture_groups
from .fields import UNSUPPORTED
from .positions import read_positions, write_positions
from .router import NAME, read_router, write_router

# (activation_func, gated_linear_unit, activation_func_clamp_value, glu_linear_offset) of each of ours that they have
ACTIVATIONS = {
    "swiglu": ("silu", True, None, 0.0),
    "geglu": ("gelu", True, None, 0.0),
    "reglu": ("relu", True, None, 0.0),
    "clamped_swiglu": ("quick_gelu", True, 7.0, 1.0),
    "silu": ("silu", False, None, 0.0),
    "gelu": ("gelu", False, None, 0.0),
    "relu": ("relu", False, None, 0.0),
    "relu2": ("squared_relu", False, None, 0.0),
}


def read_groups(fields: ConfigJson) -> dict[str, Any]:
    """Our groups of a model that its fields describe.

    Raises: CheckpointError for a field that is missing or wrong, or asks for what we do not have.
    """
    for name, allowed in UNSUPPORTED.items():
        fields.only(name, *allowed)
    fields.only("normalization", "RMSNorm")
    heads, width = fields.whole("num_attention_heads", 1), fields.whole("hidden_size", 1)
    layers = fields.whole("num_layers", 1)
    experts = fields.whole_or_none("num_moe_experts", 1) or 0
    moe_layers = _read_moe_layers(fields, layers) if experts > 1 else []
    model: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size", 1),
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": fields.whole_or_none("num_query_groups", 1) or heads,
        "head_width": fields.whole_or_none("kv_channels", 1) or width // heads,
        "norm_eps": fields.real("layernorm_epsilon"),
        "tie_embeddings": fields.flag("share_embeddings_and_output_weights"),
        **read_positions(fields),
    }
    activation = _read_activation(fields)
    if activation != "swiglu":
        model["activation"] = activation
    if fields.flag("qk_layernorm"):
        model["qk_norm"] = "head"
    bias = fields.flag("add_bias_linear")
    if bias or fields.flag("add_qkv_bias"):
        model["attention_bias"] = True
    if bias:
        if len(moe_layers) < layers or fields.get("moe_shared_expert_intermediate_size"):
            raise fields.refusal("add_bias_linear", "false: a dense MLP has no biases here (add_qkv_bias may be true)")
        model["attention_output_bias"] = True
    if fields.only("softmax_type", "vanilla", "learnable") == "learnable":
        model["attention_sinks"] = True
    model |= _read_window(fields, layers)
    if len(moe_layers) < layers:
        model["ffn_width"] = fields.whole_or_none("ffn_hidden_size", 1) or 4 * width
    if not moe_layers:
        return dense_groups(model)
    model |= _read_experts(fields, experts, moe_layers, layers)
    groups = mixture_groups(model, read_router(fields))
    return {**groups, "experts": experts_node(activation, **({"bias": True} if bias else {}))}


def write_fields(plan: ModelPlan) -> dict[str, Any]:
    """The fields that describe a model of ours.

    What only training uses and they do not have is left out: the capacity in training, frozen parameters.

    Raises: ConfigError that names the first field of ours that they cannot say.
    """
    config = plan.config
    optional = ("attention_bias", "attention_output_bias", "attention_sinks", "shared_expert_width", "qk_norm")
    demand_model(NAME, plan, **dict.fromkeys((*optional, "sliding_window", "window_layers", "rotary_width"), ...))
    if config.qk_norm == "projection":
        raise Misfit(NAME, "model.qk_norm", config.qk_norm, "none, head")
    fields: dict[str, Any] = {
        **shape_fields(config),
        "softmax_type": "learnable" if config.attention_sinks else "vanilla",
        "vocab_size": config.vocab_size,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        **write_positions(NAME, config),
        **_write_window(config),
    }
    settings = _write_experts(plan, fields) if plan.is_moe else {"activation": config.activation, "bias": False}
    activation = settings["activation"]
    if plan.is_moe and activation != config.activation and _has_dense(plan):
        raise Misfit(NAME, "experts.activation", activation, f"model.activation={config.activation}")
    return {**fields, **_write_biases(plan, settings["bias"]), **activation_fields(activation)}


def shape_fields(config: ModelConfig) -> dict[str, Any]:
    """Sizes and norms of a model, as the fields of TransformerConfig that say them."""
    return {
        "num_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_size,
        "ffn_hidden_size": config.ffn_width or config.expert_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_norm == "head",
    }


def activation_fields(activation: str) -> dict[str, Any]:
    """One of `ACTIVATIONS`, its function by name."""
    names = ("activation_func", "gated_linear_unit", "activation_func_clamp_value", "glu_linear_offset")
    return dict(zip(names, ACTIVATIONS[activation]))


def _read_activation(fields: ConfigJson) -> str:
    name = fields.only("activation_func", *dict.fromkeys(kind[0] for kind in ACTIVATIONS.values()))
    gated, clamp = fields.flag("gated_linear_unit"), fields.get("activation_func_clamp_value")
    kind = (name or "gelu", gated, clamp, fields.real("glu_linear_offset") if gated else 0.0)
    for ours, theirs in ACTIVATIONS.items():
        if kind == theirs:
            return ours
    shown = "; ".join(f"{name}{' gated' if gated else ''}" for name, gated, _, _ in ACTIVATIONS.values())
    raise fields.refusal("activation_func", f"{shown}, the last but one gated with clamp 7 and offset 1")


def _read_moe_layers(fields: ConfigJson, layers: int) -> list[int]:
    pattern = fields.get("moe_layer_freq")
    if isinstance(pattern, str):  # Megatron-LM takes a number, or a Python list as a text
        raise fields.refusal("moe_layer_freq", "a number, or a list of 0 and 1")
    if isinstance(pattern, list):
        if len(pattern) != layers or any(one not in (0, 1) for one in pattern):
            raise fields.refusal("moe_layer_freq", f"a number, or a list of 0 and 1 of {layers} layers")
        return [layer for layer, one in enumerate(pattern) if one]
    every = fields.whole("moe_layer_freq", 1)
    return [layer for layer in range(layers) if layer % every == 0]


def _read_experts(fields: ConfigJson, experts: int, moe_layers: Sequence[int], layers: int) -> dict[str, Any]:
    width = fields.whole_or_none("moe_ffn_hidden_size", 1) or fields.whole("ffn_hidden_size", 1)
    read: dict[str, Any] = {"num_experts": experts, "expert_width": width}
    dense = layers - len(moe_layers)
    if list(moe_layers) == list(range(dense, layers)):
        read |= {"first_k_dense": dense} if dense else {}
    else:
        read["moe_layers"] = list(moe_layers)
    shared = fields.whole_or_none("moe_shared_expert_intermediate_size", 1)
    if shared is not None:
        read["shared_expert_width"] = shared
        if fields.flag("moe_shared_expert_gate"):
            read["shared_expert_gate"] = True
    return read


def _read_window(fields: ConfigJson, layers: int) -> dict[str, Any]:
    window, skip = fields.get("window_size"), fields.get("window_attn_skip_freq")
    if not window:
        return {}
    if not isinstance(window, list) or len(window) != 2 or window[1] not in (0, -1) or window[0] < 0:
        raise fields.refusal("window_size", "null, or two numbers: tokens before, and 0 after")
    read: dict[str, Any] = {"sliding_window": window[0] + 1}  # ours counts the token itself
    if isinstance(skip, list):
        read["window_layers"] = [layer for layer, one in enumerate(skip[:layers]) if one]
    elif isinstance(skip, int) and not isinstance(skip, bool):
        read["window_layers"] = [layer for layer in range(layers) if (layer + 1) % skip]
    elif skip is not None:
        raise fields.refusal("window_attn_skip_freq", "null, a number, or a list of 0 and 1")
    return read


def _write_window(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    window = {"window_size": [config.sliding_window - 1, 0]}
    if config.window_layers is not None:
        window["window_attn_skip_freq"] = [int(layer in config.window_layers) for layer in range(config.layers)]
    return window


def _write_experts(plan: ModelPlan, fields: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields of experts and router; returns the settings of the experts."""
    config = plan.config
    experts = demand_experts(NAME, plan, bias=...)
    fields |= {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_width,
        "moe_grouped_gemm": True,
        **write_router(plan),
    }
    if len(plan.moe_layers) < config.layers:
        fields["moe_layer_freq"] = [int(config.is_moe(layer)) for layer in range(config.layers)]
    if config.shared_expert_width is not None:
        fields["moe_shared_expert_intermediate_size"] = config.shared_expert_width
        fields["moe_shared_expert_gate"] = config.shared_expert_gate
    return experts


def _write_biases(plan: ModelPlan, expert_bias: bool) -> dict[str, bool]:
    """They have biases on queries, keys and values alone, or on every matrix, the router's included."""
    config = plan.config
    gate_bias = plan.is_moe and completed(TopKRouter, plan.router)["gate_bias"]
    others = {
        "model.attention_output_bias": config.attention_output_bias,
        "experts.bias": expert_bias,
        "router.gate_bias": gate_bias,
    }
    if not any(others.values()):
        return {"add_bias_linear": False, "add_qkv_bias": config.attention_bias}
    others["model.attention_bias"] = config.attention_bias
    if not all(others.values()) or _has_dense(plan):
        name = next(name for name, value in others.items() if value)
        raise Misfit(NAME, name, True, "false, or biases on every matrix of a model without dense MLPs")
    return {"add_bias_linear": True, "add_qkv_bias": True}


def _has_dense(plan: ModelPlan) -> bool:
    return len(plan.moe_layers) < plan.config.layers or plan.config.shared_expert_width is not None
