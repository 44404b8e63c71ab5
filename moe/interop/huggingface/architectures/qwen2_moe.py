"""Qwen2-MoE: biases on queries, keys and values, a shared expert behind a sigmoid gate, experts in all layers or some.

It has a shared expert, and it has a gate. A model of ours without one, or without the gate, can still be said exactly:

- without a shared expert: one of zeros (width `ZERO_WIDTH`) is added, whose output is zero;
- without a gate: the gate's weights are zero, so that it is 1/2 for every token, and the down projection is doubled,
  which is exact.

Both are marked in config.json, so that reading the folder undoes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .....parallel.checkpoint.lazy import pointwise
from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, attention_rules, mlp_rules, outer_rules, read_decoder, write_decoder
from ..misfit import demand_experts, demand_model, demand_router
from ..mixture import (
    LAYER_DEFAULTS,
    MIXTURE_DEFAULTS,
    mixture_groups,
    read_layer_pattern,
    read_num_experts,
    read_router,
    renormalised,
    routed_rules,
    write_layer_pattern,
    write_mixture,
)
from ..tensor_rules import TensorRule, added, mapped, same
from ..windows import WINDOWS, read_switched_window, write_switched_window

ZERO_WIDTH = 128  # of an added shared expert: 8 tensor parallel ranks still get 16 columns each
ZERO_EXPERT, NO_GATE = "scatterfold_zero_shared_expert", "scatterfold_ungated_shared_expert"
QWEN_MOE_DEFAULTS = {
    **DECODER_DEFAULTS,
    **MIXTURE_DEFAULTS,
    **LAYER_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "layer_types": None,
    "norm_topk_prob": False,
}


class Qwen2Moe(Architecture):
    model_type = "qwen2_moe"
    class_name = "Qwen2MoeForCausalLM"
    defaults = {
        **QWEN_MOE_DEFAULTS,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
        "max_window_layers": 28,
        ZERO_EXPERT: False,
        NO_GATE: False,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = {
            **read_qwen_moe(hf),
            "num_experts": read_num_experts(hf, "num_experts"),
            "attention_bias": hf.flag("qkv_bias"),
        }
        if not hf.flag(ZERO_EXPERT):
            model["shared_expert_width"] = hf.whole("shared_expert_intermediate_size", 1)
            model["shared_expert_gate"] = not hf.flag(NO_GATE)
        full = hf.whole("max_window_layers")
        slides = [layer % 2 == 0 and layer < full for layer in range(model["layers"])]
        model |= read_switched_window(hf, slides, by_layer=True)
        return mixture_groups(model, read_router(hf, hf.flag("norm_topk_prob")))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        config = plan.config
        demand_model(self.model_type, plan, attention_bias=..., shared_expert_width=..., **WINDOWS)
        demand_experts(self.model_type, plan)
        router = demand_router(self.model_type, plan, ("softmax", "softmax_after"))
        marks = {}
        if config.shared_expert_width is None:
            marks = {ZERO_EXPERT: True}
        elif not config.shared_expert_gate:
            marks = {NO_GATE: True}
        return {
            **write_decoder(self.model_type, plan),
            **write_switched_window(plan),
            **write_qwen_moe(plan, router),
            "norm_topk_prob": renormalised(router),
            "shared_expert_intermediate_size": config.shared_expert_width or ZERO_WIDTH,
            "qkv_bias": config.attention_bias,
            **marks,
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        before, after = outer_rules(plan.config)
        layers = []
        for layer in range(plan.config.layers):
            layers += attention_rules(plan.config, layer)
            if plan.config.is_moe(layer):
                layers += [*routed_rules(plan, layer), *_shared_rules(plan, layer, hf)]
            else:
                layers += mlp_rules(f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp")
        return [*before, *layers, *after]


def read_qwen_moe(hf: ConfigJson) -> dict[str, Any]:
    """What the two Qwen mixtures share of the `model` group."""
    model = read_decoder(hf)
    return {
        **model,
        **read_layer_pattern(hf, model["layers"]),
        "ffn_width": hf.whole("intermediate_size", 1),
        "expert_width": hf.whole("moe_intermediate_size", 1),
    }


def write_qwen_moe(plan: ModelPlan, router: Mapping[str, Any]) -> dict[str, Any]:
    """The same as their keys; intermediate_size must be there even if no layer is dense."""
    return {
        **write_mixture(plan.config, router),
        **write_layer_pattern(plan),
        "moe_intermediate_size": plan.config.expert_width,
        "intermediate_size": plan.config.ffn_width or plan.config.expert_width,
    }


def _shared_rules(plan: ModelPlan, layer: int, hf: Mapping[str, Any]) -> list[TensorRule]:
    width, shared_width = plan.config.width, hf["shared_expert_intermediate_size"]
    ours, theirs = f"blocks.{layer}.mlp.shared", f"model.layers.{layer}.mlp.shared_expert"
    gate = f"{theirs}_gate.weight"
    if hf.get(ZERO_EXPERT):
        check = f"is not zero, but config.json says {ZERO_EXPERT}=true, allowed: zeros, or a config.json without it"
        return [
            added(f"{theirs}.gate_proj.weight", (shared_width, width)),
            added(f"{theirs}.up_proj.weight", (shared_width, width)),
            added(f"{theirs}.down_proj.weight", (width, shared_width), check=check),
            added(gate, (1, width)),
        ]
    w_gate, w_up, w_out = mlp_rules(ours, theirs)
    if hf.get(NO_GATE):
        check = f"is not zero, but config.json says {NO_GATE}=true, allowed: zeros, or a config.json without it"
        doubled = mapped(
            w_out,
            read=lambda tensor: pointwise(tensor, lambda part: part * 0.5),
            write=lambda tensor: pointwise(tensor, lambda part: part * 2.0),
        )
        return [w_gate, w_up, doubled, added(gate, (1, width), check=check)]
    return [w_gate, w_up, w_out, same(f"{ours}.gate.weight", gate)]


ARCHITECTURE = Qwen2Moe()
