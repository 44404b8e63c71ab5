"""OLMoE: norms of queries and keys over all heads at once, experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import (
    BIASES,
    DECODER_DEFAULTS,
    read_attention_bias,
    read_decoder,
    write_attention_bias,
    write_decoder,
)
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


class Olmoe(Architecture):
    model_type = "olmoe"
    class_name = "OlmoeForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "sliding_window": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        hf.only("clip_qkv")
        hf.only("sliding_window")  # its class hands it to the attention kernel, but does not mask by it
        model = read_decoder(hf)
        hf.only("head_dim", model["width"] // model["heads"])  # the norms have that width, whatever head_dim says
        model |= {
            "num_experts": read_num_experts(hf, "num_experts"),
            "expert_width": hf.whole("intermediate_size", 1),
            "qk_norm": "projection",
            **read_attention_bias(hf),
        }
        return mixture_groups(model, read_router(hf, hf.flag("norm_topk_prob")))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        config = plan.config
        demand_model(self.model_type, plan, qk_norm="projection", **BIASES)
        if config.head_size != config.width // config.heads or config.width % config.heads:
            raise Misfit(self.model_type, "model.head_width", config.head_size, "model.width / model.heads")
        demand_experts(self.model_type, plan, all_layers=True)
        router = demand_router(self.model_type, plan, ("softmax", "softmax_after"))
        return {
            **write_decoder(self.model_type, plan),
            **write_mixture(config, router),
            "intermediate_size": config.expert_width,
            "norm_topk_prob": renormalised(router),
            **write_attention_bias(self.model_type, config),
            "clip_qkv": None,
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan)


ARCHITECTURE = Olmoe()
