"""Qwen3-MoE: the attention of Qwen 3, experts in all layers or some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import BIASES, read_attention_bias, write_attention_bias, write_decoder
from ..misfit import demand_experts, demand_model, demand_router
from ..mixture import mixture_groups, mixture_rules, read_num_experts, read_router, renormalised
from ..tensor_rules import TensorRule
from ..windows import read_switched_window, write_switched_window
from .qwen2_moe import QWEN_MOE_DEFAULTS, read_qwen_moe, write_qwen_moe


class Qwen3Moe(Architecture):
    model_type = "qwen3_moe"
    class_name = "Qwen3MoeForCausalLM"
    defaults = {
        **QWEN_MOE_DEFAULTS,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "attention_bias": False,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = {**read_qwen_moe(hf), "num_experts": read_num_experts(hf, "num_experts"), "qk_norm": "head"}
        model |= read_attention_bias(hf)
        model |= read_switched_window(hf, [True] * model["layers"])
        return mixture_groups(model, read_router(hf, hf.flag("norm_topk_prob")))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_model(self.model_type, plan, qk_norm="head", sliding_window=..., **BIASES)
        demand_experts(self.model_type, plan)
        router = demand_router(self.model_type, plan, ("softmax", "softmax_after"))
        return {
            **write_decoder(self.model_type, plan),
            **write_switched_window(plan),
            **write_qwen_moe(plan, router),
            "norm_topk_prob": renormalised(router),
            **write_attention_bias(self.model_type, plan.config),
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan)


ARCHITECTURE = Qwen3Moe()
