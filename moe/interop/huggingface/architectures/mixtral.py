"""Mixtral: experts in every layer, the weights of a token renormalised, jitter in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, read_decoder, write_decoder
from ..misfit import Misfit, demand_experts, demand_model, demand_router
from ..mixture import (
    MIXTURE_DEFAULTS,
    mixture_groups,
    mixture_rules,
    read_num_experts,
    read_router,
    renormalised,
    write_mixture,
)
from ..tensor_rules import TensorRule
from ..windows import read_window


class Mixtral(Architecture):
    """Its jitter changes what the experts see too, ours only what the router sees; neither does in evaluation."""

    model_type = "mixtral"
    class_name = "MixtralForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "layer_types": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = read_decoder(hf)
        model |= {
            "num_experts": read_num_experts(hf, "num_local_experts"),
            "expert_width": hf.whole("intermediate_size", 1),
            **read_window(hf, [True] * model["layers"], hf.whole_or_none("sliding_window", 1)),
        }
        jitter = hf.real("router_jitter_noise")
        return mixture_groups(model, read_router(hf, renormalise=True, **({"jitter": jitter} if jitter else {})))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_model(self.model_type, plan, sliding_window=...)
        demand_experts(self.model_type, plan, all_layers=True)
        router = demand_router(self.model_type, plan, ("softmax", "softmax_after"))
        if not renormalised(router):
            raise Misfit(self.model_type, "router.renormalise", False, "true")
        return {
            **write_decoder(self.model_type, plan),
            **write_mixture(plan.config, router),
            "intermediate_size": plan.config.expert_width,
            "sliding_window": plan.config.sliding_window,
            "router_jitter_noise": router["jitter"],
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan, "block_sparse_moe", ("w1", "w3", "w2"))


ARCHITECTURE = Mixtral()
