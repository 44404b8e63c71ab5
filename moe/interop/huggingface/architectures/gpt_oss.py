"""GPT-OSS: attention sinks, windows in every other layer, biases everywhere, experts behind clamped gates.

Its experts are stored transposed, gate and up columns alternating; the published ones in MXFP4, which is read and never
written. Its router takes the softmax in the dtype of the model, ours in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .....kernels.activations import CLAMPED_ALPHA, CLAMPED_LIMIT
from .....parallel.checkpoint.lazy import LazyTensor, transpose
from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, attention_rules, experts_node, outer_rules, read_decoder, write_decoder
from ..misfit import Misfit, demand_experts, demand_model, demand_router
from ..mixture import (
    MIXTURE_DEFAULTS,
    balance_rules,
    mixture_groups,
    read_num_experts,
    read_router,
    write_mixture,
)
from ..mxfp4 import blank_blocks, blank_scales, dequantised
from ..tensor_rules import Layout, TensorRule, interleaved_halves, joined_interleaved, linear, mapped, same
from ..windows import FULL, SLIDING

ACTIVATION = "clamped_swiglu"
UNUSED_WINDOW = 128  # its class wants one, also where no layer has it
ROPE = {  # of its config class, where the file has neither rope_scaling nor rope_parameters
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Architecture):
    model_type = "gpt_oss"
    class_name = "GptOssForCausalLM"
    quantisations = ("mxfp4",)
    defaults = {
        **DECODER_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": CLAMPED_ALPHA,
        "swiglu_limit": CLAMPED_LIMIT,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        hf.only("swiglu_alpha", CLAMPED_ALPHA)
        hf.only("swiglu_limit", CLAMPED_LIMIT)
        hf.only("hidden_act", "silu")
        if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
            hf = hf.with_defaults({**self.defaults, "rope_parameters": ROPE})
        model, bias = read_decoder(hf), hf.flag("attention_bias")
        model |= {
            "num_experts": read_num_experts(hf, "num_local_experts"),
            "expert_width": hf.whole("intermediate_size", 1),
            "attention_bias": bias,
            "attention_output_bias": bias,
            "attention_sinks": True,
            **_read_windows(hf, model["layers"]),
        }
        router = read_router(hf, renormalise=False, score="softmax_after", gate_bias=True)
        return {**mixture_groups(model, router), "experts": experts_node(ACTIVATION, bias=True)}

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        config = plan.config
        free = ("attention_bias", "attention_output_bias", "sliding_window", "window_layers")
        demand_model(self.model_type, plan, attention_sinks=True, **dict.fromkeys(free, ...))
        if config.attention_output_bias != config.attention_bias:
            allowed = str(config.attention_bias).lower()
            raise Misfit(self.model_type, "model.attention_output_bias", config.attention_output_bias, allowed)
        demand_experts(self.model_type, plan, all_layers=True, bias=True, activation=ACTIVATION)
        router = demand_router(self.model_type, plan, ("softmax_after",), gate_bias=True)
        slides = [config.window_of(layer) is not None for layer in range(config.layers)]
        return {
            **write_decoder(self.model_type, plan, hidden_act="silu"),
            **write_mixture(config, router),
            "intermediate_size": config.expert_width,
            "attention_bias": config.attention_bias,
            "sliding_window": config.sliding_window or UNUSED_WINDOW,
            "layer_types": [SLIDING if slide else FULL for slide in slides],
            "swiglu_alpha": CLAMPED_ALPHA,
            "swiglu_limit": CLAMPED_LIMIT,
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        before, after = outer_rules(plan.config)
        layers = []
        for layer in range(plan.config.layers):
            layers += attention_rules(plan.config, layer)
            layers += linear(f"blocks.{layer}.mlp.router", f"model.layers.{layer}.mlp.router", bias=True)
            layers += _expert_rules(f"blocks.{layer}.mlp.experts", f"model.layers.{layer}.mlp.experts")
            layers += balance_rules(plan, layer)
        return [*before, *layers, *after]


def _read_windows(hf: ConfigJson, layers: int) -> dict[str, Any]:
    """Every other layer, the first one included, where layer_types does not say."""
    types = hf.get("layer_types") or [FULL if layer % 2 else SLIDING for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise hf.refusal("layer_types", f"{layers} times {SLIDING} or {FULL}")
    sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    window = hf.whole_or_none("sliding_window", 1)
    if not sliding:
        return {}
    if window is None:
        raise hf.refusal("layer_types", f"{FULL} alone where there is no sliding_window")
    return {"sliding_window": window, **({} if len(sliding) == layers else {"window_layers": sliding})}


def _expert_rules(ours: str, theirs: str) -> list[TensorRule]:
    """w_in (E, 2, F, D) of gate_up_proj (E, D, 2F), w_out (E, D, F) of down_proj (E, F, D), and their biases."""
    return [
        _with_quantised(
            mapped(
                same(f"{ours}.w_in", f"{theirs}.gate_up_proj"),
                read=lambda tensor: interleaved_halves(transpose(tensor, 1, 2), 1),
                write=lambda tensor: transpose(joined_interleaved(tensor, 1), 1, 2),
            ),
            read=lambda tensor: interleaved_halves(tensor, 1),
            write=lambda tensor: joined_interleaved(tensor, 1),
        ),
        mapped(
            same(f"{ours}.b_in", f"{theirs}.gate_up_proj_bias"),
            read=lambda tensor: interleaved_halves(tensor, 1),
            write=lambda tensor: joined_interleaved(tensor, 1),
        ),
        _with_quantised(
            mapped(
                same(f"{ours}.w_out", f"{theirs}.down_proj"),
                read=lambda tensor: transpose(tensor, 1, 2),
                write=lambda tensor: transpose(tensor, 1, 2),
            ),
            read=lambda tensor: tensor,
            write=lambda tensor: tensor,
        ),
        same(f"{ours}.b_out", f"{theirs}.down_proj_bias"),
    ]


def _with_quantised(rule: TensorRule, read: Any, write: Any) -> TensorRule:
    """The same tensor as MXFP4, whose rows lie as ours do: read where the folder has it, not written.

    Args:
        read, write: between (E, rows, columns) and our shape.
    """
    (plain,) = rule.layouts
    key = plain.keys[0]

    def blank(ours: Sequence[LazyTensor]) -> list[LazyTensor]:
        rows = write(ours[0])
        return [blank_blocks(rows), blank_scales(rows)]

    quantised = Layout(
        (f"{key}_blocks", f"{key}_scales"), lambda theirs: [read(dequantised(theirs[0], theirs[1]))], blank
    )
    return TensorRule(rule.names, (plain, quantised))


ARCHITECTURE = GptOss()
