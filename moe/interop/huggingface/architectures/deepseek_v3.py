"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a bias that balances, groups of experts, shared experts.

Weights in FP8, in which the published ones are stored, are refused: convert them to bfloat16 first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS
from ..deepseek import (
    LATENT_DEFAULTS,
    MIXTURE_DEFAULTS,
    demand_latent,
    mixture_rules,
    next_token_layers,
    read_latent,
    read_mixture,
    read_sigmoid_router,
    write_latent,
    write_mixture,
    write_sigmoid_router,
)
from ..misfit import demand_model
from ..mixture import mixture_groups
from ..tensor_rules import TensorRule


class DeepseekV3(Architecture):
    model_type = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        **LATENT_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_interleave": True,
        "num_nextn_predict_layers": None,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = {**read_latent(hf, hf.flag("rope_interleave")), **read_mixture(hf)}
        return mixture_groups(model, read_sigmoid_router(hf))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        latent = demand_latent(self.model_type, plan)
        free = ("attention_bias", "attention_output_bias", "latent_attention", "shared_expert_width")
        demand_model(self.model_type, plan, shared_expert_gate=False, **dict.fromkeys(free, ...))
        return {
            **write_latent(self.model_type, plan),
            **write_mixture(self.model_type, plan),
            **write_sigmoid_router(self.model_type, plan),
            "rope_interleave": latent.interleaved,
            "num_nextn_predict_layers": 0,
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan, correction_bias=True)

    def ignores(self, hf: ConfigJson) -> Sequence[str]:
        return [*self.ignored, *next_token_layers(hf)]


ARCHITECTURE = DeepseekV3()
