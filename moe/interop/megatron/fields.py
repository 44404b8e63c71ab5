"""What describes a model of Megatron's, in one vocabulary: the fields of its TransformerConfig and GPTModel.

The same is written in three other ways: as arguments of Megatron-LM, which it keeps in its checkpoints, as the
run_config.yaml of Megatron-Bridge, and as the transformer_config.json that we write. All become fields first.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

# Defaults of Megatron-Core for the fields that say what is computed; what is not here says nothing about it.
DEFAULTS: Mapping[str, Any] = {
    "num_query_groups": None,
    "kv_channels": None,
    "ffn_hidden_size": None,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "gated_linear_unit": False,
    "activation_func": "gelu",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "num_moe_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
}
# Fields that change what is computed in a way we do not have: the values that leave it as it is.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "mtp_num_layers": (0,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (False,),
    "no_rope_freq": (),
    "apply_residual_connection_post_layernorm": (False,),
    "softmax_scale": (),
    "rotary_interleaved": (False,),
    "moe_latent_size": (),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (),
    # of releases after 0.16
    "moe_expert_rank_capacity_factor": (),
    "moe_mlp_glu_interleave_size": (),
    "moe_shared_expert_glu_interleave_size": (),
    "enable_mhc_connections": (False,),
    "use_mup": (False,),
}
# Arguments of Megatron-LM that go by another name than the field.
_ARGUMENTS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "num_experts": "num_moe_experts",
    "max_position_embeddings": "max_sequence_length",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "padded_vocab_size": "vocab_size",
}
_SAME = ("num_layers", "hidden_size", "num_attention_heads", *DEFAULTS, *UNSUPPORTED)


def from_arguments(arguments: Any) -> dict[str, Any]:
    """Fields of the arguments of Megatron-LM; empty if there are none."""
    given = vars(arguments) if hasattr(arguments, "__dict__") else {}
    renamed = set(_ARGUMENTS.values())
    fields = {name: given[name] for name in _SAME if name in given and name not in renamed}
    fields |= {field: given[name] for name, field in _ARGUMENTS.items() if name in given}
    if "untie_embeddings_and_output_weights" in given:
        fields["share_embeddings_and_output_weights"] = not given["untie_embeddings_and_output_weights"]
    if not given.get("group_query_attention", True):
        fields["num_query_groups"] = None
    for name, activation, gated in _ACTIVATION_FLAGS:
        if given.get(name):
            fields["activation_func"], fields["gated_linear_unit"] = activation, gated
    return {name: _plain(value) for name, value in fields.items()}


_ACTIVATION_FLAGS = (
    ("swiglu", "silu", True),
    ("squared_relu", "squared_relu", False),
    ("quick_geglu", "quick_gelu", True),
    ("openai_gelu", "openai_gelu", False),
)


def to_arguments(fields: Mapping[str, Any], **others: Any) -> Namespace:
    """Arguments that Megatron-LM takes from a checkpoint with --use-checkpoint-args."""
    back = {field: name for name, field in _ARGUMENTS.items()}
    given = {back.get(name, name): value for name, value in fields.items() if name != "activation_func"}
    given["untie_embeddings_and_output_weights"] = not given.pop("share_embeddings_and_output_weights")
    given["group_query_attention"] = fields["num_query_groups"] != fields["num_attention_heads"]
    given["use_rotary_position_embeddings"] = True
    given["add_position_embedding"] = False
    pair = (fields["activation_func"], fields["gated_linear_unit"])
    given |= {name: pair == (activation, gated) for name, activation, gated in _ACTIVATION_FLAGS}
    return Namespace(**given, **others)


def from_run_config(described: Any) -> dict[str, Any]:
    """Fields of a run_config.yaml of Megatron-Bridge; empty if it describes no model."""
    model = described.get("model") if isinstance(described, Mapping) else None
    if not isinstance(model, Mapping):
        return {}
    fields = {str(name): _plain(value) for name, value in model.items()}
    if "max_sequence_length" not in fields and "seq_length" in fields:
        fields["max_sequence_length"] = fields["seq_length"]
    return fields


def _plain(value: Any) -> Any:
    """Numbers, texts, lists as they are; of a function its bare name; of anything else a text that shows it."""
    if isinstance(value, Mapping) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"<{type(value).__name__}>"
