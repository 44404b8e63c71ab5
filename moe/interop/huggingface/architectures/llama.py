"""Llama 2 and 3, and the many models of their shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import (
    BIASES,
    DECODER_DEFAULTS,
    dense_groups,
    dense_rules,
    read_attention_bias,
    read_decoder,
    write_attention_bias,
    write_decoder,
)
from ..misfit import Misfit, demand_dense, demand_model
from ..tensor_rules import TensorRule


class Llama(Architecture):
    model_type = "llama"
    class_name = "LlamaForCausalLM"
    defaults = {**DECODER_DEFAULTS, "attention_bias": False, "mlp_bias": False}

    def read_config(self, hf: ConfigJson) -> Groups:
        hf.only("mlp_bias", False)
        width = hf.whole("intermediate_size", 1)
        return dense_groups({**read_decoder(hf), "ffn_width": width, **read_attention_bias(hf)})

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_dense(self.model_type, plan)
        demand_model(self.model_type, plan, **BIASES)
        config = plan.config
        if config.width % config.heads:  # their config class refuses it, even where head_dim is given
            raise Misfit(self.model_type, "model.heads", config.heads, f"a divisor of model.width={config.width}")
        biases = {**write_attention_bias(self.model_type, config), "mlp_bias": False}
        return {**write_decoder(self.model_type, plan), **biases}

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return dense_rules(plan)


ARCHITECTURE = Llama()
