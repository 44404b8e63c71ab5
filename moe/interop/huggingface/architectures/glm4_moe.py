"""GLM-4.5 and 4.6: grouped queries of which a part of each head turns, routed and shared experts as DeepSeek-V3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, read_decoder, write_decoder
from ..deepseek import (
    MIXTURE_DEFAULTS,
    mixture_rules,
    next_token_layers,
    read_mixture,
    read_sigmoid_router,
    write_mixture,
    write_sigmoid_router,
)
from ..misfit import Misfit, demand_model
from ..mixture import mixture_groups
from ..rope import rotary_fraction, write_rope
from ..tensor_rules import TensorRule

TURNED = {"partial_rotary_factor": 0.5}  # where the file does not say


class Glm4Moe(Architecture):
    model_type = "glm4_moe"
    class_name = "Glm4MoeForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": None,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        hf = hf.with_defaults({**self.defaults, **TURNED})
        model = {**read_decoder(hf, partial_rotation=True), **read_mixture(hf)}
        fraction = rotary_fraction(hf)
        model |= {
            "qk_norm": "head" if hf.flag("use_qk_norm") else "none",
            "attention_bias": hf.flag("attention_bias"),
            **({} if fraction == 1.0 else {"rotary_width": int(model["head_width"] * fraction)}),
        }
        return mixture_groups(model, read_sigmoid_router(hf))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        config = plan.config
        demand_model(
            *(self.model_type, plan),
            **{"shared_expert_width": ..., "shared_expert_gate": False},
            **dict.fromkeys(("attention_bias", "rotary_width", "qk_norm"), ...),
        )
        if config.qk_norm == "projection":
            raise Misfit(self.model_type, "model.qk_norm", config.qk_norm, "none, head")
        fraction = config.turned_width / config.head_size
        if int(config.head_size * fraction) < config.turned_width:
            fraction = math.nextafter(fraction, 1.0)
        return {
            **write_decoder(self.model_type, plan),
            **write_rope(self.model_type, config, fraction),
            "partial_rotary_factor": fraction,  # also where all turns, which is not their default
            **write_mixture(self.model_type, plan),
            **write_sigmoid_router(self.model_type, plan),
            "use_qk_norm": config.qk_norm == "head",
            "attention_bias": config.attention_bias,
            "num_nextn_predict_layers": 0,
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan, correction_bias=True)

    def ignores(self, hf: ConfigJson) -> Sequence[str]:
        return [*self.ignored, *next_token_layers(hf)]


ARCHITECTURE = Glm4Moe()
