"""Mistral 7B: Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, dense_groups, dense_rules, read_decoder, write_decoder
from ..misfit import demand_dense, demand_model
from ..tensor_rules import TensorRule
from ..windows import read_window


class Mistral(Architecture):
    model_type = "mistral"
    class_name = "MistralForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "layer_types": None,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = {**read_decoder(hf), "ffn_width": hf.whole("intermediate_size", 1)}
        return dense_groups(
            {**model, **read_window(hf, [True] * model["layers"], hf.whole_or_none("sliding_window", 1))}
        )

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_dense(self.model_type, plan)
        demand_model(self.model_type, plan, sliding_window=...)
        return {**write_decoder(self.model_type, plan), "sliding_window": plan.config.sliding_window}

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return dense_rules(plan)


ARCHITECTURE = Mistral()
