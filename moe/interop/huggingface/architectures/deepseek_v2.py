"""DeepSeek-V2 and V2-Lite: latent attention, softmax scores that are not renormalised, shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, TOP_K
from ..deepseek import (
    LATENT_DEFAULTS,
    MIXTURE_DEFAULTS,
    demand_latent,
    mixture_rules,
    read_latent,
    read_mixture,
    write_latent,
    write_mixture,
)
from ..misfit import Misfit, demand_model, demand_router
from ..mixture import mixture_groups, renormalised
from ..tensor_rules import TensorRule

GREEDY, GROUPED = "greedy", "group_limited_greedy"


class DeepseekV2(Architecture):
    """norm_topk_prob=true is refused: the published code renormalises then, the class of transformers does not."""

    model_type = "deepseek_v2"
    class_name = "DeepseekV2ForCausalLM"
    defaults = {
        **DECODER_DEFAULTS,
        **LATENT_DEFAULTS,
        **MIXTURE_DEFAULTS,
        "vocab_size": 102400,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "first_k_dense_replace": 0,
        "topk_method": GREEDY,
        "n_group": None,
        "topk_group": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }

    def read_config(self, hf: ConfigJson) -> Groups:
        model = {**read_latent(hf, interleaved=True), **read_mixture(hf)}
        return mixture_groups(model, _read_router(hf))

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        latent = demand_latent(self.model_type, plan)
        free = ("attention_bias", "attention_output_bias", "latent_attention", "shared_expert_width")
        demand_model(self.model_type, plan, shared_expert_gate=False, **dict.fromkeys(free, ...))
        if not latent.interleaved:
            raise Misfit(self.model_type, "model.latent_attention.interleaved", False, "true")
        return {
            **write_latent(self.model_type, plan),
            **write_mixture(self.model_type, plan),
            **_write_router(self.model_type, plan),
        }

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return mixture_rules(plan, correction_bias=False)


def _read_router(hf: ConfigJson) -> dict[str, Any]:
    hf.only("norm_topk_prob", False)
    hf.only("scoring_func", "softmax")
    groups = {}
    if hf.only("topk_method", GREEDY, GROUPED) == GROUPED:
        groups = {"num_groups": hf.whole("n_group", 1), "top_groups": hf.whole("topk_group", 1), "group_score": "max"}
    top_k, scale = hf.whole("num_experts_per_tok", 1), hf.real("routed_scaling_factor")
    return {"_target_": TOP_K, "top_k": top_k, "renormalise": False, "scale": scale, **groups}


def _write_router(model_type: str, plan: ModelPlan) -> dict[str, Any]:
    router = demand_router(model_type, plan, ("softmax",), scale=..., num_groups=...)
    if renormalised(router):
        raise Misfit(model_type, "router.renormalise", True, "false")
    grouped = router["num_groups"] > 1
    if grouped and router["group_score"] != "max":
        raise Misfit(model_type, "router.group_score", router["group_score"], "max")
    return {
        "num_experts_per_tok": router["top_k"],
        "norm_topk_prob": False,
        "routed_scaling_factor": router["scale"],
        "scoring_func": "softmax",
        "topk_method": GROUPED if grouped else GREEDY,
        "n_group": router["num_groups"] if grouped else None,
        "topk_group": router["top_groups"] if grouped else None,
    }


ARCHITECTURE = DeepseekV2()
