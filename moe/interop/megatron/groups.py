"""From fields of Megatron's to our groups, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...build import ModelPlan
from ...models.config import ModelConfig
from ..huggingface.config_json import ConfigJson
from ..huggingface.decoder import dense_groups, experts_node
from ..huggingface.misfit import Misfit, completed, demand_experts, demand_model, demand_router
from ..huggingface.mixture import mixture_groups
from .fields import UNSUPPORTED
from .positions import read_positions, write_positions

NAME = "megatron"
_TOP_K = "scatterfold.moe.routers.TopKRouter"
# (activation_func, gated_linear_unit, activation_func_clamp_value, glu_linear_offset) of each of ours that they have
_ACTIVATIONS = {
    "swiglu": ("silu", True, None, 0.0),
    "geglu": ("gelu", True, None, 0.0),
    "reglu": ("relu", True, None, 0.0),
    "clamped_swiglu": ("quick_gelu", True, 7.0, 1.0),
    "silu": ("silu", False, None, 0.0),
    "gelu": ("gelu", False, None, 0.0),
    "relu": ("relu", False, None, 0.0),
    "relu2": ("squared_relu", False, None, 0.0),
}
_BALANCE = {
    "aux_loss": "balance_micro_batch",
    "seq_aux_loss": "balance_sequence",
    "global_aux_loss": "balance_global_batch",
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
    groups = mixture_groups(model, _read_router(fields))
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
        "num_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_size,
        "ffn_hidden_size": config.ffn_width or config.expert_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_norm == "head",
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
    names = ("activation_func", "gated_linear_unit", "activation_func_clamp_value", "glu_linear_offset")
    return {**fields, **_write_biases(plan, settings["bias"]), **dict(zip(names, _ACTIVATIONS[activation]))}


def _read_activation(fields: ConfigJson) -> str:
    name = fields.only("activation_func", *dict.fromkeys(kind[0] for kind in _ACTIVATIONS.values()))
    gated, clamp = fields.flag("gated_linear_unit"), fields.get("activation_func_clamp_value")
    kind = (name or "gelu", gated, clamp, fields.real("glu_linear_offset") if gated else 0.0)
    for ours, theirs in _ACTIVATIONS.items():
        if kind == theirs:
            return ours
    shown = "; ".join(f"{name}{' gated' if gated else ''}" for name, gated, _, _ in _ACTIVATIONS.values())
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


def _read_router(fields: ConfigJson) -> dict[str, Any]:
    top_k = fields.whole("moe_router_topk", 1)
    score = fields.only("moe_router_score_function", "softmax", "sigmoid") or "softmax"
    pre = fields.flag("moe_router_pre_softmax")
    router: dict[str, Any] = {"_target_": _TOP_K, "top_k": top_k}
    if score == "sigmoid":
        router |= {"score": "sigmoid", "renormalise": top_k > 1}
    else:
        router |= {"score": "softmax" if pre else "softmax_after", "renormalise": False}
    if fields.get("moe_router_topk_scaling_factor"):
        router["scale"] = fields.real("moe_router_topk_scaling_factor")
    groups = fields.whole_or_none("moe_router_num_groups", 1)
    if groups is not None and groups > 1 and fields.get("moe_router_group_topk"):
        best = fields.whole("moe_router_group_topk", 1)
        counted = top_k // best
        if counted not in (1, 2):
            raise fields.refusal(
                "moe_router_group_topk", f"{top_k} or {top_k // 2}: a group's best expert, or two best"
            )
        router |= {"num_groups": groups, "top_groups": best, "group_score": ("max", "top2_sum")[counted - 1]}
    if fields.flag("moe_router_enable_expert_bias"):
        router["bias_rate"] = fields.real("moe_router_bias_update_rate")
    if fields.flag("add_bias_linear"):
        router["gate_bias"] = True
    for field, ours in (("moe_z_loss_coeff", "z_loss"), ("moe_input_jitter_eps", "jitter")):
        if fields.get(field):
            router[ours] = fields.real(field)
    return router | _read_balance(fields)


def _read_balance(fields: ConfigJson) -> dict[str, float]:
    kinds, rates = fields.get("moe_router_load_balancing_type"), fields.get("moe_aux_loss_coeff")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    rates = rates if isinstance(rates, list) else [rates] * len(kinds)
    read: dict[str, float] = {}
    for kind, rate in zip(kinds, rates):
        if kind not in (*_BALANCE, "none", None):
            raise fields.refusal("moe_router_load_balancing_type", f"{', '.join(_BALANCE)}, none")
        if kind in _BALANCE and rate:
            read[_BALANCE[kind]] = float(rate)
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
        **_write_router(plan),
    }
    if len(plan.moe_layers) < config.layers:
        fields["moe_layer_freq"] = [int(config.is_moe(layer)) for layer in range(config.layers)]
    if config.shared_expert_width is not None:
        fields["moe_shared_expert_intermediate_size"] = config.shared_expert_width
        fields["moe_shared_expert_gate"] = config.shared_expert_gate
    return experts


def _write_router(plan: ModelPlan) -> dict[str, Any]:
    scores = ("softmax", "sigmoid", "softmax_after")
    free = dict.fromkeys(("scale", "num_groups", "gate_bias", "bias_rate"), ...)
    router = demand_router(NAME, plan, scores, **free)
    top_k, score, renormalise = router["top_k"], router["score"], router["renormalise"]
    after = score == "softmax_after" or (score == "softmax" and renormalise)
    if score == "sigmoid" and renormalise != (top_k > 1):
        raise Misfit(NAME, "router.renormalise", renormalise, f"{str(top_k > 1).lower()} with sigmoid, top_k={top_k}")
    if after and top_k == 1:
        raise Misfit(NAME, "router.renormalise", renormalise, "false with top_k=1, and score=softmax")
    if router["bias_rate"] is not None and score != "sigmoid":
        raise Misfit(NAME, "router.bias_rate", router["bias_rate"], f"null with score={score}, or score=sigmoid")
    fields: dict[str, Any] = {
        "moe_router_topk": top_k,
        "moe_router_score_function": "sigmoid" if score == "sigmoid" else "softmax",
        "moe_router_pre_softmax": score == "softmax" and not after,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": router["bias_rate"] is not None,
    }
    if router["bias_rate"] is not None:
        fields["moe_router_bias_update_rate"] = router["bias_rate"]
    if router["scale"] != 1.0:
        fields["moe_router_topk_scaling_factor"] = router["scale"]
    if router["num_groups"] > 1:
        counted = {"max": 1, "top2_sum": 2}[router["group_score"]]
        if top_k // router["top_groups"] != counted or (counted == 2 and score == "softmax" and after):
            allowed = f"max with top_groups={top_k}, or top2_sum with top_groups={top_k // 2} and score=sigmoid"
            raise Misfit(NAME, "router.group_score", router["group_score"], allowed)
        fields |= {"moe_router_num_groups": router["num_groups"], "moe_router_group_topk": router["top_groups"]}
    balance = {kind: router[ours] for kind, ours in _BALANCE.items() if router[ours]}
    fields["moe_router_load_balancing_type"] = list(balance) if len(balance) > 1 else next(iter(balance), "none")
    fields["moe_aux_loss_coeff"] = list(balance.values()) if len(balance) > 1 else next(iter(balance.values()), 0.0)
    for field, ours in (("moe_z_loss_coeff", "z_loss"), ("moe_input_jitter_eps", "jitter")):
        if router[ours]:
            fields[field] = router[ours]
    return fields


def _write_biases(plan: ModelPlan, expert_bias: bool) -> dict[str, bool]:
    """They have biases on queries, keys and values alone, or on every matrix, the router's included."""
    config = plan.config
    gate_bias = plan.is_moe and completed_router(plan)["gate_bias"]
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


def completed_router(plan: ModelPlan) -> Mapping[str, Any]:
    """Settings of a top-k router, those not given included."""
    from ...routers.top_k import TopKRouter

    return completed(TopKRouter, plan.router)


def _has_dense(plan: ModelPlan) -> bool:
    return len(plan.moe_layers) < plan.config.layers or plan.config.shared_expert_width is not None
