"""Qwen 3: norms of queries and keys over each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import BIASES, dense_groups, dense_rules, read_attention_bias, write_attention_bias, write_decoder
from ..misfit import demand_dense, demand_model
from ..tensor_rules import TensorRule
from ..windows import WINDOWS, write_switched_window
from .qwen2 import QWEN_DEFAULTS, read_qwen


class Qwen3(Architecture):
    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    defaults = {**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False}

    def read_config(self, hf: ConfigJson) -> Groups:
        return dense_groups({**read_qwen(hf), "qk_norm": "head", **read_attention_bias(hf)})

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_dense(self.model_type, plan)
        demand_model(self.model_type, plan, qk_norm="head", **WINDOWS, **BIASES)
        return {
            **write_decoder(self.model_type, plan),
            **write_switched_window(plan),
            **write_attention_bias(self.model_type, plan.config),
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return dense_rules(plan)


ARCHITECTURE = Qwen3()
